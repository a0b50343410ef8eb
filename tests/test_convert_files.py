"""Files of other tools: damaged ones are refused in one line, GGUF is read as what it was made from."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import yaml

import gptjax
from gptjax import cli
from gptjax.config import RopeScaling
from gptjax.configfile import config_from_dict
from gptjax.convert import import_model, open_model
from gptjax.convert.configs import import_config, read_json
from gptjax.convert.safetensors import INDEX, NAME, SafetensorsFolder, read_header, write_safetensors
from gptjax.errors import UserError
from gptjax.generate import Sampling

CONFIG = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """The weights of a Llama of CONFIG, normal and large enough that its logits are far from uniform."""
    D, F, H, G, V = 64, 96, 64, 32, 400
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(2):
        base = f"model.layers.{i}"
        shapes |= {f"{base}.self_attn.{x}_proj.weight": (n, D) for x, n in (("q", H), ("k", G), ("v", G))}
        shapes |= {f"{base}.self_attn.o_proj.weight": (D, H), f"{base}.mlp.down_proj.weight": (D, F)}
        shapes |= {f"{base}.mlp.{x}_proj.weight": (F, D) for x in ("gate", "up")}
        shapes |= {f"{base}.{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.15, shape).astype(np.float32) for name, shape in shapes.items()}


def write_model(folder: Path, tensors: dict[str, np.ndarray], **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: value.shape for name, value in tensors.items()}
    write_safetensors(folder, shapes, np.dtype(np.float32), tensors.__getitem__, **more)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    return write_model(tmp_path / "llama", llama_tensors())


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write_model(tmp_path / "sharded", llama_tensors(), max_shard_bytes=100_000)


def rewrite_header(file: Path, change) -> None:
    """Let `change` alter the header's values; the tensors' bytes stay."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_config(folder: Path, **values) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **values}))


def without(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in tensors.items() if key != name}


def cut_short(folder: Path) -> None:
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:-4])


def half_a_header(folder: Path) -> None:
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:100])


def lie_about_the_length(folder: Path) -> None:
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes((2**40).to_bytes(8, "little") + data[8:])


def overlap(folder: Path) -> None:
    def both_at_the_same_place(header):
        header["model.layers.0.mlp.up_proj.weight"] = header["model.layers.0.mlp.gate_proj.weight"]

    rewrite_header(folder / NAME, both_at_the_same_place)


def claim_more_values(folder: Path) -> None:
    rewrite_header(folder / NAME, lambda header: header["model.norm.weight"].update(shape=[65]))


def only_a_pickle(folder: Path) -> None:
    (folder / NAME).rename(folder / "pytorch_model.bin")


BAD = {
    "cut short": (cut_short, "is cut short or damaged"),
    "half a header": (half_a_header, "claims a header of"),
    "a length that is a lie": (lie_about_the_length, "claims a header of 1099511627776 bytes"),
    "tensors that overlap": (overlap, "is said to begin at byte"),
    "a shape that its bytes do not fill": (claim_more_values, "header that is not one of safetensors"),
    "a pickle": (only_a_pickle, r"pytorch_model.bin' is a pickle.*save_pretrained"),
    "no weights": (lambda f: (f / NAME).unlink(), "holds no model.safetensors"),
    "a tensor is missing": (
        lambda f: write_model(f, without(llama_tensors(), "model.layers.1.mlp.up_proj.weight")),
        r"lacks model.layers.1.mlp.up_proj.weight",
    ),
    "a tensor too many": (
        lambda f: write_model(f, {**llama_tensors(), "score.weight": np.zeros((2, 64), np.float32)}),
        r"unexpected tensors? score.weight",
    ),
    "of another shape": (lambda f: edit_config(f, intermediate_size=128), r"wrong shape: .*\(96, 64\) instead of"),
    "an unknown family": (lambda f: edit_config(f, model_type="gemma"), r"'gemma' is not known.*llama \(Llama\)"),
    "another activation": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act 'gelu' cannot be run here"),
    "another rope": (lambda f: edit_config(f, rope_scaling={"type": "proportional", "factor": 2}), "'proportional'"),
    "heads that do not divide": (lambda f: edit_config(f, num_key_value_heads=3), "model.n_kv_heads 3 does not"),
    "a size that is none": (lambda f: edit_config(f, hidden_size=None), "hidden_size None must be a number"),
    "a rope that is none": (lambda f: edit_config(f, rope_scaling="x"), "'x' must be an object"),
    "a config that is none": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "not a tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_is_refused_in_one_line(name, llama):
    spoil, message = BAD[name]
    spoil(llama)
    with pytest.raises(UserError, match=message) as refused:
        open_model(str(llama))
    assert len(str(refused.value).splitlines()) == 1


def test_a_tokenizer_of_another_model_is_refused(llama, hf_directory):
    write_model(llama, {name: v[:300] if len(v) == 400 else v for name, v in llama_tensors().items()})
    edit_config(llama, vocab_size=300)
    shutil.copy(hf_directory / "tokenizer.json", llama)
    with pytest.raises(UserError, match=r"the tokenizer has ids up to 3\d\d, but the model has only 300 embeddings"):
        open_model(str(llama))


def test_bad_shards_are_named(sharded):
    whole = open_model(str(sharded))
    assert whole.config.n_layers == 2
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    kept = shards[1].read_bytes()
    shards[1].write_bytes(kept[: len(kept) // 2])  # a copy that did not finish
    with pytest.raises(UserError, match=rf"{shards[1].name} should be {len(kept)} bytes and is {len(kept) // 2}"):
        open_model(str(sharded))
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"1 of {len(shards)} shards are missing .*{shards[1].name}"):
        open_model(str(sharded))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(UserError, match="disagree about"):
        open_model(str(sharded))
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {name: "../" + file for name, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a file of its own folder"):
        open_model(str(sharded))


def test_files_are_those_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    tensors = llama_tensors()
    write_model(tmp_path / "ours", tensors)
    theirs = library.load_file(tmp_path / "ours" / NAME)
    assert all(np.array_equal(theirs[name], tensors[name]) for name in tensors)
    (tmp_path / "theirs").mkdir()
    library.save_file({name: value.astype(np.float16) for name, value in tensors.items()}, tmp_path / "theirs" / NAME)
    found = SafetensorsFolder(tmp_path / "theirs")
    assert read_header(tmp_path / "theirs" / NAME).keys() == tensors.keys()
    assert all(np.array_equal(found.read(name), tensors[name].astype(np.float16)) for name in tensors)


def test_a_sliding_window_is_that_of_every_layer_unless_it_is_switched_off(llama):
    edit_config(llama, model_type="mistral", sliding_window=100)
    config = open_model(str(llama)).config
    assert (config.attention.window, config.local_layers, config.context_length) == (100, (True, True), 128)
    edit_config(llama, model_type="qwen3", sliding_window=100, use_sliding_window=False)
    with pytest.raises(UserError, match="q_norm"):  # its window is switched off, and this is no Qwen3
        open_model(str(llama))


def test_weights_without_a_tokenizer_compute_and_say_so_when_asked_for_text(llama, tmp_path):
    model = gptjax.load(str(llama))
    assert model.logits([[1, 2, 3]]).shape == (1, 3, 400)
    with pytest.raises(UserError, match="has no tokenizer"):
        model.generate("The")
    import_model(str(llama), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    again = gptjax.load(str(tmp_path / "run"))
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))


def test_an_id_is_found_in_the_cache_or_the_way_to_it_is_said(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'gpt2' is no path here.*copy its config.json.*into a folder"):
        open_model("gpt2")
    snapshots = tmp_path / "hub" / "models--openai-community--gpt2" / "snapshots"
    shutil.copytree(llama, snapshots / "abc")
    (snapshots / "newer").mkdir()
    (snapshots / "newer" / "config.json").write_text("{}")  # somebody fetched the config alone
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("newer")
    assert open_model("gpt2").path == snapshots / "abc"
    shutil.copytree(llama, tmp_path / "hub" / "models--org--name" / "snapshots" / "def")
    assert open_model("org/name").config.n_layers == 2
    (tmp_path / "org").mkdir()  # a folder of ours: then it is a path
    with pytest.raises(UserError, match="'org/name' does not exist"):
        open_model("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gptjax\[hf\]'"):
        open_model("other/name")


def test_what_is_no_model_is_said_with_what_is_there(tmp_path, llama):
    (tmp_path / "empty").mkdir()
    for path, message in {
        tmp_path / "nothing": "does not exist: no checkpoint of a run",
        tmp_path / "empty": "is empty: no checkpoint",
        llama.parent: "holds empty, llama, but no checkpoint",
        llama / NAME: "is a file; give the directory",
    }.items():
        with pytest.raises(UserError, match=message):
            open_model(str(path))


def test_the_commands_convert_and_refuse(llama, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.convert(["from-hf", str(llama), "--out", str(run)]) == 0
    assert cli.convert(["to-hf", str(run), "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert read_header(out / NAME)["model.norm.weight"].dtype == "BF16"
    assert cli.convert(["--help"]) == 0
    assert "from-hf" in capsys.readouterr().out
    for args, message in (
        (["from-hf", str(llama), "--out", str(run)], "not empty"),
        (["to-hf", str(run), "--out", str(out)], "not empty"),
        (["to-hf", str(run)], "out"),
        (["to-hf", str(run), "--out", str(tmp_path / "x"), "--dtype", "int8"], "dtype"),
        (["form-hf", str(llama)], "did you mean 'from-hf'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.convert(args)
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message in said
        assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.glob(".*partial*"))


# GGUF ---------------------------------------------------------------------------------------------------------------

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py does to a Llama's queries and keys."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, kind: str, tokenizer: dict, rope: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A Llama of CONFIG in a quantization; returns the tensors as the file holds them, under Hugging Face's names."""
    gguf = pytest.importorskip("gguf", reason="pip install -e '.[hf]'")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0 if rope is None else 500000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    vocab = tokenizer["model"]["vocab"]
    writer.add_token_list(sorted(vocab, key=vocab.get))
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in sorted(vocab, key=vocab.get)])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|begin|>"])
    writer.add_eos_token_id(vocab["<|endoftext|>"])
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    held = {}
    for name, value in llama_tensors().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        stored = value if heads is None else permute(value, heads)
        type_ = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        packed = gguf.quantize(stored, type_)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=type_)
        kept = gguf.dequantize(packed, type_)
        # Undone here by an index, not by the code that is tested.
        rows = permute(np.arange(len(value))[:, None], heads)[:, 0] if heads else np.arange(len(value))
        held[name] = np.empty_like(value)
        held[name][rows] = kept
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_is_the_model_that_it_was_made_from(kind, hf_directory, tmp_path):
    tokenizer = json.loads((hf_directory / "tokenizer.json").read_text())
    held = write_gguf(tmp_path / "model.gguf", kind, tokenizer)
    ours = gptjax.load(str(tmp_path / "model.gguf"))
    same = gptjax.load(str(write_model(tmp_path / "same", held)))
    assert ours.config == same.config
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, same.params))
    if kind == "F32":
        original = llama_tensors()
        assert all(np.array_equal(held[name], original[name]) for name in original)


def test_llama3s_rope_scaling_is_read_back_from_its_divisors(hf_directory, tmp_path):
    # As convert_hf_to_gguf.py computes them: 1 for short wavelengths, the factor for long ones, a blend between.
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)
    divisors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    assert divisors[0] == 1 < divisors[4] < 32 == divisors[-1]
    spec = json.loads((hf_directory / "tokenizer.json").read_text())
    write_gguf(tmp_path / "model.gguf", "F16", spec, divisors)
    assert open_model(str(tmp_path / "model.gguf")).config.positions.scaling == RopeScaling("llama3", 32.0)
    write_gguf(tmp_path / "other.gguf", "F16", spec, divisors * 1.01)
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3\.1's"):
        open_model(str(tmp_path / "other.gguf"))


def test_a_continuation_keeps_the_space_that_llamas_tokenizer_drops_before_a_text(llama, corpus_file):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.train([str(corpus_file)], tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False))
    made.save(str(llama / "tokenizer.json"))
    model = gptjax.load(str(llama))
    found = model.complete(["The king"] * 64, 2, Sampling(temperature=1.0))
    start = made.encode("The king").ids
    assert all("The king" + c.text == made.decode(start + c.tokens) for c in found)
    assert any(c.text.startswith(" ") for c in found)


def test_the_tokenizer_of_a_gguf_file_is_rebuilt(hf_directory, tmp_path):
    spec = json.loads((hf_directory / "tokenizer.json").read_text())
    write_gguf(tmp_path / "model.gguf", "F16", spec)
    ours = open_model(str(tmp_path / "model.gguf")).tokenizer
    # SmolLM's: digits one by one, then GPT-2's words; <|begin|> before a prompt.
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, spec["pre_tokenizer"]],
    }
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    theirs.no_truncation()
    for text in ("The king of 1234 nights\n\n  is<|endoftext|> this", "Käse 日本", ""):
        assert ours.encode_prompt(text).tolist() == theirs.encode(text).ids
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert ours.chat_template == "{{ messages }}"
    assert (ours.eos_id, ours.bos_id) == (0, 1)


def test_a_damaged_gguf_file_is_refused(hf_directory, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "F16", json.loads((hf_directory / "tokenizer.json").read_text()))
    data = path.read_bytes()
    for damaged in (data[:-1000], data[:300], b"GGML" + data[4:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="truncated or not a GGUF file") as refused:
            open_model(str(path))
        assert len(str(refused.value).splitlines()) == 1
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(UserError, match="ffn_xx"):
        open_model(str(path))


def test_a_config_json_becomes_the_model_section_of_a_config(tmp_path, capsys):
    given = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    given |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 61, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(given))
    expected = import_config(given).model
    for path in (tmp_path, tmp_path / "config.json"):
        assert cli.convert(["config", str(path)]) == 0
        values = yaml.safe_load(capsys.readouterr().out)
        assert config_from_dict(values).model == expected
    for text in ("[1]", "{", None):
        (tmp_path / "config.json").unlink() if text is None else (tmp_path / "config.json").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            cli.convert(["config", str(tmp_path)])
        assert capsys.readouterr().err.count("\n") == 1


def test_json_that_is_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        read_json(tmp_path / "config.json")
