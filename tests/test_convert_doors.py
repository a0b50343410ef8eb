"""Models as they lie about in the world: the weights that transformers takes, or what they are, with the way out."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_convert_files import CONFIG, edit_config, llama_tensors, rewrite_header, without, write_model

import gptjax
from gptjax.convert import export_model, import_model, open_model
from gptjax.convert.safetensors import INDEX, NAME
from gptjax.errors import UserError

IDS = np.random.default_rng(0).integers(0, 400, (2, 16))
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def llama(tmp_path) -> Path:
    return write_model(tmp_path / "llama", llama_tensors())


def logits(path: Path) -> np.ndarray:
    with jax.disable_jit():  # to compile nothing for every shape of a model
        return np.asarray(gptjax.load(str(path)).logits(IDS))


def refused(path: Path, message: str) -> None:
    """The model is refused in one line that says this."""
    with pytest.raises(UserError, match=message) as error:
        open_model(str(path))
    assert len(str(error.value).splitlines()) == 1


def rewrite(folder: Path, tensors: dict[str, np.ndarray], **config) -> Path:
    """Other tensors and other keys in a model's folder."""
    write_model(folder, tensors)
    edit_config(folder, **config)
    return folder


# K1: other weights, silently ----------------------------------------------------------------------------------------


def test_a_head_that_is_not_the_embedding_is_used_and_exported_although_the_config_ties_them(llama, tmp_path):
    expected = logits(llama)
    edit_config(llama, tie_word_embeddings=True)
    np.testing.assert_array_equal(logits(llama), expected)
    import_model(str(llama), str(tmp_path / "run"))
    export_model(str(tmp_path / "run"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(logits(tmp_path / "out"), expected)


def test_a_head_that_is_the_embedding_stays_tied(llama):
    tensors = llama_tensors()
    rewrite(llama, {**tensors, HEAD: tensors[EMBED]}, tie_word_embeddings=True)
    assert open_model(str(llama)).config.tie_embeddings


def test_the_file_that_the_config_names_is_read(llama):
    expected = logits(llama)
    (llama / NAME).rename(llama / "best.safetensors")
    write_model(llama, llama_tensors(seed=1))
    edit_config(llama, transformers_weights="best.safetensors")
    np.testing.assert_array_equal(logits(llama), expected)
    edit_config(llama, transformers_weights="../best.safetensors")
    refused(llama, r"transformers_weights '\.\./best\.safetensors' is no \.safetensors file or index of this folder")
    edit_config(llama, transformers_weights="other.safetensors")
    refused(llama, "transformers_weights 'other.safetensors' is not there")


def test_of_two_rope_scalings_the_older_key_counts_as_in_transformers(llama):
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    edit_config(llama, **both, rope_scaling={"type": "linear", "factor": 4.0})
    model = open_model(str(llama)).config
    assert (model.positions.scaling.kind, model.positions.scaling.factor) == ("linear", 4.0)
    assert model.positions.theta == 10000.0


def test_the_context_of_llama3_scaling_is_found_where_transformers_finds_it(llama):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit_config(llama, rope_scaling=scaling)
    assert open_model(str(llama)).config.positions.scaling.original_context == 128  # max_position_embeddings
    edit_config(llama, rope_scaling={**scaling, "original_max_position_embeddings": 64})
    assert open_model(str(llama)).config.positions.scaling.original_context == 64
    edit_config(
        llama,
        rope_scaling={**scaling, "original_max_position_embeddings": 64},
        original_max_position_embeddings=32,
    )
    assert open_model(str(llama)).config.positions.scaling.original_context == 32


CHANGES = {  # keys that would change what is computed
    "attention to both sides": ({"is_causal": False}, "is_causal False cannot be run here"),
    "a part of each head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 cannot be run here"),
    "the same, within": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor 0.25",
    ),
    "another scale": ({"logit_scale": 0.5}, "logit_scale 0.5 is not a key of Llama"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not a key of Llama"),
    "norms of queries": ({"use_qk_norm": True}, "use_qk_norm True is not a key of Llama"),
    "experts": ({"num_local_experts": 4}, "num_local_experts 4 is not a key of Llama"),
    "layers unlike": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be 2 of full_att"),
    "layers apart": ({"per_layer_config": {"0": {}}}, "per_layer_config .* cannot be run here"),
    "rope by layers": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "must be an object"),
    "pairs that are neighbours": ({"rope_interleaved": True}, "rope_interleaved True cannot be run here"),
    "pruned heads": ({"pruned_heads": {"0": [1]}}, "pruned_heads .* cannot be run here"),
    "a strange part of the rope": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}},
        r"short_factor \[1.0\] is not a key of the rope_type 'linear'",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_that_changes_what_is_computed_is_refused_by_name(name, llama):
    keys, message = CHANGES[name]
    edit_config(llama, **keys)
    refused(llama, message)


def test_a_key_that_nobody_reads_is_noted(llama, capsys):
    edit_config(llama, my_note="a", logit_scale=1.0, torch_dtype="float16", unsloth_fixed=True)
    open_model(str(llama))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "note: config.json: logit_scale, my_note: not read for Llama; ignored, as by transformers\n"
    )


def test_a_window_counts_for_the_layers_that_have_one(llama):
    tensors = llama_tensors()
    biases = {
        f"model.layers.{i}.self_attn.{x}_proj.bias": n
        for i in range(2)
        for x, n in zip("qkv", (64, 32, 32), strict=True)
    }
    tensors |= {name: np.zeros(n, np.float32) for name, n in biases.items()}
    write_model(llama, tensors)
    window = {"model_type": "qwen2", "sliding_window": 10, "use_sliding_window": True}
    for keys, local in (
        ({"max_window_layers": 1}, (False, True)),
        ({"max_window_layers": 2}, (False, False)),
        ({}, (False, False)),
        ({"max_window_layers": 1, "layer_types": ["full_attention"] * 2}, (False, False)),
        ({"layer_types": ["sliding_attention", "full_attention"]}, (True, False)),
        ({"use_sliding_window": False, "max_window_layers": 0, "layer_types": None}, (False, False)),
        ({"sliding_window": None, "max_window_layers": 0, "layer_types": None}, (False, False)),
    ):
        edit_config(llama, **{**window, **keys})
        config = open_model(str(llama)).config
        assert (config.local_layers, config.context_length) == (local, 128), keys
    edit_config(llama, **{**window, "max_window_layers": 0, "sliding_window": 0})
    refused(llama, "sliding_window 0 must be a number of at least 1, or null")
    edit_config(llama, **{**window, "sliding_window": None}, layer_types=["sliding_attention"] * 2)
    refused(llama, "layer_types has sliding_attention, but there is no sliding_window; make them agree")
    edit_config(llama, **window, layer_types=["chunked_attention"] * 2)
    refused(llama, "layer_types must be 2 of full_attention or sliding_attention")


# K4: refused, though transformers loads it --------------------------------------------------------------------------


def test_a_head_alone_is_the_embedding_too(llama):
    tensors = llama_tensors()
    edit_config(llama, tie_word_embeddings=True)
    write_model(llama, without(tensors, HEAD))
    edit_config(llama, tie_word_embeddings=True)
    expected = logits(llama)
    rewrite(llama, {HEAD: tensors[EMBED], **without(without(tensors, HEAD), EMBED)}, tie_word_embeddings=True)
    np.testing.assert_array_equal(logits(llama), expected)


def test_a_whole_file_counts_before_an_index(llama):
    expected = logits(llama)
    (llama / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00008.safetensors"}}))
    np.testing.assert_array_equal(logits(llama), expected)


def test_an_index_counts_for_its_files_alone(tmp_path):
    folder = write_model(tmp_path / "sharded", llama_tensors(), max_shard_bytes=100_000)
    expected = logits(folder)
    index = json.loads((folder / INDEX).read_text())
    weight_map = index["weight_map"]
    files = sorted({*weight_map.values()})
    kept = {file: next(name for name, where in weight_map.items() if where == file) for file in files}
    weight_map = {name: file for file, name in kept.items()}  # one name a file
    weight_map[kept[files[0]]], weight_map[kept[files[1]]] = files[1], files[0]  # and two in the wrong one
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(logits(folder), expected)


def test_null_means_what_the_class_computes(llama):
    tensors = llama_tensors()
    for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
        tensors[name] = np.concatenate([tensors[name]] * 2)
    for kind in ("mistral", "llama"):
        rewrite(llama, tensors, model_type=kind, num_key_value_heads=None, head_dim=None, sliding_window=None)
        assert open_model(str(llama)).config.kv_heads == 4
        assert open_model(str(llama)).config.d_head == 16


@pytest.mark.parametrize("which", ["attention_bias", "mlp_bias"])
def test_biases_in_a_part_of_the_layers_are_read_and_the_others_are_zeros(which, llama, tmp_path):
    D, F, H, G = 64, 96, 64, 32
    sizes = {"attention_bias": {"q": H, "k": G, "v": G, "o": D}, "mlp_bias": {"gate": F, "up": F, "down": D}}
    part = {"attention_bias": "self_attn", "mlp_bias": "mlp"}
    random = np.random.default_rng(1)
    biases = {
        key: {
            f"model.layers.{i}.{part[key]}.{x}_proj.bias": random.normal(0, 1, n).astype(np.float32)
            for i in range(2)
            for x, n in sizes[key].items()
        }
        for key in sizes
    }
    other = next(key for key in sizes if key != which)
    zeros = {name: np.zeros_like(value) for name, value in biases[other].items()}
    everywhere = rewrite(
        tmp_path / "all", {**llama_tensors(), **biases[which], **zeros}, **dict.fromkeys(sizes, True)
    )
    rewrite(llama, {**llama_tensors(), **biases[which]}, **{which: True})
    np.testing.assert_array_equal(logits(llama), logits(everywhere))
    rewrite(llama, {**llama_tensors(), **biases[which]}, **dict.fromkeys(sizes, True))
    refused(llama, "the model lacks ")  # what config.json promises is not taken for zeros


@pytest.mark.parametrize("change", ["removed", "added", "removed but for the head"])
def test_the_prefix_of_names_may_be_there_or_not(change, llama):
    expected = logits(llama)
    tensors = llama_tensors()
    if change == "added":
        tensors = {f"model.{name}" if name == HEAD else name: value for name, value in tensors.items()}
    else:
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    write_model(llama, tensors)
    np.testing.assert_array_equal(logits(llama), expected)
    write_model(llama, {**llama_tensors(), "norm.weight": np.ones(64, np.float32)})
    refused(llama, "both norm.weight and model.norm.weight, which are the same weight")


def test_a_head_beside_the_one_for_the_next_token_is_noted(llama, capsys):
    expected = logits(llama)
    write_model(llama, {**llama_tensors(), "v_head.summary.weight": np.zeros((1, 64), np.float32)})
    np.testing.assert_array_equal(logits(llama), expected)
    assert "note: v_head.summary.weight: heads of another task; ignored" in capsys.readouterr().err


# K5: refusals that mislead ------------------------------------------------------------------------------------------


def add_tensors(folder: Path, names: dict[str, str]) -> None:
    """Give a file more tensors, by name the dtype in which they are stored."""
    tensors = {**llama_tensors(), **{name: np.zeros(64, np.float32) for name in names}}
    write_model(folder, tensors)

    def retype(header):
        for name, dtype in names.items():
            bytes_each = {"I32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "F4": 0.5, "F32": 4, "F16": 2}[
                dtype
            ]
            header[name].update(dtype=dtype, shape=[int(256 / bytes_each)])

    rewrite_header(folder / NAME, retype)


UP = "model.layers.0.mlp.up_proj"
QUANTIZED = {
    "GPTQ": ({f"{UP}.qweight": "I32", f"{UP}.qzeros": "I32"}, {"quant_method": "gptq"}, "quantized by gptq .*I32"),
    "GPTQ, of old": (
        {f"{UP}.qweight": "I32", f"{UP}.g_idx": "I32"},
        None,
        "quantized by gptq or awq .by its tensors",
    ),
    "AWQ": ({f"{UP}.qweight": "I32"}, {"quant_method": "awq"}, "quantized by awq"),
    "FP8": (
        {f"{UP}.weight": "F8_E4M3", f"{UP}.weight_scale_inv": "F32"},
        {"quant_method": "fp8"},
        r"quantized by fp8 .*F8_E4M3.*FineGrainedFP8Config\(dequantize=True\)",
    ),
    "FP8, unsaid": (
        {f"{UP}.weight": "F8_E4M3", f"{UP}.weight_scale": "F32"},
        None,
        "quantized by compressed-tensors",
    ),
    "MXFP4": ({f"{UP}_blocks": "U8", f"{UP}_scales": "F8_E8M0"}, {"quant_method": "mxfp4"}, "by mxfp4 .*Mxfp4Config"),
    "NVFP4": ({f"{UP}.weight_packed": "F4"}, {"quant_method": "nvfp4"}, "quantized by nvfp4 .*F4"),
    "bitsandbytes": (
        {f"{UP}.weight": "U8", f"{UP}.weight.absmax": "F32"},
        {"load_in_4bit": True},
        r"quantized by bitsandbytes .*\.dequantize\(\)",
    ),
    "a leftover": (
        {},
        {"quant_method": "bitsandbytes"},
        "quantization_config .bitsandbytes., but its tensors are plain",
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_model_is_named_with_the_way_out(name, llama):
    names, stated, message = QUANTIZED[name]
    add_tensors(llama, {key: dtype for key, dtype in names.items() if key != f"{UP}.weight"})
    if f"{UP}.weight" in names:
        write_model(llama, without(llama_tensors(), f"{UP}.weight"))
        tensors = without(llama_tensors(), f"{UP}.weight")
        tensors |= {key: np.zeros(64, np.float32) for key in names}
        write_model(llama, tensors)
        rewrite_header(
            llama / NAME,
            lambda header: header[f"{UP}.weight"].update(dtype=names[f"{UP}.weight"], shape=[256]),
        )
    edit_config(llama, quantization_config=stated)
    refused(llama, message)


FOREIGN = {
    "gpt-oss": (
        {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 8},
        r"'deepseek_v3' is a mixture of experts \(n_routed_experts\)",
    ),
    "GraniteMoE": ({"model_type": "granitemoe"}, "'granitemoe' is a mixture of experts, which cannot be run here"),
    "a model that sees": (
        {"model_type": "llava", "vision_config": {"a": 1}, "text_config": {"model_type": "llama"}},
        r"'llava' is a multimodal model \(vision_config\).*its language model, a 'llama', can be run",
    ),
    "BERT": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert' is an encoder"),
    "T5": ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is an encoder-decoder"),
    "Mamba": ({"model_type": "mamba"}, "'mamba' is a state-space or recurrent model"),
    "a near name": ({"model_type": "ministral"}, r"'ministral' is not known; known: gpt2"),
    "another spelling": ({"model_type": "Qwen-2"}, "'Qwen-2' is not known; did you mean 'qwen2'"),
    "a name that its class belies": (
        {"model_type": "my_llama", "architectures": ["LlamaForCausalLM"]},
        "'my_llama' is not known, but LlamaForCausalLM is that of 'llama'",
    ),
    "no name": ({"model_type": None}, "model_type None is not the name of a family"),
    "a classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "its class LlamaForSequenceClassification is no language model",
    ),
    "fewer layers": (
        {"num_hidden_layers": 1},
        "unexpected tensors .* config.json says num_hidden_layers 1; correct the key",
    ),
    "another width": (
        {"vocab_size": 300},
        "wrong shape: model.embed_tokens.weight .* check hidden_size, vocab_size in config.json",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_of_another_kind_is_named_for_what_it_is(name, llama):
    keys, message = FOREIGN[name]
    edit_config(llama, **keys)
    with pytest.raises(UserError, match=message) as error:
        open_model(str(llama))
    if name not in ("another spelling",):
        assert "did you mean" not in str(error.value)


TENSORS = {
    "of experts": ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "of a mixture of experts"),
    "of eyes": ("vision_tower.patch.weight", "of a multimodal model"),
    "of an adapter": ("model.layers.0.mlp.up_proj.lora_A.default.weight", "of a LoRA adapter.*merge_and_unload"),
    "of a classifier": ("score.weight", "unexpected tensor score.weight: the head of a classifier"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_kind_are_named_for_what_they_are(name, llama):
    tensor, message = TENSORS[name]
    write_model(llama, {**llama_tensors(), tensor: np.zeros((2, 64), np.float32)})
    refused(llama, message)


def test_a_wrapped_module_a_base_model_and_integers_are_told_apart(llama):
    tensors = llama_tensors()
    write_model(llama, {f"_orig_mod.{name}": value for name, value in tensors.items()})
    refused(llama, "begin with '_orig_mod.', as those of a wrapped module")
    write_model(llama, without(tensors, HEAD))
    refused(llama, "lacks lm_head.weight: it is a base model without a head.*tie_word_embeddings")
    write_model(llama, tensors)
    rewrite_header(llama / NAME, lambda header: header["model.norm.weight"].update(dtype="I32"))
    refused(llama, "model.norm.weight is I32, which cannot be read; save the model as float32")
    rewrite_header(llama / NAME, lambda header: header["model.norm.weight"].update(dtype="F99"))
    refused(llama, "dtype F99, which is not known")


FOLDERS = {
    "an adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
        r"adapter \(PEFT\) of 'org/base'",
    ),
    "Meta's own format": ({"params.json": "{}", "consolidated.00.pth": ""}, "its maker's own format"),
    "GGUF files": ({"a-Q4_0.gguf": "", "b.gguf": ""}, "folder of GGUF files; give one of them: .*a-Q4_0.gguf'"),
    "a pipeline of diffusers": ({"model_index.json": "{}"}, "pipeline of diffusers"),
    "weights alone": ({NAME: ""}, "holds weights, but no config.json"),
    "a cache of the hub": ({"snapshots/abc/config.json": "{}"}, r"such as '.*snapshots/abc'"),
    "checkpoints": ({"checkpoint-900/config.json": "{}", "checkpoint-1000/config.json": "{}"}, "'.*checkpoint-1000'"),
    "another name": (
        {"config.json": CONFIG, "model.fp16.safetensors": ""},
        "model.fp16.safetensors, but no model.safe",
    ),
    "shards alone": (
        {"config.json": CONFIG, "model-00001-of-00002.safetensors": ""},
        "no model.safetensors.index.json; copy the index",
    ),
    "GGUF beside its config": ({"config.json": CONFIG, "a.gguf": ""}, "give the GGUF file itself"),
    "weights for TensorFlow": ({"config.json": CONFIG, "tf_model.h5": ""}, "holds weights for TensorFlow"),
    "an adapter with a config": ({"config.json": CONFIG, "adapter_config.json": "{}"}, r"adapter \(PEFT\)"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_named_for_what_it_holds(name, tmp_path):
    files, message = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text if isinstance(text, str) else json.dumps(text))
    refused(tmp_path, message)


def test_a_snapshot_of_the_cache_that_lacks_shards_is_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    write_model(snapshot, llama_tensors(), max_shard_bytes=100_000)
    assert open_model("org/name").path == snapshot
    next(snapshot.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="'org/name' is no path here, and is not in the Hugging Face cache"):
        open_model("org/name")


def test_a_repository_of_the_hub_without_safetensors_is_told(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="pip install -e '.[hf]'")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="'org/name' has no safetensors on the hub"):
        open_model("org/name")


def test_the_file_of_a_model_leads_to_its_folder(llama):
    with pytest.raises(UserError, match=f"give the directory of a model or run, here {re.escape(repr(str(llama)))}"):
        open_model(str(llama / NAME))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 99\n"


@pytest.mark.parametrize("name", [NAME, "config.json", "tokenizer.json", "generation_config.json", "model.gguf"])
def test_a_pointer_of_git_lfs_is_named_for_what_it_is(name, llama):
    (llama / name).write_text(POINTER)
    refused(llama / name if name.endswith("gguf") else llama, f"{name} is a pointer of Git LFS.*: git lfs pull")


def test_a_file_that_is_not_read_may_be_a_pointer_or_a_broken_link(llama):
    (llama / "pytorch_model.bin").write_text(POINTER)
    (llama / "consolidated.safetensors").symlink_to("../../blobs/ab")
    open_model(str(llama))


@pytest.mark.parametrize("name", [NAME, "config.json", "tokenizer.json", "merges.txt"])
def test_a_copied_snapshot_whose_links_lead_nowhere_says_so(name, llama):
    (llama / name).unlink(missing_ok=True)
    (llama / name).symlink_to("../../blobs/ab")
    refused(llama, rf"{name}' is a link to '../../blobs/ab', which is not there.*cp -rL")
