"""`gptjax inspect`: what it shows equals what the model computes, on the terminal, as JSON and as a page."""

import json

import jax
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, without_zeros

import gptjax.convert
from gptjax.apps.inspection import commands
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.inspection import Inspector
from gptjax.nn.transformer import init_params
from gptjax.tokenizers import CharTokenizer

ALPHABET = "\n" + "".join(chr(c) for c in range(48, 48 + 60))
PROMPT, OTHER = "ABCDEF", "ABXDEG"


def make_model(shape: dict) -> LanguageModel:
    cfg = make_config({**shape, "init": "gpt2"}).model
    params = jax.tree.map(lambda x: 5 * x, without_zeros(init_params(cfg, jax.random.key(0))))
    return LanguageModel(cfg, params, CharTokenizer(ALPHABET))


@pytest.fixture(scope="module", params=[GPT2_LIKE, MODERN], ids=["gpt2", "modern"])
def lm(request) -> LanguageModel:
    return make_model(request.param)


@pytest.fixture(scope="module")
def inspector(lm) -> Inspector:
    return Inspector(lm)


def ids_of(lm: LanguageModel, text: str) -> np.ndarray:
    return np.asarray(lm.tokenizer.encode(text), np.int32)


def test_attention_is_causal_and_sums_to_one_and_the_last_lens_is_the_models(lm, inspector):
    ids = ids_of(lm, PROMPT)
    trace = inspector.trace(ids)
    assert trace.attention.shape == (2, 4, 6, 6)
    np.testing.assert_allclose(trace.attention.sum(-1), 1, atol=1e-5)
    assert not np.triu(np.asarray(trace.attention), 1).any()
    np.testing.assert_allclose(trace.lens[-1], lm.logits(ids[None])[0], atol=1e-5)
    assert np.abs(trace.lens[0] - trace.lens[-1]).max() > 0.1


def test_attribution_is_the_slope_of_the_logit_along_the_input(lm, inspector):
    ids = ids_of(lm, PROMPT)
    found = inspector.attribute(ids, 7)
    x = inspector.trace(ids).hidden[0]
    where = np.ones((1, len(ids)), bool)

    def difference(scales: np.ndarray) -> float:
        return float(inspector._patched(inspector.params, ids, x * scales[:, None], x, where, 7, 0, layer=0)[0])

    foil = inspector.attribute(ids, 0)
    for token in (0, 4, 5):
        step = 1e-2 * np.eye(len(ids))[token].astype(np.float32)
        slope = (difference(1 + step) - difference(1 - step)) / 2e-2
        assert found[token] - foil[token] == pytest.approx(slope, abs=0.02 * max(1, abs(slope)))


def test_the_effect_of_a_full_patch_is_the_difference_of_the_two_runs(lm, inspector):
    clean, other = ids_of(lm, PROMPT), ids_of(lm, OTHER)
    found = inspector.patch(clean, other, 5, 9)
    differences = [lm.logits(ids[None])[0, -1] for ids in (clean, other)]
    expected = [float(d[5] - d[9]) for d in differences]
    assert found.full == pytest.approx(expected[0] - expected[1], abs=1e-4)
    assert (found.clean, found.other) == (pytest.approx(expected[0], abs=1e-4), pytest.approx(expected[1], abs=1e-4))
    assert found.effect.shape == (3, 6)
    np.testing.assert_allclose(found.effect[0, [0, 1, 3, 4]], 0, atol=1e-4)  # where the prompts are equal
    assert found.effect[-1, -1] == pytest.approx(found.full, abs=1e-4)  # the last state alone decides
    np.testing.assert_allclose(found.effect[-1, :-1], 0, atol=1e-4)
    assert np.abs(found.effect[1]).max() > 1e-3


@pytest.mark.whole
def test_the_command_writes_tables_json_and_a_page(monkeypatch, capsys, tmp_path):
    pytest.importorskip("jinja2", reason="pip install -e '.[report]'")
    lm = make_model(MODERN)
    monkeypatch.setattr(gptjax.convert, "load", lambda *args: lm)
    monkeypatch.setattr(commands, "prepare_process", lambda *args: None)
    commands.inspect("M", prompt=PROMPT, against=OTHER, json=True)
    found = json.loads(capsys.readouterr().out)
    log_p = jax.nn.log_softmax(lm.logits(ids_of(lm, PROMPT)[None])[0])
    third = found["tokens"][2]
    assert third["text"] == "C"
    assert third["probability"] == pytest.approx(float(np.exp(log_p[1, third["id"]])), rel=1e-4)
    assert third["rank"] == 1 + int((log_p[1] > log_p[1, third["id"]]).sum())
    assert found["next"][0]["id"] == int(log_p[-1].argmax())
    assert found["lens"][-1][-1]["text"] == found["next"][0]["text"]
    commands.inspect("M", prompt="A<B>" + PROMPT, html=str(tmp_path / "page.html"))
    text = capsys.readouterr().out
    assert "logit lens" in text
    page = (tmp_path / "page.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert "Logit lens" in page
    with pytest.raises(UserError, match="patching needs prompts of one length"):
        commands.inspect("M", prompt=PROMPT, against="AB")
    with pytest.raises(UserError, match="more than the context of 32"):
        commands.inspect("M", prompt="A" * 33)


def test_an_inspections_page_in_a_browser(browser, monkeypatch, capsys, tmp_path):
    pytest.importorskip("jinja2", reason="pip install -e '.[report]'")
    from browsing import check_in_browser

    monkeypatch.setattr(gptjax.convert, "load", lambda *args: make_model(MODERN))
    monkeypatch.setattr(commands, "prepare_process", lambda *args: None)
    commands.inspect("M", prompt=PROMPT, against=OTHER, html=str(tmp_path / "page.html"))
    assert "likeliest next tokens: " in capsys.readouterr().out
    check_in_browser(browser, tmp_path / "page.html")
