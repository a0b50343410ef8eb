"""Generation: the cache against the full forward, the cuts against transformers, and what a user sees."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, run_script, without_zeros

from gptjax.errors import UserError
from gptjax.generate import LanguageModel, Sampling, draw, filter_logits
from gptjax.nn.backends import unstack
from gptjax.nn.transformer import abstract_model, init_params
from gptjax.sharding import make_mesh, sharding
from gptjax.tokenizers import CharTokenizer

ALPHABET = "\n" + "".join(chr(c) for c in range(48, 48 + 60))


def language_model(model: dict, **more) -> LanguageModel:
    cfg = make_config({**model, **more, "init": "gpt2"}).model
    params = jax.tree.map(lambda x: 5 * x, without_zeros(init_params(cfg, jax.random.key(0))))  # far from uniform
    return LanguageModel(cfg, params, CharTokenizer(ALPHABET))


@pytest.fixture(scope="module", params=[GPT2_LIKE, MODERN], ids=["gpt2", "modern"])
def stacked(request) -> LanguageModel:
    return language_model(request.param)


@pytest.fixture(scope="module")
def lm(stacked) -> LanguageModel:
    """With the layers apart, as `convert.load` gives them."""
    return LanguageModel(stacked.config, unstack(jax.tree.map(jnp.copy, stacked.params)), stacked.tokenizer)


def greedy_by_full_forward(lm: LanguageModel, prompt: str, n: int) -> tuple[list[int], list[float]]:
    ids, logprobs = lm.tokenizer.encode(prompt).tolist(), []
    for _ in range(n):
        padded = ids + [0] * (lm.config.context_length - len(ids))  # what comes later changes nothing
        last = lm.logits([padded])[0, len(ids) - 1]
        ids.append(int(jnp.argmax(last)))
        logprobs.append(float(jax.nn.log_softmax(last)[ids[-1]]))
    return ids[-n:], logprobs


def test_cached_decoding_equals_the_full_forward_with_prompts_of_any_length(lm):
    prompts = ["A", "BCDEF", "G" * 11]
    found = lm.complete(prompts, 15, Sampling(temperature=0))
    for completion in found:
        tokens, logprobs = greedy_by_full_forward(lm, completion.prompt, 15)
        assert completion.tokens == tokens
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_is_written_where_the_cache_lies(lm, rows):
    progress = lm._begin([[1] * 8] * rows, 8, np.zeros(rows, bool), 0)
    lowered = lm._decode.lower(lm.params, progress, jax.random.key(0), np.int32(4), Sampling(temperature=0))
    shape = ",".join(map(str, progress.cache[0].kv[0].shape))
    program = lowered.compile().as_text()
    assert f"f32[{shape}]" in program
    assert not re.findall(rf"= f32\[{shape}\]\S* copy\(.*", program)


def test_one_program_draws_any_number_of_tokens(stacked):
    fresh = LanguageModel(stacked.config, stacked.params, stacked.tokenizer)
    drawn = {n: fresh.complete(["ABC"], n, Sampling(temperature=0))[0].tokens for n in range(9, 16)}
    assert all(drawn[15][:n] == tokens and len(tokens) == n for n, tokens in drawn.items())
    assert fresh._decode._cache_size() == 1


def test_a_prompt_and_its_continuation_may_fill_the_context(lm):
    T = lm.config.context_length
    found = lm.complete(["A" * (T - 3)], 4, Sampling(temperature=0))[0]
    assert found.tokens == greedy_by_full_forward(lm, "A" * (T - 3), 4)[0]


def test_past_the_context_the_window_slides(lm):
    """The older half is forgotten: what follows is what a prompt of the newer half would give."""
    T = lm.config.context_length
    found = lm.complete(["ABC"], 2 * T, Sampling(temperature=0))[0]
    assert len(found.tokens) == 2 * T
    so_far = lm.tokenizer.encode("ABC").tolist() + found.tokens
    filled = T + 1  # the first window ends when the token after a full context is drawn
    window = lm.tokenizer.decode(so_far[filled - T // 2 : filled])
    again = lm.complete([window], T // 2, Sampling(temperature=0))[0]
    assert again.tokens == so_far[filled : filled + T // 2]


def test_a_prompt_longer_than_the_context_keeps_its_end(lm):
    T = lm.config.context_length
    long, end = lm.complete(["X" * 9 + "AB" * (T // 2), "AB" * (T // 2)], 1, Sampling(temperature=0))
    assert long.tokens == end.tokens


def test_a_row_draws_the_same_whatever_is_beside_it(lm):
    alone = lm.complete(["ABC"], 20, Sampling(), seed=3)[0]
    together = lm.complete(["ABC", "D", "EF"], 20, Sampling(), seed=3)
    assert together[0].tokens == alone.tokens
    assert len({tuple(c.tokens) for c in lm.complete(["ABC"] * 4, 20, Sampling(), seed=3)}) == 4
    assert lm.complete(["ABC"], 20, Sampling(), seed=4)[0].tokens != alone.tokens


def test_a_row_forgets_its_older_half_only_when_it_is_full_itself(lm):
    T = lm.config.context_length
    prompts = ["ABC", "AB" * (T // 2), "D" * (T - 3)]  # one as long as the context, one that comes there soon
    for prompt, beside in zip(prompts, lm.complete(prompts, 2 * T, Sampling(temperature=0)), strict=True):
        alone = lm.complete([prompt], 2 * T, Sampling(temperature=0))[0]
        assert beside.tokens == alone.tokens
        np.testing.assert_allclose(beside.logprobs, alone.logprobs, atol=1e-3)


def test_eight_devices_give_the_text_of_one(lm, stacked):
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "context": 2})
    metadata = abstract_model(lm.config)[2]
    spread = jax.tree.map_with_path(
        lambda path, x: jax.device_put(x, sharding(mesh, metadata[tuple(k.key for k in path)]["axes"])),
        stacked.params,
    )
    parts = LanguageModel(lm.config, spread, lm.tokenizer)
    one, eight = (m.complete(["ABC", "DE"], 20, Sampling(), seed=1) for m in (lm, parts))
    assert [c.text for c in eight] == [c.text for c in one]


class WithEnd(CharTokenizer):
    """The first character of the alphabet ends a document."""

    eos_id = 0
    eos_ids = (0,)


class WithTwoEnds(WithEnd):
    eos_ids = (0, 7)


@pytest.mark.parametrize("kind", [WithEnd, WithTwoEnds])
def test_generation_stops_at_every_end_of_text(kind):
    lm = language_model(GPT2_LIKE, tie_embeddings=False)
    ending = dict(lm.params, head=lm.params["head"] * 0.1)  # near uniform: "\n" comes up, now and then
    lm = LanguageModel(lm.config, ending, kind(ALPHABET))
    plain = LanguageModel(lm.config, ending, CharTokenizer(ALPHABET))
    stopped = lm.complete(["A"] * 9, 29, Sampling(), seed=0)
    free = plain.complete(["A"] * 9, 29, Sampling(), seed=0)
    assert all(any(end in c.tokens for c in free) for end in kind.eos_ids)
    for a, b in zip(stopped, free, strict=True):
        assert a.tokens == list(itertools.takewhile(lambda id: id not in kind.eos_ids, b.tokens))
        assert a.text == lm.tokenizer.decode(a.tokens)


def test_what_has_ended_does_not_have_its_batch_read_anew(monkeypatch):
    lm = language_model(GPT2_LIKE, tie_embeddings=False)
    lm = LanguageModel(lm.config, dict(lm.params, head=lm.params["head"] * 0.1), WithEnd(ALPHABET))
    reads, begin, T = [], LanguageModel._begin, lm.config.context_length

    def counted(self, *args):
        reads.append(args)
        return begin(self, *args)

    monkeypatch.setattr(LanguageModel, "_begin", counted)
    for seed in range(100):
        reads.clear()
        first, second = lm.complete(["ABCDEFG", "A"], 2 * T, Sampling(), seed)
        if len(first.tokens) < T // 2 and len(second.tokens) == 2 * T:
            break
    assert len(reads) == 1 + 3  # the second fills its context once, and then every half context
    assert (len(first.tokens) < T // 2, len(second.tokens)) == (True, 2 * T)


def test_streaming_gives_the_same_text(lm):
    pieces = list(lm.stream_text("ABC", 70, Sampling(), seed=2))
    assert len(pieces) > 2
    assert "".join(pieces) == lm.complete(["ABC"], 70, Sampling(), seed=2)[0].text


def test_generate_is_the_door_of_transformers_users(lm):
    texts = lm.generate(["ABC", "D"], max_new_tokens=5, temperature=1.0, num_return_sequences=2)
    assert [t[:1] for t in texts] == ["A", "A", "D", "D"]
    assert [len(t) for t in texts] == [8, 8, 6, 6]
    assert lm.generate("ABC", max_new_tokens=0, temperature=0) == ["ABC"]
    assert lm.generate("ABC", max_new_tokens=9) == lm.generate("ABC", max_new_tokens=9, temperature=0, seed=5)


@pytest.mark.parametrize(
    "values",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.5}],
    ids=str,
)
def test_cuts_equal_those_of_transformers(values):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
    torch = pytest.importorskip("torch")
    raw = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    expected = torch.from_numpy(raw)
    for name, value in values.items():
        expected = warpers[name](value)(None, expected)
    np.testing.assert_allclose(filter_logits(jnp.asarray(raw), Sampling(**values)), expected.numpy(), rtol=1e-6)


def test_draws_have_the_frequencies_of_the_softmax():
    raw = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 40_000)
    drawn = draw(jnp.broadcast_to(raw, (40_000, 4)), keys, Sampling())
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 40_000, jnp.exp(raw[0]), atol=0.01)


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2.0}], ids=str)
def test_values_out_of_range_are_named(lm, values):
    with pytest.raises(UserError, match=next(iter(values))):
        lm.complete(["A"], 1, Sampling(**values))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_file, token_cache) -> str:
    from conftest import TINY_RUN

    workdir = tmp_path_factory.mktemp("run") / "tiny"
    data = (f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}", f"--workdir={workdir}")
    result = run_script("train.py", *TINY_RUN, *data, "--train.total_steps=10")
    assert result.returncode == 0, result.stderr
    assert f"python sample.py {workdir}" in result.stdout
    return str(workdir)


def test_sample_prints_prompts_from_argument_file_and_standard_input(trained, tmp_path):
    text = run_script("sample.py", trained, "--prompt", "The king", "--max_new_tokens", "20", "--num_samples", "2")
    assert text.returncode == 0, text.stderr
    assert text.stdout.count("The king") == 2
    (tmp_path / "prompts.txt").write_text("love\nnight\n")
    args = ("--prompt_file", tmp_path / "prompts.txt", "--format", "jsonl", "--max_new_tokens", "40", "--logprobs")
    rows = [json.loads(line) for line in run_script("sample.py", trained, *args).stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["love", "night"]
    assert all(len(row["tokens"]) == len(row["logprobs"]) == len(row["text"]) == 40 for row in rows)
    assert all(max(row["logprobs"]) <= 0 for row in rows)
    past = run_script("sample.py", trained, "--max_new_tokens", "40")
    assert "sliding window" in past.stderr


def test_sample_refuses_what_it_cannot_use(trained, tmp_path):
    cases = {
        ("sample.py", trained, "--prompt", "Käse 7"): "'7'",
        ("sample.py", tmp_path / "nothing"): "no checkpoint",
        ("sample.py", trained, "--temperature", "-1"): "temperature -1",
        ("sample.py", trained, "--prompt_file", tmp_path / "none.txt"): "none.txt",
    }
    for command, named in cases.items():
        result = run_script(*command)
        assert result.returncode == 2, result.stderr
        assert named in result.stderr
        assert "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "nothing").exists()
