"""Beam search: the most probable continuations, several kept at every token.

The rule is that of `transformers` with early_stopping=False: a sequence's score is the sum of its log-probabilities
divided by length^length_penalty, its end token included, and a prompt is done when no running beam could improve on
the finished ones if it ended now. The beams of all prompts are rows of one batch with one cache, whose rows are
reordered after every token.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine import UNUSED, Prefix, power_of_two
from gptjax.errors import UserError
from gptjax.generate import Completion, LanguageModel
from gptjax.nn.attention import CacheSlots
from gptjax.nn.layers import Cache
from gptjax.nn.transformer import Inputs
from gptjax.tokenizers import text_after

NEVER = -1e9  # added to the score of what must not be chosen


class Beams(NamedTuple):
    """k sequences for each of N prompts, best first.

    Attributes:
        tokens: [N, k, M] int32.
        logprobs: [N, k, M] float32, of each token.
        scores: [N, k] float32; of running sequences the sum, of finished ones divided by length^length_penalty.
        lengths: [N, k] int32, tokens of each.
    """

    tokens: jax.Array
    logprobs: jax.Array
    scores: jax.Array
    lengths: jax.Array


class SearchState(NamedTuple):
    """A search after some tokens.

    Attributes:
        cache: of each layer, with N k rows.
        positions: [N k, S] int32, what the slots hold.
        logits: [N k, V] float32, of each running beam's next token.
        running, finished: the sequences so far. A finished one of score NEVER is none.
        open: [N] bool, whether a running beam can still improve on the finished ones.
        drawn: int32, tokens of each running beam.
        ended: bool, whether no candidate of an open prompt can be continued.
    """

    cache: list[Cache]
    positions: jax.Array
    logits: jax.Array
    running: Beams
    finished: Beams
    open: jax.Array
    drawn: jax.Array
    ended: jax.Array


class Beam(NamedTuple):
    """A continuation with its score."""

    completion: Completion
    score: float


class BeamSearch:
    """Beam search with a model; its programs are compiled once for each shape of a batch.

    Args:
        lm: the model.
        beams: sequences kept for each prompt.
        length_penalty: exponent of the length that divides a score; 0 gives plain sums, more favours longer texts.

    Raises:
        UserError: fewer than one beam.
    """

    def __init__(self, lm: LanguageModel, beams: int, length_penalty: float = 1.0):
        if not 1 <= beams <= lm.engine.n_ids:
            raise UserError(f"beams {beams} must be at least 1, and at most the vocabulary's {lm.engine.n_ids}")
        self.lm, self.engine, self.beams, self.length_penalty = lm, lm.engine, beams, length_penalty
        self._search = jax.jit(self._run_search, static_argnames="room")

    def search(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Beams:
        """Return the finished sequences of prompts of ids: N is rounded up to a power of two.

        Raises:
            UserError: a prompt and `max_new_tokens` exceed the context.
        """
        longest, context = max(map(len, prompts)), self.lm.config.context_length
        if max_new_tokens < 1 or longest + max_new_tokens > context:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's context of "
                f"{context}, in which beam search must stay; shorten the prompt, or lower --max_new_tokens"
            )
        prefix = self.engine.prefill(prompts)
        with self.engine.on_mesh():
            room = power_of_two(max_new_tokens)
            count = np.int32(len(prompts))
            return self._search(self.engine.params, prefix, count, np.int32(max_new_tokens), room=room)

    def complete(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[Beam]]:
        """Return each prompt's finished continuations, best first."""
        return self.complete_ids([self.lm.prompt_ids(prompt) for prompt in prompts], max_new_tokens, prompts)

    def complete_ids(
        self, ids: Sequence[Sequence[int]], max_new_tokens: int, prompts: Sequence[str] | None = None
    ) -> list[list[Beam]]:
        """Return the finished continuations of prompts of ids, best first; `prompts` are their texts, if known."""
        tokens, logprobs, scores, lengths = map(np.asarray, self.search(ids, max_new_tokens))
        found = []
        for row, prompt in enumerate(prompts or [""] * len(ids)):
            found.append([])
            for beam in np.flatnonzero(scores[row] > NEVER / 2):
                n = int(lengths[row, beam])
                n -= int(tokens[row, beam, n - 1]) in self.lm.tokenizer.eos_ids
                kept = tokens[row, beam, :n].tolist()
                text = text_after(self.lm.tokenizer, ids[row], kept)
                done = Completion(prompt, kept, text, logprobs[row, beam, :n].tolist())
                found[row].append(Beam(done, float(scores[row, beam])))
        return found

    def _run_search(self, params, prefix: Prefix, count: jax.Array, most: jax.Array, room: int) -> Beams:
        def going(state: SearchState) -> jax.Array:
            return state.open.any() & ~state.ended

        start = _begin(prefix, count, self.beams, room)
        return jax.lax.while_loop(going, partial(self._extend, params, prefix.lengths, most), start).finished

    def _extend(self, params, lengths: jax.Array, most: jax.Array, state: SearchState) -> SearchState:
        """Choose the next token of every beam, and read it."""
        k, ends = self.beams, self.engine.end_ids
        candidates, parents = self._candidates(state)
        last = jnp.take_along_axis(candidates.tokens, state.drawn[None, None, None], axis=2)[:, :, 0]
        hits = jnp.broadcast_to(state.drawn + 1 >= most, last.shape)
        hits |= jnp.isin(last, ends) if len(ends) else False
        _, chosen = jax.lax.top_k(candidates.scores + hits * NEVER, k)
        running = _take(candidates._replace(scores=candidates.scores + hits * NEVER), chosen)
        drawn = state.drawn + 1
        by_length = drawn.astype(jnp.float32) ** self.length_penalty
        may_finish = hits & (jnp.arange(hits.shape[1]) < k) & state.open[:, None]
        scores = jnp.where(may_finish, candidates.scores / by_length, NEVER)
        finished = _best(state.finished, candidates._replace(scores=scores), k)
        worst = finished.scores.min(axis=1)
        cache, positions, logits = self._read(params, state, lengths, running.tokens, _take_rows(parents, chosen))
        return SearchState(
            cache=cache,
            positions=positions,
            logits=logits,
            running=running,
            finished=finished,
            open=state.open & (running.scores[:, 0] / by_length > worst),
            drawn=drawn,
            ended=(hits | ~state.open[:, None]).all(),
        )

    def _candidates(self, state: SearchState) -> tuple[Beams, jax.Array]:
        """Return the best extensions by one token, at least two a beam, and the beam that each extends."""
        N, k, M = state.running.tokens.shape
        V = state.logits.shape[1]
        log_p = jax.nn.log_softmax(state.logits)
        log_p = jnp.where(jnp.arange(V) < self.engine.n_ids, log_p, NEVER).reshape(N, k, V)
        n = min(max(2, 1 + len(self.engine.end_ids)) * k, k * V)
        scores, index = jax.lax.top_k((log_p + state.running.scores[:, :, None]).reshape(N, k * V), n)
        parents, ids = index // V, (index % V).astype(jnp.int32)
        grown = _take(state.running, parents)
        token_log_p = jnp.take_along_axis(log_p.reshape(N, k * V), index, axis=1)
        here = jnp.arange(M) == state.drawn
        tokens = jnp.where(here, ids[:, :, None], grown.tokens)
        logprobs = jnp.where(here, token_log_p[:, :, None], grown.logprobs)
        return Beams(tokens, logprobs, scores, jnp.full_like(grown.lengths, state.drawn + 1)), parents

    def _read(self, params, state: SearchState, lengths, tokens: jax.Array, parents: jax.Array):
        """Reorder the cache by the beams' parents [N, k], and read each beam's last token."""
        N, k, M = tokens.shape
        rows = (parents + k * jnp.arange(N)[:, None]).reshape(-1)
        cache = jax.tree.map(lambda x: x[rows], state.cache)
        slot = state.positions.shape[1] - M + state.drawn
        position = jnp.repeat(lengths + state.drawn, k)
        positions = state.positions.at[:, slot].set(position)
        token = jnp.take_along_axis(tokens, state.drawn[None, None, None], axis=2).reshape(N * k, 1)
        inputs = Inputs(token, position[:, None], slots=CacheSlots(positions, slot))
        model, x, cache = self.engine.run(params, inputs, cache)
        return cache, positions, self.engine.next_logits(model, x)


def _begin(prefix: Prefix, count: jax.Array, k: int, room: int) -> SearchState:
    """Return the state before the first token: k rows for each prompt, of which only the first may be extended.

    The prompts after the first `count` fill the batch up, and are done from the start.
    """
    N, width = len(prefix.lengths), prefix.cache[0].kv[0].shape[2]

    def with_room(x: jax.Array) -> jax.Array:  # [N, G, W, K]
        return jnp.repeat(jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))), k, axis=0)

    repeat = partial(jnp.repeat, repeats=k, axis=0)
    cache = [Cache(jax.tree.map(with_room, c.kv), jax.tree.map(repeat, c.recent)) for c in prefix.cache]
    slots = jnp.arange(width + room)
    positions = jnp.where(slots < prefix.lengths[:, None], slots, UNUSED).astype(jnp.int32)
    tokens, lengths = jnp.zeros((N, k, room), jnp.int32), jnp.zeros((N, k), jnp.int32)
    none = Beams(tokens, tokens.astype(jnp.float32), jnp.full((N, k), NEVER, jnp.float32), lengths)
    first = none._replace(scores=none.scores.at[:, 0].set(0))
    real = jnp.arange(N) < count
    zero = jnp.int32(0)
    return SearchState(cache, repeat(positions), repeat(prefix.logits), first, none, real, zero, jnp.bool_(False))


def _take_rows(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return x [N, n, ...] at the columns chosen [N, k]."""
    return jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2)), axis=1)


def _take(beams: Beams, chosen: jax.Array) -> Beams:
    return Beams(*(_take_rows(x, chosen) for x in beams))


def _best(a: Beams, b: Beams, k: int) -> Beams:
    """Return the k best of two sets of sequences."""
    both = Beams(*(jnp.concatenate(pair, axis=1) for pair in zip(a, b, strict=True)))
    return _take(both, jax.lax.top_k(both.scores, k)[1])
