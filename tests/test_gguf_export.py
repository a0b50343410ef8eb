"""GGUF files that are written: read here again, and by llama.cpp itself.

`pip install xllamacpp && pytest -m slow -n 0 tests/test_gguf_export.py` runs them in llama.cpp.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from conftest import GPT2_LIKE, ROOT, make_config, without_zeros
from test_convert_doors import logits
from test_convert_files import CONFIG, llama_tensors, write_model

pytest.importorskip("gguf", reason="pip install -e '.[hf]'")

from gptjax.checkpoint import Checkpoints
from gptjax.config import CheckpointConfig, plain_values
from gptjax.convert import load, open_model
from gptjax.convert.gguf_export import _cut_of, _vocabulary, export_gguf
from gptjax.errors import UserError
from gptjax.nn.transformer import init_params
from gptjax.sampling import Sampling
from gptjax.tokenizers import ByteTokenizer, CharTokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXTS = ["the king and queen", "It's 1234 <|endoftext|>, é€ 日本\n\n  that is", ""]


def huggingface_model(folder: Path, hf_directory: Path, kind: str = "llama") -> Path:
    """A model of two layers with a tokenizer and a template, in one of the forms that GGUF has."""
    tensors, more = llama_tensors(), {"model_type": kind, "tie_word_embeddings": kind == "qwen2"}
    random = np.random.default_rng(1)
    for i in range(2):
        attention = f"model.layers.{i}.self_attn"
        if kind == "qwen2":
            for name, n in (("q", 64), ("k", 32), ("v", 32)):
                tensors[f"{attention}.{name}_proj.bias"] = random.normal(0, 0.2, n).astype(np.float32)
        if kind == "qwen3":
            more["head_dim"] = 16
            for name in ("q_norm", "k_norm"):
                tensors[f"{attention}.{name}.weight"] = 1 + random.normal(0, 0.2, 16).astype(np.float32)
    if kind == "qwen2":
        del tensors["lm_head.weight"]
    if kind == "llama":
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        more["rope_scaling"] = scaling | {"original_max_position_embeddings": 8192}
    write_model(folder, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    for file in hf_directory.iterdir():
        shutil.copy(file, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


@pytest.mark.parametrize(("kind", "type"), [("llama", "f16"), ("llama", "q8_0"), ("qwen2", "f16"), ("qwen3", "q8_0")])
def test_a_written_file_is_the_same_model_when_it_is_read_again(kind, type, tmp_path, hf_directory):
    folder, file = huggingface_model(tmp_path / "hf", hf_directory, kind), tmp_path / "new" / "model.gguf"
    export_gguf(str(folder), str(file), type)
    given, found = logits(folder), logits(file)
    assert np.abs(found - given).max() < np.abs(given).max() / {"f16": 200, "q8_0": 30}[type]
    ours, theirs = (open_model(str(path)).tokenizer for path in (folder, file))
    for text in TEXTS:
        assert ours.encode_prompt(text).tolist() == theirs.encode_prompt(text).tolist()
    assert (ours.eos_ids, ours.chat_template) == (theirs.eos_ids, theirs.chat_template)
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]


def test_the_rules_that_cut_text_are_found():
    split = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    split += "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    for pattern, ignore, name in ((split, True, "llama-bpe"), (split.replace("{1,3}", ""), False, "qwen2")):
        made = tokenizers.Tokenizer(
            tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], ignore_merges=ignore)
        )
        words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, as_bytes])
        assert _cut_of(made.to_str()) == name
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert _cut_of(made.to_str()) == "gpt-2"
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="no rules that cut"):
        _cut_of(made.to_str())


def run_with(tokenizer, folder: Path) -> Path:
    """A run's checkpoint of a small GPT-2 with large weights."""
    cfg = make_config({**GPT2_LIKE, "vocab_size": tokenizer.vocab_size, "d_model": 64, "context_length": 64})
    params = jax.tree.map(lambda x: 4 * x, without_zeros(init_params(cfg.model, jax.random.key(0))))
    checkpoints = Checkpoints(str(folder), CheckpointConfig())
    meta = {"config": plain_values(cfg), "tokenizer": tokenizer.to_dict(), "corpus": None, "val/loss": None}
    checkpoints.save(0, params, None, meta, None)
    checkpoints.close()
    return folder


def test_what_llama_cpp_lacks_is_one_line():
    with pytest.raises(UserError, match="no tokenizer of this kind"):
        _vocabulary(CharTokenizer("abc"), 3)


LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_predict, params.warmup = sys.argv[1], 64, 50, False
server = xllamacpp.Server(params)
print(json.dumps(server.handle_completions({"prompt": sys.argv[2], "max_tokens": 40, "temperature": 0.0})))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3"])
def test_llama_cpp_writes_the_same_text(kind, tmp_path, hf_directory):
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    if kind == "gpt2":
        model = run_with(ByteTokenizer(), tmp_path / "run")
    else:
        model = huggingface_model(tmp_path / "hf", hf_directory, kind)
    export_gguf(str(model), str(tmp_path / "model.gguf"))
    command = [sys.executable, "-c", LLAMA_CPP, str(tmp_path / "model.gguf"), "the king"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    theirs = answer["choices"][0]["text"] if "choices" in answer else answer["content"]
    ours = load(str(model)).complete(["the king"], 40, Sampling(0.0))[0].text
    assert theirs.rstrip("\ufffd") and ours.startswith(theirs.rstrip("\ufffd")[:20]), (ours, theirs)
