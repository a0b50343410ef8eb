"""Speculative decoding: the text and the distribution are the model's own, whatever the draft proposes."""

import itertools

import jax
import numpy as np
import pytest
from serving import tiny_model

from gptjax.cli import sample
from gptjax.decoding.speculative import ModelDraft, NgramDraft, SpeculativeDecoder
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.sampling import Sampling
from gptjax.tokenizers import make_tokenizer

LETTERS = "abcdefgh \n"
CONVOLUTION = {"conv_width": 3, "positions": {"kind": "rope"}}
PROMPTS = ["abc abc abd", "h"]


def model(seed: int = 0, **shape) -> LanguageModel:
    """A tiny model; with another seed, one that agrees with it in part."""
    lm = tiny_model(make_tokenizer("char", [LETTERS]), **{"n_layers": 1, "context_length": 32, **shape})
    if seed == 0:
        return lm
    rest, blocks = lm.params
    noise = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(rest)))
    leaves, structure = jax.tree.flatten(rest)
    leaves = [x + 0.3 * x.std() * jax.random.normal(k, x.shape) for x, k in zip(leaves, noise, strict=True)]
    lm.engine.params = jax.tree.unflatten(structure, leaves), blocks
    return lm


@pytest.mark.whole
def test_the_text_is_that_of_the_model_alone():
    """Beyond the context too, where the older half is forgotten; by drafts that agree always, in part, and seldom."""
    lm = model(**CONVOLUTION)
    drafts = {"itself": ModelDraft(lm), "other": ModelDraft(model(1)), "ngram": NgramDraft(3, 1)}
    decoder, rates = SpeculativeDecoder(lm, drafts["itself"]), {}
    for sampling in (Sampling(0.0), Sampling(0.7, top_k=5)):
        wanted = lm.complete(PROMPTS, 36, sampling, seed=5)
        for name, draft in drafts.items():
            decoder._draft, decoder.drawn, decoder.steps = draft, 0, 0
            found = decoder.complete(PROMPTS, 36, sampling, seed=5)
            assert [(c.tokens, c.text) for c in found] == [(c.tokens, c.text) for c in wanted]
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            rates[name, sampling.temperature] = decoder.drawn / decoder.steps
    assert rates["itself", 0] > 3 and rates["itself", 0.7] > 3 and min(rates.values()) > 1, rates


@pytest.mark.whole
def test_pairs_of_tokens_have_the_models_probabilities():
    """Pearson's chi-square test of 700 draws of two tokens, of a fixed seed, against the exact probabilities."""
    lm, n = model(), 700
    decoder = SpeculativeDecoder(lm, ModelDraft(model(1)))
    ids = lm.prompt_ids("abc")
    V = lm.tokenizer.vocab_size
    counts = np.zeros((V, V))
    for done in decoder.complete(["abc"] * n, 3, Sampling(1.0), seed=11):
        counts[tuple(done.tokens[1:])] += 1
    log_p = np.asarray(
        jax.nn.log_softmax(lm.logits([[*ids, *pair] for pair in itertools.product(range(V), repeat=2)]))
    )
    p = np.exp(log_p).reshape(V, V, len(ids) + 2, -1)[..., :V]  # by the first two tokens drawn
    first, second, third = p[0, 0, len(ids) - 1], p[:, 0, len(ids)], p[:, :, len(ids) + 1]
    expected = n * np.einsum("a,ab,abc->bc", first, second, third)
    assert decoder.drawn > 1.2 * decoder.steps  # proposals were taken
    rare = expected < 5
    statistic = ((counts - expected)[~rare] ** 2 / expected[~rare]).sum()
    statistic += (counts[rare].sum() - expected[rare].sum()) ** 2 / max(expected[rare].sum(), 1)
    df = (~rare).sum()
    assert df > 10 and statistic < df + 4 * np.sqrt(2 * df), (statistic, df)


def test_a_text_ends_at_its_end_token_and_at_its_length():
    lm = model()
    whole = lm.complete(["abc"], 20, Sampling(0.9), seed=3)[0]
    decoder = SpeculativeDecoder(lm, ModelDraft(lm))
    for n in (0, 1, 5, 7):
        assert decoder.complete(["abc"], n, Sampling(0.9), seed=3)[0].tokens == whole.tokens[:n]
    lm.tokenizer.__class__ = type("Ends", (type(lm.tokenizer),), {"eos_ids": (whole.tokens[9],)})
    until = whole.tokens.index(whole.tokens[9])
    assert decoder.complete(["abc"], 20, Sampling(0.9), seed=3)[0].tokens == whole.tokens[:until]


def test_a_draft_of_other_tokens_is_refused():
    other = tiny_model(make_tokenizer("char", [LETTERS[::-1].upper()]), n_layers=1)
    with pytest.raises(UserError, match="tokenizer differs"):
        SpeculativeDecoder(model(), ModelDraft(other))


@pytest.mark.whole
@pytest.mark.parametrize("draft", ["ngram", "tests/old_run/run"])
def test_sample_with_a_draft_prints_the_same_text(draft, capsys):
    how = ["tests/old_run/run", "--prompt", "the king", "--max_new_tokens=20", "--num_samples=2"]
    printed = []
    for more in ([], ["--draft", draft]):
        assert sample([*how, *more]) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out and "tokens for each step" in printed[1].err
