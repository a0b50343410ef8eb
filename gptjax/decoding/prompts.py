"""Prompts read in chunks, so that a long one does not hold up the batch, and a beginning that was read before is not
read again.

    reader = PromptReader(engine, slots=2048, kept_tokens=8192)
    reading = reader.begin(ids)
    while not reading.done:
        reader.advance(reading)
    state = engine.insert(state, reading.take_prefix(), [row], [request])

A prompt is cut at multiples of the chunk's length, whatever is reused and whoever else is served: the same program
reads the same tokens, and the result is bitwise the same.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.decoding.adapter_stack import for_one
from gptjax.engine import UNUSED, Engine, Prefix, power_of_two
from gptjax.nn.attention import CacheSlots
from gptjax.nn.layers import Cache
from gptjax.nn.transformer import Inputs, logits
from gptjax.sharding import constrain

CHUNK_TOKENS = 128  # the most tokens that one call reads
CPU_CHUNK_TOKENS = 64  # on a CPU, which reads as many tokens a second in shorter chunks, and others wait half as long
LEAST_WIDTH = 16  # of a chunk; shorter ones are padded to it
N_ALTERNATIVES = 20  # the likeliest tokens that are reported beside a token

Wanted = Literal["next", "scores", "hidden"]


@dataclass
class Scores:
    """The log-probabilities of a prompt's tokens, each given those before it; the first token has none.

    Attributes:
        logprobs: of tokens 1 ... n - 1.
        ids, values: for each of them, the likeliest tokens at its place and their log-probabilities,
            [n - 1, N_ALTERNATIVES] (or the whole vocabulary where that is smaller).
    """

    logprobs: list[float] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)


@dataclass
class Reading:
    """A prompt of which some is read.

    Attributes:
        ids: all of it.
        wanted: what is computed besides the cache: the logits of the next token, the scores of all tokens, or the
            hidden states.
        adapter: the number of the adapter by which it is read; 0 for none.
        read: how many tokens are read.
        reused: how many of these an earlier prompt had in common.
        scores: of the tokens read, where they are wanted.
        hidden: [D] float32, the sum of the last hidden states of the tokens read, where it is wanted.
    """

    ids: np.ndarray
    wanted: Wanted
    adapter: int = 0
    read: int = 0
    reused: int = 0
    scores: Scores = field(default_factory=Scores)
    hidden: Any = 0.0
    _cache: list[Cache] | None = None
    _logits: jax.Array | None = None

    @property
    def done(self) -> bool:
        """Whether all of the prompt is read."""
        return self.read == len(self.ids)

    def take_prefix(self) -> Prefix:
        """Return what `Engine.insert` takes, when all is read, and keep no reference to it."""
        assert self.done and self._cache is not None and self._logits is not None
        prefix = Prefix(self._cache, np.array([len(self.ids)], np.int32), self._logits)
        self._cache = self._logits = None
        return prefix


class PromptReader:
    """Reads prompts for an engine's batch.

    Args:
        engine: whose weights and layout of the cache are used.
        slots: the most tokens of a prompt.
        kept_tokens: for how many tokens' keys and values memory is taken, to keep them for prompts that begin alike;
            the least recently used are forgotten.
    """

    def __init__(self, engine: Engine, slots: int, kept_tokens: int = 0):
        self._engine = engine
        most = CPU_CHUNK_TOKENS if jax.default_backend() == "cpu" else CHUNK_TOKENS
        self.chunk = min(most, max(LEAST_WIDTH, power_of_two(slots)))
        self._slots = -(-slots // self.chunk) * self.chunk
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # a chunk's name -> its place in the pool
        self._most_kept = kept_tokens // self.chunk
        self._begin = jax.jit(self._join_chunks)
        self._read = jax.jit(self._read_chunk, static_argnames="wanted", donate_argnums=1)
        self._store = jax.jit(self._store_chunk, donate_argnums=0)
        with engine.on_mesh():
            self._pool = jax.jit(self._empty_pool)()

    def begin(self, ids: Sequence[int], wanted: Wanted = "next", adapter: int = 0) -> Reading:
        """Return a reading of a prompt of at least one token, with what is kept of its beginning."""
        reading = Reading(np.asarray(ids, np.int32), wanted, adapter)
        places = np.zeros(self._slots // self.chunk, np.int32)
        for number, name in enumerate(self._names(reading) if wanted == "next" else []):
            if name not in self._kept:
                break
            self._kept.move_to_end(name)
            places[number] = self._kept[name]
            reading.read += self.chunk
        with self._engine.on_mesh():
            reading._cache = self._begin(self._pool, places, np.int32(reading.read // self.chunk))
        reading.reused = reading.read
        return reading

    def cost(self, reading: Reading) -> int:
        """Return how many tokens the next chunk has, padding included; at most `chunk`."""
        return self.width(min(self.chunk, len(reading.ids) - reading.read), reading.wanted)

    def advance(self, reading: Reading) -> None:
        """Read the next chunk."""
        start = reading.read
        ids = reading.ids[start : start + self.chunk]
        width = self.cost(reading)
        tokens, targets = np.zeros((2, 1, width), np.int32)
        tokens[0, : len(ids)] = ids
        following = reading.ids[start + 1 : start + 1 + len(ids)]
        targets[0, : len(following)] = following
        with self._engine.on_mesh():
            reading._cache, found = self._read(
                self._engine.weights,
                reading._cache,
                np.int32(reading.adapter),
                tokens,
                targets,
                np.int32(start),
                np.int32(len(ids)),
                wanted=reading.wanted,
            )
            reading.read += len(ids)
            if reading.wanted == "next" and len(ids) == self.chunk:
                self._keep(reading)
        reading._logits = found["logits"]
        if reading.wanted == "hidden":
            reading.hidden = reading.hidden + np.asarray(found["hidden"])
        if reading.wanted == "scores":
            logprobs, ids, values = (np.asarray(found[name])[: len(following)] for name in ("of", "ids", "values"))
            reading.scores.logprobs += logprobs.tolist()
            reading.scores.ids += list(ids)
            reading.scores.values += list(values)

    def width(self, n: int, wanted: Wanted) -> int:
        """Return to how many tokens a chunk of n is padded; what is rarely wanted has one program only."""
        return max(LEAST_WIDTH, power_of_two(n)) if wanted == "next" else self.chunk

    def _names(self, reading: Reading) -> list[bytes]:
        """Return a name for each whole chunk but the last token's: a hash of all tokens up to the chunk's end."""
        ids, names, so_far = reading.ids, [], hashlib.blake2b(str(reading.adapter).encode())
        for start in range(0, (len(ids) - 1) // self.chunk * self.chunk, self.chunk):
            so_far.update(ids[start : start + self.chunk].tobytes())
            names.append(so_far.copy().digest())
        return names

    def _keep(self, reading: Reading) -> None:
        """Keep the chunk that was just read, and forget those that are over the limit."""
        names = self._names(reading)
        number = reading.read // self.chunk - 1
        if self._most_kept == 0 or number >= len(names):
            return
        name = names[number]
        if name not in self._kept:
            full = len(self._kept) == self._most_kept
            place = self._kept.popitem(last=False)[1] if full else len(self._kept)
            self._pool = self._store(self._pool, reading._cache, np.int32(number * self.chunk), np.int32(place))
            self._kept[name] = place
        self._kept.move_to_end(name)

    def _read_chunk(self, weights, cache, adapter, tokens, targets, start, length, wanted: Wanted):
        """Read `length` tokens of tokens [1, W] into the cache, from slot `start`."""
        (_, W), S = tokens.shape, self._slots
        counted = jnp.arange(W, dtype=jnp.int32)[None]
        positions = jnp.where(counted < length, start + counted, -1)
        slot = jnp.arange(S, dtype=jnp.int32)[None]
        slots = CacheSlots(jnp.where(slot < start + length, slot, UNUSED), start)
        model, x, cache = self._engine.run(for_one(weights, adapter), Inputs(tokens, positions, slots=slots), cache)
        last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
        found = {"logits": self._engine.next_logits(model, last)}
        if wanted == "hidden":
            states = jnp.where(positions[0, :, None] >= 0, model.readout(x)[0].astype(jnp.float32), 0)
            found["hidden"] = states.sum(axis=0)
        if wanted == "scores":
            log_p = jax.nn.log_softmax(logits(model, model.readout(x))[0], axis=-1)
            found["of"] = jnp.take_along_axis(log_p, targets[0, :, None], axis=1)[:, 0]
            found["values"], found["ids"] = jax.lax.top_k(log_p, min(N_ALTERNATIVES, log_p.shape[1]))
        return cache, found

    def _empty_pool(self) -> list[Cache]:
        """Return room for the chunks that are kept: of each layer, a `Cache` whose rows are chunks."""

        def rows(leaf: jax.Array) -> jax.Array:
            sharded = (None, "kv_heads", None, None) if leaf.ndim == 4 else (None, None, None)
            return constrain(jnp.zeros((max(1, self._most_kept), *leaf.shape[1:]), leaf.dtype), *sharded)

        return jax.tree.map(rows, self._engine.empty_cache(1, self.chunk))

    def _store_chunk(self, pool: list[Cache], cache: list[Cache], start, place) -> list[Cache]:
        """Write the chunk of a prompt's cache that begins at slot `start` to a place in the pool."""
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=self.chunk, axis=2)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=0)
        return [
            Cache(
                jax.tree.map(lambda kept, new: write(kept, cut(new)), kept.kv, new.kv),
                jax.tree.map(write, kept.recent, new.recent),
            )
            for kept, new in zip(pool, cache, strict=True)
        ]

    def _join_chunks(self, pool: list[Cache], places: jax.Array, count) -> list[Cache]:
        """Return a prompt's cache with the first `count` chunks of the pool's `places`, and nothing behind them."""

        def take(kept: jax.Array, place: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(kept, place, 1, axis=0)

        def paste(number, cache: list[Cache]) -> list[Cache]:
            def into(old: jax.Array, kept: jax.Array) -> jax.Array:
                chunk = take(kept, places[number])
                return jax.lax.dynamic_update_slice_in_dim(old, chunk, number * self.chunk, axis=2)

            return [
                Cache(
                    jax.tree.map(into, old.kv, kept.kv),
                    jax.tree.map(lambda _, kept: take(kept, places[number]), old.recent, kept.recent),
                )
                for old, kept in zip(cache, pool, strict=True)
            ]

        return jax.lax.fori_loop(0, count, paste, self._engine.empty_cache(1, self._slots))
