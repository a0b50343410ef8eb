"""Texts of a form: stop strings, numbers of lines and regular expressions, with the draws of the model alone."""

import re

import pytest
from serving import tiny_model

from gptjax.cli import sample
from gptjax.decoding.forms import Form, FormDecoder
from gptjax.errors import UserError
from gptjax.sampling import Sampling
from gptjax.tokenizers import make_tokenizer

PROMPTS = ["abc abc abd", "h", ""]
HOW = Sampling(1.0)


@pytest.fixture(scope="module")
def lm():
    return tiny_model(make_tokenizer("char", ["abcdefgh \n"]), n_layers=1, context_length=32)


@pytest.fixture(scope="module")
def free(lm):
    """What the model says by itself, beyond its context of 32."""
    return [found.text for found in lm.complete(PROMPTS, 60, HOW, seed=3)]


@pytest.mark.whole
def test_a_stop_string_cuts_what_the_model_says_by_itself(lm, free):
    stop = free[0][40:42]
    found = FormDecoder(lm, Form(stop=stop)).complete(PROMPTS, 60, HOW, seed=3)
    assert [one.text for one in found] == [text.partition(stop)[0] for text in free]
    assert all(len(one.tokens) <= len(one.text) + 1 for one in found)


@pytest.mark.parametrize("n", [1, 3])
def test_lines_are_counted(lm, free, n):
    found = FormDecoder(lm, Form(max_lines=n)).complete(PROMPTS, 60, HOW, seed=3)
    assert [one.text for one in found] == ["\n".join(text.split("\n")[:n]) for text in free]
    both = FormDecoder(lm, Form(stop="\n\n", max_lines=n)).complete(PROMPTS, 60, HOW, seed=3)
    assert [one.text for one in both] == ["\n".join(t.partition("\n\n")[0].split("\n")[:n]) for t in free]


def test_texts_match_a_regular_expression(lm):
    pytest.importorskip("llguidance", reason="pip install -e '.[serve]'")
    pattern = r"([a-d]{2} ){14}h(\n[e-g]+h)?"  # beyond the context too
    decoder = FormDecoder(lm, Form(regex=pattern))
    texts = [one.text for one in decoder.complete(PROMPTS, 60, HOW, seed=3)]
    assert all(re.fullmatch(pattern, text) for text in texts) and len(set(texts)) == 3
    assert decoder.incomplete == 0
    decoder.complete(PROMPTS, 9, HOW)
    assert decoder.incomplete == 3
    free = FormDecoder(lm, Form(regex=r"(?s:.)*")).complete(PROMPTS, 20, HOW, seed=3)
    assert [one.text for one in free] == [one.text for one in lm.complete(PROMPTS, 20, HOW, seed=3)]


@pytest.mark.parametrize(
    ("form", "said"), [(Form(stop=""), "empty"), (Form(max_lines=0), "at least 1"), (Form(regex="(a"), "regular")]
)
def test_a_form_out_of_range_is_one_line(lm, form, said):
    if form.regex:
        pytest.importorskip("llguidance", reason="pip install -e '.[serve]'")
    with pytest.raises(UserError, match=said):
        FormDecoder(lm, form)


@pytest.mark.parametrize("other", [["--beams", "2"], ["--draft", "ngram"]])
def test_a_form_beside_beams_or_a_draft_is_refused_before_the_model_is_read(capsys, other):
    with pytest.raises(SystemExit, match="2"):
        sample(["nowhere", "--max_lines", "2", *other])
    assert "leave it out" in capsys.readouterr().err
