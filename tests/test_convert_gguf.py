"""GGUF files as they lie about in the world, by the rules of llama.cpp; what cannot be run is named."""

from pathlib import Path

import numpy as np
import pytest
from test_convert_doors import logits, refused, rewrite
from test_convert_files import llama_tensors, permute, write_model

from gptjax.convert import open_model


@pytest.fixture
def llama(tmp_path) -> Path:
    return write_model(tmp_path / "llama", llama_tensors())


def write_gguf(
    path: Path, arch: str = "llama", tensors: dict | None = None, without: str = "", parts: int = 0, **keys
) -> Path:
    """Write a Llama of CONFIG, with other keys of the architecture: `{"rope.freq_base": 1.0}`."""
    gguf = pytest.importorskip("gguf", reason="pip install -e '.[hf]'")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=-(-21 // parts) if parts else 0)
    sizes = {"block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adds[list] = writer.add_array
    for key, value in {**sizes, **keys}.items():
        if key != without:
            adds[type(value)](key if key.startswith("general.") else f"{arch}.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in (llama_tensors() if tensors is None else tensors).items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        stored = value if heads is None else permute(value, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")) or name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_split_gguf_model_is_one(llama, tmp_path):
    write_gguf(tmp_path / "m.gguf", parts=2)
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    np.testing.assert_array_equal(logits(first), logits(llama))
    refused(second, "it is part 2 of 2 of a split model; give the first, m-00001-of-00002.gguf")
    second.rename(tmp_path / "elsewhere")
    refused(first, "it is part 1 of 2 of a split model, and m-00002-of-00002.gguf is not beside it")
    first.rename(tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", "part 1 of 2 of a split model; name the parts ...-00001-of-00002.gguf")


GGUF_CHANGES = {
    "rotary pairs in a part of each head": (
        {"rope.dimension_count": 8},
        "llama.rope.dimension_count 8 cannot be run",
    ),
    "values of another width": ({"attention.value_length": 8}, "llama.attention.value_length 8 cannot be run"),
    "experts": ({"expert_count": 8}, r"llama.expert_count 8 \(a mixture of experts\)"),
    "attention to both sides": ({"attention.causal": False}, "llama.attention.causal False cannot be run"),
    "another scale": ({"attention.scale": 0.5}, "llama.attention.scale 0.5 cannot be run"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping 30.0 cannot be run"),
    "yarn": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope_type 'yarn' cannot be run here"),
    "a key that must be there": ({"without": "block_count"}, "lacks llama.block_count; convert the model again"),
    "heads that differ by layer": (
        {"attention.head_count": [4, 2]},
        r"llama.attention.head_count \[4, 2\] differs by layer",
    ),
    "another architecture": (
        {"arch": "qwen3moe"},
        "architecture 'qwen3moe' is not known: a mixture of experts; known",
    ),
    "an adapter": ({"general.type": "adapter"}, "GGUF file of the type 'adapter', not a whole model"),
    "a tensor of experts": (
        {"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 64), np.float32)}},
        "a tensor 'blk.0.ffn_gate_exps.weight', which no model that can be run here has: of a mixture of experts",
    ),
}


@pytest.mark.parametrize("name", GGUF_CHANGES)
def test_a_gguf_file_that_computes_something_else_is_refused_by_name(name, tmp_path):
    keys, message = GGUF_CHANGES[name]
    refused(write_gguf(tmp_path / "m.gguf", **keys), message)


def test_a_gguf_file_means_what_it_means_to_llama_cpp(tmp_path, capsys):
    def config(**keys):
        return open_model(str(write_gguf(tmp_path / "m.gguf", **keys))).config

    for keys in (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 4.0},  # linear is the default
        {"rope.scale_linear": 4.0},  # the name of old
    ):
        assert (config(**keys).positions.scaling.kind, config(**keys).positions.scaling.factor) == ("linear", 4.0)
    assert config(**{"rope.scaling.type": "none", "rope.scaling.factor": 4.0}).positions.scaling is None
    assert config(**{"attention.sliding_window": 100}).context_length == 100
    assert config(**{"attention.head_count": [4, 4]}).n_heads == 4
    assert capsys.readouterr().err == ""
    config(my_key=1)
    assert capsys.readouterr().err == "note: my_key: unknown keys of llama; ignored\n"


def test_the_biases_of_a_gguf_file_are_read(tmp_path, llama):
    random = np.random.default_rng(1)
    biases = {
        f"model.layers.{i}.self_attn.{x}_proj.bias": random.normal(0, 1, n).astype(np.float32)
        for i in range(2)
        for x, n in (("q", 64), ("k", 32), ("v", 32), ("o", 64))
    }
    rewrite(llama, {**llama_tensors(), **biases}, attention_bias=True)
    path = write_gguf(tmp_path / "m.gguf", tensors={**llama_tensors(), **biases})
    np.testing.assert_allclose(logits(path), logits(llama), atol=1e-5)
