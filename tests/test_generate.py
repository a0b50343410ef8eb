"""Generation: the cache against the full forward, the cuts against transformers, and what a user sees."""

import itertools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, run_script, trainable_on, without_zeros

import gptjax
from gptjax.config import ModelConfig
from gptjax.engine import Engine, Request, _write_in_circle
from gptjax.errors import UserError
from gptjax.generate import LanguageModel, row_keys
from gptjax.lifecycle.closing import LiveSampler
from gptjax.nn.transformer import Params, abstract_model, init_params
from gptjax.sampling import N_BEST, Sampling, as_rows, draw, filter_logits
from gptjax.sharding import make_mesh, sharding
from gptjax.step import init_state
from gptjax.tokenizers import CharTokenizer

ALPHABET = "\n" + "".join(chr(c) for c in range(48, 48 + 60))


def model_parts(model: dict, **more) -> tuple[ModelConfig, Params, CharTokenizer]:
    cfg = make_config({**model, **more, "init": "gpt2"}).model
    params = jax.tree.map(lambda x: 5 * x, without_zeros(init_params(cfg, jax.random.key(0))))  # far from uniform
    return cfg, params, CharTokenizer(ALPHABET)


@pytest.fixture(scope="module", params=[GPT2_LIKE, MODERN], ids=["gpt2", "modern"])
def parts(request) -> tuple[ModelConfig, Params, CharTokenizer]:
    return model_parts(request.param)


@pytest.fixture(scope="module")
def lm(parts) -> LanguageModel:
    return LanguageModel(*parts)


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
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_is_written_where_the_cache_lies(lm, rows):
    engine = lm.engine
    state = engine.init_state(rows, 16)
    B, G, S, K = state.cache[0].kv[0].shape
    assert (rows, 16) == (B, S)
    program = engine._step.lower(engine.params, state, np.int32(4)).compile().as_text()
    for shape in (f"{B * G},{S},{K}", f"{B},{G},{S},{K}"):
        assert not re.findall(rf"= f32\[{shape}\]\S* copy\(.*", program)
    assert f"f32[{B * G},{S},{K}]" in program


def test_one_program_draws_any_number_of_tokens_by_any_sampling(parts):
    fresh = LanguageModel(*parts)
    drawn = {n: fresh.complete(["ABC"], n, Sampling(temperature=0))[0].tokens for n in range(9, 14)}
    assert all(drawn[13][:n] == tokens and len(tokens) == n for n, tokens in drawn.items())
    for sampling in (Sampling(0.5), Sampling(1, 5), Sampling(1, None, 0.5, 0.1)):
        fresh.complete(["ABC"], 9, sampling)
    assert fresh.engine._step._cache_size() == 1


def test_a_prompt_and_its_continuation_may_fill_the_context(lm):
    T = lm.config.context_length
    found = lm.complete(["A" * (T - 3)], 4, Sampling(temperature=0))[0]
    assert found.tokens == greedy_by_full_forward(lm, "A" * (T - 3), 4)[0]


def test_layers_with_windows_decode_as_the_full_forward():
    attention = {"window": 5, "pattern": ["local", "global"], "softcap": 20.0, "sinks": True}
    positions = {"kind": "rope", "rotated_frac": 0.5, "local_theta": 100.0}
    lm = LanguageModel(*model_parts({**GPT2_LIKE, "attention": attention, "positions": positions}))
    for completion in lm.complete(["A", "BCDEFGH"], 9, Sampling(temperature=0)):
        tokens, logprobs = greedy_by_full_forward(lm, completion.prompt, 9)
        assert completion.tokens == tokens
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=2e-5)


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


@pytest.mark.slow
def test_eight_devices_give_the_text_of_one(lm, parts):
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    metadata = abstract_model(lm.config)[2]
    spread = jax.tree.map_with_path(
        lambda path, x: jax.device_put(x, sharding(mesh, metadata[tuple(k.key for k in path)]["axes"])),
        parts[1],
    )
    sharded = LanguageModel(lm.config, spread, lm.tokenizer, mesh)
    matrices = [leaf for leaf in jax.tree.leaves(sharded.engine.params) if leaf.size > 1000]
    assert all(leaf.addressable_shards[0].data.size <= leaf.size / 2 for leaf in matrices)
    for prompts in (["ABC", "DE"], ["A", "BC", "D" * 9, "EF"]):  # the mesh divides the second batch
        one, eight = (m.complete(prompts, 45, Sampling(), seed=1) for m in (lm, sharded))
        assert [c.text for c in eight] == [c.text for c in one]
    ids = np.arange(24).reshape(3, 8)
    np.testing.assert_allclose(sharded.logits(ids), lm.logits(ids), atol=1e-4)


@pytest.mark.whole
def test_a_run_samples_its_weights_where_they_lie_and_compiles_once():
    """Weights that fit no single device are sampled too; an evaluation's sample does not compile anew."""
    t = trainable_on(make_config(GPT2_LIKE), 8, fsdp=4, tensor=2)
    tokenizer = CharTokenizer(ALPHABET)
    state, sampler = init_state(t), LiveSampler(t, SimpleNamespace(tokenizer=tokenizer))
    other = state._replace(params=jax.tree.map(lambda x: x * 1.5, state.params))
    texts = [sampler.text(weights, 40) for weights in (state, other)]
    assert texts[0] != texts[1]
    assert sampler.model.engine._step._cache_size() == sampler.model.engine._start._cache_size() == 1
    for weights, text in zip((state, other), texts, strict=True):
        here = jax.device_put(weights.params, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        alone = LanguageModel(t.cfg.model, here, tokenizer)
        assert alone.complete([""], 40, Sampling(0.8), seed=t.cfg.seed)[0].text == text


class WithEnd(CharTokenizer):
    """The first character of the alphabet ends a document."""

    eos_id = 0
    eos_ids = (0,)


class WithTwoEnds(WithEnd):
    eos_ids = (0, 7)


def near_uniform(tokenizer: CharTokenizer) -> LanguageModel:
    """A model that draws every token now and then."""
    config, params, _ = model_parts(GPT2_LIKE, tie_embeddings=False)
    return LanguageModel(config, dict(params, head=params["head"] * 0.1), tokenizer)


@pytest.mark.parametrize("kind", [WithEnd, WithTwoEnds])
def test_generation_stops_at_every_end_of_text(kind):
    lm, plain = (near_uniform(tokenizer) for tokenizer in (kind(ALPHABET), CharTokenizer(ALPHABET)))
    stopped = lm.complete(["A"] * 9, 29, Sampling(), seed=0)
    free = plain.complete(["A"] * 9, 29, Sampling(), seed=0)
    assert all(any(end in c.tokens for c in free) for end in kind.eos_ids)
    for a, b in zip(stopped, free, strict=True):
        assert a.tokens == list(itertools.takewhile(lambda id: id not in kind.eos_ids, b.tokens))
        assert a.text == lm.tokenizer.decode(a.tokens)


def test_what_has_ended_does_not_have_its_batch_read_anew(monkeypatch):
    lm = near_uniform(WithEnd(ALPHABET))
    reads, prefill, T = [], Engine.prefill, lm.config.context_length

    def counted(self, prompts):
        reads.append([len(ids) for ids in prompts])
        return prefill(self, prompts)

    monkeypatch.setattr(Engine, "prefill", counted)
    for seed in range(100):
        reads.clear()
        first, second = lm.complete(["ABCDEFG", "A"], 2 * T, Sampling(), seed)
        if len(first.tokens) < T // 2 and len(second.tokens) == 2 * T:
            break
    assert reads == [[T // 2], [T // 2]]  # the second fills its context once, and then every half context
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
    rows = as_rows([Sampling(**values)] * 4)
    np.testing.assert_allclose(filter_logits(jnp.asarray(raw), rows), expected.numpy(), rtol=1e-6)


def test_each_row_is_cut_by_its_own_values():
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2 * N_BEST)).astype(np.float32) * 3)
    best = [Sampling(0), Sampling(0.7), Sampling(1, 5), Sampling(1, 9, 0.5), Sampling(2, N_BEST, None, 0.1)]
    every = [*best, Sampling(1, None, 0.8), Sampling(1.5, N_BEST + 9), Sampling(1, N_BEST + 9, 0.99, 0.01)]
    for mix in (best, every):
        found = filter_logits(raw[: len(mix)], as_rows(mix))
        for i, sampling in enumerate(mix):
            alone = filter_logits(raw[i : i + 1], as_rows([sampling]))[0]
            np.testing.assert_array_equal(found[i], alone)
            if sampling.top_k and not sampling.top_p and not sampling.min_p:
                assert np.isfinite(alone).sum() == sampling.top_k


@pytest.mark.parametrize("one_key", [False, True], ids=["a key a row", "one key, a row's tokens in turn"])
def test_draws_have_the_frequencies_of_the_softmax(one_key):
    raw, n = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), 40_000
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), n))
    counts = jnp.zeros(n, jnp.int32)
    if one_key:
        keys, counts = jnp.broadcast_to(keys[0], keys.shape), jnp.arange(n, dtype=jnp.int32)
    drawn = draw(jnp.broadcast_to(raw, (n, 4)), keys, counts, as_rows([Sampling()] * n))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / n, jnp.exp(raw[0]), atol=0.01)


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 2.0}], ids=str)
def test_values_out_of_range_are_named(lm, values):
    with pytest.raises(UserError, match=next(iter(values))):
        lm.complete(["A"], 1, Sampling(**values))


def alone(lm: LanguageModel, ids: list[int], request: Request) -> list[int]:
    """The tokens of a request in a batch of its own."""
    engine = lm.engine
    state = engine.insert(engine.init_state(1, 32), engine.prefill([ids]), [0], [request])
    return engine.step(state, request.max_new_tokens)[1][0].tolist()


def test_requests_join_a_running_batch_and_leave_it(lm):
    """Eight requests of any length and sampling pass through three rows; each draws what it draws alone."""
    rng, engine = np.random.default_rng(0), lm.engine
    how = [Sampling(0), Sampling(1.3), Sampling(1, 5), Sampling(1, None, 0.8)]
    prompts = [rng.integers(0, 61, n).tolist() for n in (1, 5, 11, 3, 8, 2, 17, 4)]
    requests = [
        Request(how[i % 4], key, max_new_tokens=int(rng.integers(3, 15)))
        for i, key in enumerate(row_keys(7, len(prompts)))
    ]
    programs = set()
    state, waiting, serving, found = engine.init_state(3, 32), list(range(8)), {}, {i: [] for i in range(8)}
    while waiting or serving:
        for row in set(range(3)) - set(serving):
            if waiting:
                serving[row] = i = waiting.pop(0)
                state = engine.insert(state, engine.prefill([prompts[i]]), [row], [requests[i]])
        state, tokens, _ = engine.step(state, int(rng.integers(1, 5)))
        programs.add(engine._step._cache_size())
        for row, i in list(serving.items()):
            found[i] += [token for token in tokens[row].tolist() if token >= 0]
            if len(found[i]) == requests[i].max_new_tokens:
                del serving[row]
    assert len(programs) == 1  # compiled at the first step, whatever joins later
    assert int(state.slots.next) > 0 and sum(map(len, found.values())) > 32  # the slots were used more than once
    for i, ids in enumerate(prompts):
        assert found[i] == alone(lm, ids, requests[i]), i


def test_a_row_stops_where_its_context_is_full_and_when_it_is_released(lm):
    T, engine = lm.config.context_length, lm.engine
    requests = [Request(Sampling(0), key, 100) for key in row_keys(0, 2)]
    state = engine.insert(engine.init_state(2, T), engine.prefill([[1] * (T - 3), [2]]), [0, 1], requests)
    state, tokens, _ = engine.step(state, 10)
    assert (tokens >= 0).sum(axis=1).tolist() == [4, 10]
    tokens = engine.step(engine.release(state, 1), 10)[1]
    assert (tokens < 0).all()


def test_ids_that_the_tokenizer_lacks_are_never_drawn(parts):
    config, params, _ = parts
    few = LanguageModel(config, params, CharTokenizer(ALPHABET[:11]))
    hot = few.complete(["1"] * 8, 40, Sampling(temperature=9))
    assert {id for c in hot for id in c.tokens} == set(range(11))
    assert max(few.complete(["1"], 20, Sampling(temperature=0))[0].tokens) < 11


@pytest.mark.parametrize("ids", [[[61]], [[0, -1]], [[2**40]], [[0.5]], [1, 2]], ids=str)
def test_ids_out_of_range_are_refused(lm, ids):
    with pytest.raises(UserError, match=r"ids lie in \[0, 61\)|logits takes integers"):
        lm.logits(ids)


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


@pytest.mark.whole
def test_sample_on_eight_devices_prints_the_text_of_one(trained):
    args = (trained, "--prompt", "The king", "--max_new_tokens", "60", "--num_samples", "2")
    one = run_script("sample.py", *args)
    eight = run_script("sample.py", *args, "--mesh", "fsdp=4,tensor=2", "--cpu_devices", "8")
    assert eight.returncode == 0, eight.stderr
    assert eight.stdout == one.stdout
    for mesh, named in {"fsdp=3": "3 equal parts", "rows=2": "'rows'", "fsdp": "fsdp=4,tensor=2"}.items():
        refused = run_script("sample.py", *args, "--mesh", mesh, "--cpu_devices", "3")
        assert (refused.returncode, named in refused.stderr) == (2, True), refused.stderr


def test_a_model_is_loaded_in_bfloat16(trained):
    full, half = gptjax.load(trained), gptjax.load(trained, dtype="bfloat16")
    assert half.config.dtype == "bfloat16"
    assert sum(x.nbytes for x in jax.tree.leaves(half.engine.params)) < 0.55 * sum(  # norms stay float32
        x.nbytes for x in jax.tree.leaves(full.engine.params)
    )
    ids = np.arange(20)[None]
    np.testing.assert_allclose(half.logits(ids), full.logits(ids), atol=0.1)
    with pytest.raises(UserError, match="float16"):
        gptjax.load(trained, dtype="float16")


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


@pytest.mark.parametrize("S", [10, 12, 3])
def test_a_prompt_lies_in_its_row_of_the_circle_and_zeros_elsewhere(S, monkeypatch):
    """Blocks that divide the circle and that do not, prompts that wrap around its end, of every length."""
    monkeypatch.setattr("gptjax.engine.INSERT_BLOCK", 4)
    rng = np.random.default_rng(0)
    write = jax.jit(_write_in_circle)
    old, prompt = rng.normal(size=(2, 2, S, 3)), rng.normal(size=(2, S + 2, 3))
    old[1] = np.nan  # of whoever had the row before
    for first in range(-S, S):
        for length in range(1, S + 1):
            expected = np.array(old)
            expected[1] = 0
            expected[1][:, (first + np.arange(length)) % S] = prompt[:, :length]
            np.testing.assert_allclose(write(old, prompt, 1, first, length), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_rows_draw_by_the_keys_of_jax(seed):
    key = jax.random.key(seed)
    expected = [jax.random.key_data(jax.random.fold_in(key, row)) for row in range(3)]
    np.testing.assert_array_equal(row_keys(seed, 3), np.stack(expected))
