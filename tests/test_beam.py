"""Beam search: sequences and scores of transformers' beam search on an exported model, and what a user sees."""

import json

import jax
import numpy as np
import pytest
from conftest import MODERN, make_config, without_zeros

import gptjax.convert
from gptjax import cli
from gptjax.decoding.beam import NEVER, BeamSearch
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.nn.transformer import init_params
from gptjax.sampling import Sampling
from gptjax.tokenizers import CharTokenizer

ALPHABET = "\n" + "".join(chr(c) for c in range(48, 48 + 60))
ENDS = [3, 11, 17, 29, 41, 50]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A random GPT-2 in transformers, and the same weights here."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    ours = gptjax.load(folder)
    ours.engine.end_ids = np.array(ENDS, np.int32)
    return theirs, ours


@pytest.mark.parametrize(("beams", "length_penalty"), [(4, 1.0), (3, 0.0), (4, 2.0), (1, 1.0)])
def test_sequences_and_scores_are_those_of_transformers(exported, beams, length_penalty):
    import torch

    theirs, ours = exported
    rng = np.random.default_rng(beams)
    prompts = [rng.integers(0, 61, n).tolist() for n in (3, 7, 5)]
    found = BeamSearch(ours, beams, length_penalty).search(prompts, 12)
    kinds = set()
    for row, prompt in enumerate(prompts):
        wanted = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            num_beams=beams,
            max_new_tokens=12,
            length_penalty=length_penalty,
            num_return_sequences=beams,
            do_sample=False,
            eos_token_id=ENDS,
            pad_token_id=60,
            return_dict_in_generate=True,
            output_scores=True,
        )
        if beams == 1:  # transformers gives greedy search no scores
            n = int(found.lengths[row, 0])
            assert found.tokens[row, 0, :n].tolist() == wanted.sequences[0, len(prompt) :][:n].tolist()
            continue
        np.testing.assert_allclose(found.scores[row], wanted.sequences_scores.numpy(), atol=1e-4)
        for beam, sequence in enumerate(wanted.sequences[:, len(prompt) :].tolist()):
            n = int(found.lengths[row, beam])
            assert found.tokens[row, beam, :n].tolist() == sequence[:n]
            assert all(id == 60 for id in sequence[n:])
            kinds.add(n < 12)
            total = float(found.logprobs[row, beam, :n].sum())
            assert total / n**length_penalty == pytest.approx(float(found.scores[row, beam]), abs=1e-4)
    assert length_penalty != 0 or True in kinds  # plain sums favour sequences that an end token made short
    assert length_penalty != 2 or False in kinds


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    cfg = make_config({**MODERN, "init": "gpt2"}).model
    params = jax.tree.map(lambda x: 5 * x, without_zeros(init_params(cfg, jax.random.key(0))))
    return LanguageModel(cfg, params, CharTokenizer(ALPHABET))


@pytest.mark.whole
def test_one_beam_is_greedy_and_more_are_at_least_as_probable(lm):
    prompts = ["A", "BCDEF", "GHI"]
    greedy = lm.complete(prompts, 10, Sampling(0))
    one = BeamSearch(lm, 1).complete(prompts, 10)
    four = BeamSearch(lm, 4).complete(prompts, 10)
    for completion, (alone,), beams in zip(greedy, one, four, strict=True):
        assert alone.completion.tokens == completion.tokens
        np.testing.assert_allclose(alone.completion.logprobs, completion.logprobs, atol=1e-4)
        assert len({tuple(beam.completion.tokens) for beam in beams}) == 4
        ids = lm.tokenizer.encode(completion.prompt).tolist()
        for beam in beams:  # the cache after reordering, against the full forward
            whole = [*ids, *beam.completion.tokens]
            padded = whole + [0] * (lm.config.context_length - len(whole))  # one shape, one program
            log_p = jax.nn.log_softmax(lm.logits([padded])[0, len(ids) - 1 :])
            expected = [float(log_p[i, id]) for i, id in enumerate(beam.completion.tokens)]
            np.testing.assert_allclose(beam.completion.logprobs, expected, atol=1e-4)


def test_a_prompt_finds_the_same_beams_in_any_batch(lm):
    search = BeamSearch(lm, 3)
    alone = search.complete(["BCDEF"], 10)[0]
    together = search.complete(["A", "BCDEF", "GHI"], 10)[1]
    assert [b.completion.tokens for b in alone] == [b.completion.tokens for b in together]
    np.testing.assert_allclose([b.score for b in alone], [b.score for b in together], atol=1e-4)
    assert all(b.score > NEVER / 2 for b in alone)


def test_sample_prints_the_best_beams(lm, monkeypatch, capsys):
    monkeypatch.setattr(gptjax.convert, "load", lambda *args: lm)
    monkeypatch.setattr(cli, "prepare_process", lambda *args: None)
    cli.sample_from("M", prompt="BC", beams=3, num_samples=2, max_new_tokens=8, format="jsonl", logprobs=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    best = BeamSearch(lm, 3).complete(["BC"], 8)[0]
    assert [row["tokens"] for row in rows] == [beam.completion.tokens for beam in best[:2]]
    assert all(len(row["logprobs"]) == len(row["tokens"]) for row in rows)
    with pytest.raises(UserError, match="num_samples 4 exceeds beams 3"):
        cli.sample_from("M", prompt="BC", beams=3, num_samples=4)
    with pytest.raises(UserError, match="exceed the model's context of 32"):
        cli.sample_from("M", prompt="BC", beams=3, max_new_tokens=31)
