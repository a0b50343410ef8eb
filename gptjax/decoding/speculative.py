"""Speculative decoding: a cheap draft proposes tokens, and the model reads them all in one step.

    decoder = SpeculativeDecoder(lm, NgramDraft())
    completions = decoder.complete(prompts, 100, Sampling(0.8), seed=7)

At every place the model draws its own token, by the key that it would have without a draft, and the proposals count
as far as they equal these. So the text is the one that `LanguageModel.complete` returns, whatever the draft is (but
for tokens whose order the last bit of a sum decides), and the distribution is the model's own. A draft that is a
model draws by the same keys, so that it often draws the same token (Daliri, Musco and Suresh 2024, arXiv 2408.07978).
Of proposals without a distribution, such as those of n-grams, as many are accepted as by the rule of Leviathan et al.
2023 (arXiv 2211.17192).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.decoding.prompts import PromptReader
from gptjax.engine import UNUSED, Engine
from gptjax.errors import UserError
from gptjax.generate import Completion, LanguageModel, row_keys
from gptjax.nn.attention import CacheSlots
from gptjax.nn.layers import Cache
from gptjax.nn.transformer import Inputs, logits
from gptjax.sampling import RowSampling, Sampling, as_rows
from gptjax.tokenizers import same_ids, text_after

N_PROPOSED = 4  # tokens that a draft proposes at a time


class Draft(Protocol):
    """What proposes the next tokens of a text."""

    def begin(self, ids: Sequence[int]) -> None:
        """Begin a text."""

    def propose(self, new: Sequence[int], n: int, key: np.ndarray, drawn: int, sampling: RowSampling) -> list[int]:
        """Return at most n tokens that may follow.

        Args:
            new: the text's tokens since the last call, or since `begin`.
            n: the most tokens to propose, at least 1.
            key: [2] uint32, by which the model draws.
            drawn: how many tokens the model has drawn.
            sampling: how it draws, arrays [1].
        """


class NgramDraft:
    """Proposes what followed the latest place in the text that ends in the same tokens (prompt lookup).

    Args:
        longest, shortest: how many tokens must be the same; the longest match counts.
    """

    def __init__(self, longest: int = 8, shortest: int = 3):
        self._lengths = range(longest, shortest - 1, -1)

    def begin(self, ids: Sequence[int]) -> None:
        """Begin a text."""
        self._ids: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # tokens -> the place after the latest time that they came
        self._add(ids)

    def _add(self, ids: Sequence[int]) -> None:
        for id in ids:
            for length in self._lengths:
                if length <= len(self._ids):
                    self._followed[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(id)

    def propose(self, new: Sequence[int], n: int, key: np.ndarray, drawn: int, sampling: RowSampling) -> list[int]:
        """Return at most n tokens that may follow (see `Draft`)."""
        self._add(new)
        for length in self._lengths:
            place = self._followed.get(tuple(self._ids[-length:]))
            if place is not None and length <= len(self._ids):
                return self._ids[place : place + n]
        return []


class ModelDraft:
    """Proposes what a smaller model with the same tokens draws by the same keys.

    Raises:
        UserError: its context is too short for a few proposals.
    """

    def __init__(self, lm: LanguageModel):
        if lm.config.context_length < 4 * N_PROPOSED:
            said = f"the draft's context of {lm.config.context_length} tokens is too short"
            raise UserError(f"{said}; give a draft with a context of at least {4 * N_PROPOSED}")
        self.lm = lm
        self._reader = PromptReader(lm.engine, lm.config.context_length + N_PROPOSED + 1)
        self._propose = jax.jit(self._read_and_draw, donate_argnums=1)

    def begin(self, ids: Sequence[int]) -> None:
        """Begin a text of at least one token, of which it reads what fits its context."""
        self._ids = list(ids[-self.lm.config.context_length :])
        self._cache, self._read = _read_whole(self._reader, self._ids)[0], len(self._ids)

    def propose(self, new: Sequence[int], n: int, key: np.ndarray, drawn: int, sampling: RowSampling) -> list[int]:
        """Return at most n tokens that may follow (see `Draft`)."""
        T = self.lm.config.context_length
        self._ids += new
        if len(self._ids) + N_PROPOSED > T:  # as in `LanguageModel.stream`, the older half is forgotten
            new = self._ids[-1:]
            self.begin(self._ids[-((T + 1) // 2) : -1])
            self._ids += new
        start, length = np.int32(self._read), np.int32(len(new))
        with self.lm.engine.on_mesh():
            self._cache, proposed = self._propose(
                self.lm.engine.params, self._cache, _padded(new), start, length, key, np.int32(drawn), sampling
            )
        self._read += len(new)
        return np.asarray(proposed).tolist()[:n]

    def _read_and_draw(self, params, cache: list[Cache], tokens, start, length, key, drawn, sampling: RowSampling):
        """Read `length` of the tokens [1, W] from slot `start`, and draw N_PROPOSED tokens, [N_PROPOSED] int32."""
        engine = self.lm.engine
        model, x, cache = _run_from(engine, params, cache, tokens, start, length)
        recent = [layer.recent for layer in cache]
        last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)

        def draw_one(i, carry):
            raw, cache, drawn_ids = carry
            token, _ = engine.draw_rows(raw, key[None], (drawn + i)[None], sampling)
            model, x, cache = _run_from(engine, params, cache, token[:, None], start + length + i, 1)
            return engine.next_logits(model, x), cache, drawn_ids.at[i].set(token[0])

        begun = engine.next_logits(model, last), cache, jnp.zeros(N_PROPOSED, jnp.int32)
        _, cache, proposed = jax.lax.fori_loop(0, N_PROPOSED, draw_one, begun)
        return [Cache(layer.kv, old) for layer, old in zip(cache, recent, strict=True)], proposed


class SpeculativeDecoder:
    """Generates texts one after another by a model and a draft.

    Args:
        lm: the model.
        draft: proposes tokens.

    Raises:
        UserError: the draft is a model whose ids stand for other texts.

    Attributes:
        steps: how often the model was run after the prompts were read.
        drawn: how many tokens came of that.
    """

    def __init__(self, lm: LanguageModel, draft: Draft):
        if isinstance(draft, ModelDraft) and not same_ids(lm.tokenizer, draft.lm.tokenizer):
            raise UserError(
                "the draft's tokenizer differs from the model's; give a draft that was trained with the same"
            )
        self._lm, self._draft = lm, draft
        self._reader = PromptReader(lm.engine, lm.config.context_length + N_PROPOSED + 1)
        self._verify = jax.jit(self._read_and_compare, donate_argnums=1)
        self._first = jax.jit(lambda raw, key, drawn, sampling: self._draw(raw, key, drawn[None], sampling))
        self.steps = self.drawn = 0

    def complete(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int = 0
    ) -> list[Completion]:
        """Return one continuation for each prompt, as `LanguageModel.complete` does."""
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens {max_new_tokens} must not be negative")
        keys, how = row_keys(seed, len(prompts)), as_rows([sampling.check()])
        completions = []
        for prompt, key in zip(prompts, keys, strict=True):
            before = self._lm.prompt_ids(prompt)
            ids, logprobs = self._continue(before, max_new_tokens, key, how)
            completions.append(Completion(prompt, ids, text_after(self._lm.tokenizer, before, ids), logprobs))
        return completions

    def _continue(self, before: list[int], most: int, key: np.ndarray, how: RowSampling) -> tuple[list, list]:
        """Draw at most `most` tokens: ids without the end token, and their log-probabilities.

        As in `LanguageModel.stream`, a text that exceeds the context loses its older half.
        """
        T, ends = self._lm.config.context_length, self._lm.tokenizer.eos_ids
        ids: list[int] = []
        logprobs: list[float] = []
        window = before[-T:]
        while len(ids) < most:
            cache, raw = _read_whole(self._reader, window)
            cache, read = [_with_room(layer) for layer in cache], len(window)
            self._draft.begin(window)
            with self._lm.engine.on_mesh():
                new, values = map(np.asarray, self._first(raw, key, np.int32(len(ids)), how))
            while True:
                new, values = new[: most - len(ids)].tolist(), values.tolist()
                if found := [i for i, id in enumerate(new) if id in ends]:
                    return ids + new[: found[0]], logprobs + values[: found[0]]
                ids, logprobs, window = ids + new, logprobs + values[: len(new)], window + new
                n = min(N_PROPOSED, most - len(ids) - 1, T - len(window))
                if len(ids) == most or len(window) > T:
                    break
                proposed = self._draft.propose(new, n, key, len(ids), how) if n > 0 else []
                cache, new, values = self._step(cache, read, [window[-1], *proposed], key, len(ids), how)
                read += len(new)
            window = window[-((T + 1) // 2) :]
        return ids, logprobs

    def _step(self, cache, read: int, ids: list[int], key, drawn: int, how: RowSampling):
        """Read the last token and the proposals after it; return the cache, tokens drawn, and log-probabilities."""
        tokens = _padded(ids) if len(ids) > 1 else np.array([ids], np.int32)
        with self._lm.engine.on_mesh():
            cache, picked, logprobs, count = self._verify(
                self._lm.engine.params, cache, tokens, np.int32(read), np.int32(len(ids)), key, np.int32(drawn), how
            )
        count = int(count)
        self.steps, self.drawn = self.steps + 1, self.drawn + count
        return cache, np.asarray(picked)[:count], np.asarray(logprobs)[:count]

    def _read_and_compare(self, params, cache: list[Cache], tokens, start, length, key, drawn, how: RowSampling):
        """Read `length` of the tokens [1, W], draw a token after each, and count those that stand."""
        W = tokens.shape[1]
        model, x, cache = _run_from(self._lm.engine, params, cache, tokens, start, length)
        picked, logprobs = self._draw(logits(model, model.readout(x))[0], key, drawn + jnp.arange(W), how)
        equal = (picked[:-1] == tokens[0, 1:]) & (jnp.arange(1, W) < length)
        count = 1 + jnp.cumprod(equal).sum()
        undone = length - count
        cache = [
            Cache(layer.kv, jax.tree.map(lambda inputs: jnp.roll(inputs, undone, axis=1), layer.recent))
            for layer in cache
        ]
        return cache, picked, logprobs, count

    def _draw(self, raw: jax.Array, key: jax.Array, counts: jax.Array, how: RowSampling):
        """Draw a token of each row of logits [N, V]: ids [N] int32, and their log-probabilities."""
        N = len(raw)
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (N, *x.shape[1:])), how)
        return self._lm.engine.draw_rows(raw, jnp.broadcast_to(key, (N, 2)), counts, rows)


def _run_from(engine: Engine, params, cache: list[Cache], tokens: jax.Array, start, length):
    """Run a model over `length` of the tokens [1, W], whose first has the position and the slot `start`."""
    W, S = tokens.shape[1], cache[0].kv[0].shape[2]
    counted = jnp.arange(W, dtype=jnp.int32)[None]
    positions = jnp.where(counted < length, start + counted, -1)
    slot = jnp.arange(S, dtype=jnp.int32)[None]
    slots = CacheSlots(jnp.where(slot < start + length, slot, UNUSED), start)
    return engine.run(params, Inputs(tokens, positions, slots=slots), cache)


def _read_whole(reader: PromptReader, ids: Sequence[int]) -> tuple[list[Cache], jax.Array]:
    """Return the cache of a text, and the logits [1, V] of the next token."""
    reading = reader.begin(ids)
    while not reading.done:
        reader.advance(reading)
    prefix = reading.take_prefix()
    return prefix.cache, prefix.logits


def _with_room(layer: Cache) -> Cache:
    """Keep enough of a convolution's inputs that those of rejected proposals can be taken back."""

    def pad(inputs: Any) -> Any:
        return jnp.pad(inputs, ((0, 0), (N_PROPOSED, 0), (0, 0)))

    return Cache(layer.kv, jax.tree.map(pad, layer.recent))


def _padded(ids: Sequence[int]) -> np.ndarray:
    """Return the ids as tokens [1, N_PROPOSED + 1]."""
    tokens = np.zeros((1, N_PROPOSED + 1), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens
