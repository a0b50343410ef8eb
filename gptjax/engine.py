"""Batched generation over slots: requests join a running batch and leave it, each with its own length and sampling.

    engine = Engine(config, params)
    state = engine.init_state(rows=8, slots=512)
    state = engine.insert(state, engine.prefill([ids]), [3], [Request(Sampling(0.8), key, max_new_tokens=100)])
    state, tokens, logprobs = engine.step(state, 32)

`prefill` reads prompts by the attention that trains on these devices, `insert` places what it read in rows of the
batch, and `step` draws tokens for every row. `start` does the first three of these in one program, for a batch whose
rows begin together. One compiled step serves any mix of requests. What a row draws depends
on its prompt, its key and how much it has drawn, and not on its neighbours.

All rows write their next token into the same slot of the cache, and the slots are used in a circle: one contiguous
write serves the batch. A row of n tokens, inserted before slot t, lies in the slots t - n ... t - 1 of that circle.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import LoraConfig, ModelConfig, RunConfig
from gptjax.decoding.adapter_stack import AdapterStack, SplitParams, for_rows, stack_adapters
from gptjax.nn.attention import CACHE_AXES, CacheSlots, merge_heads, split_heads
from gptjax.nn.backends import for_mesh, for_platform
from gptjax.nn.layers import Cache
from gptjax.nn.transformer import Inputs, Params, abstract_model, bind_split, logits, split_layers
from gptjax.sampling import RowSampling, Sampling, as_rows, draw
from gptjax.sharding import constrain

UNUSED = np.iinfo(np.int32).max  # the position of a slot that holds no token of its row
CHUNK = 32  # the most tokens of one call of `step`
INSERT_BLOCK = 64  # slots that are written at once when a prompt is placed in a row


class Request(NamedTuple):
    """What a row of the batch is to draw.

    Attributes:
        sampling: how.
        key: [2] uint32, the data of a key (`jax.random.key_data`); token i is drawn by fold_in(key, i).
        max_new_tokens: the most tokens to draw; a row also stops at an end token, and where its context is full.
        drawn: how many were drawn before, where a row is inserted again.
        adapter: the number of the adapter that it draws by (`Engine.adapt`); 0 for none.
    """

    sampling: Sampling
    key: np.ndarray
    max_new_tokens: int
    drawn: int = 0
    adapter: int = 0


class Prefix(NamedTuple):
    """What prefill has read of N prompts; N and the width T are rounded up to powers of two.

    Attributes:
        cache: of each layer, with as many slots as the longest prompt has tokens, from each prompt's first.
        lengths: [N] int32, tokens of each prompt.
        logits: [N, V] float32, of the token after each prompt.
    """

    cache: list[Cache]
    lengths: jax.Array
    logits: jax.Array


class State(NamedTuple):
    """A batch of B rows with S slots each.

    Attributes:
        cache: of each layer.
        slots: the positions that the slots hold, and the slot of the next token.
        logits: [B, V] float32, for the token to be drawn next.
        position: [B] int32, of the token to be drawn next.
        left: [B] int32, how many more tokens a row may draw; 0 where it has none or its request is done.
        drawn: [B] int32, how many tokens a row has drawn.
        key: [B, 2] uint32, the data of the key of each row's draws.
        sampling: how each row draws.
        adapter: [B] int32, which adapter each row draws by.
    """

    cache: list[Cache]
    slots: CacheSlots
    logits: jax.Array
    position: jax.Array
    left: jax.Array
    drawn: jax.Array
    key: jax.Array
    sampling: RowSampling
    adapter: jax.Array


class Engine:
    """A model's weights laid out for decoding, and the compiled programs that run it.

    Args:
        config: of the model.
        params: weights as `transformer.init_params` lays them out, on the devices of the mesh.
        mesh: what the weights are sharded over; None for one device.
        n_ids: ids from this one on are never drawn (the padding of a vocabulary); None for the model's own number.
        end_ids: ids that end a text.
        delete: delete the stacked weights of the blocks as they are split (see `split_layers`).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh | None = None,
        n_ids: int | None = None,
        end_ids: Sequence[int] = (),
        delete: bool = False,
    ):
        self.config, run = replace(config, dropout=0.0), RunConfig()
        run = for_platform(run, config, jax.default_backend()) if mesh is None else for_mesh(run, config, mesh)
        self.mesh, self.n_ids = mesh, config.vocab_size if n_ids is None else n_ids
        self.end_ids = np.array(sorted(end_ids), np.int32)
        self.load(params, delete)
        self.graphdef = abstract_model(self.config, run)[0]
        self._logits = jax.jit(self._full_logits)
        self._empty = jax.jit(self._empty_state, static_argnames=("rows", "slots"))
        self._prefill = jax.jit(self._read_prompts)
        self._insert = jax.jit(self._insert_rows, donate_argnums=0)
        self._start = jax.jit(self._start_rows, static_argnames=("rows", "slots"))
        self._step = jax.jit(self._draw_tokens, donate_argnums=1)
        self._restrict = jax.jit(lambda logits, allowed: jnp.where(allowed, logits, -jnp.inf), donate_argnums=0)

    def load(self, params: Params, delete: bool = False) -> None:
        """Take other weights of the same model; the programs stay compiled."""
        self.params = split_layers(params, delete)
        self.stack: AdapterStack | None = None

    def adapt(self, adapters: Sequence[tuple[LoraConfig, Params]]) -> None:
        """Take adapters of the model (as `stack_adapters` does), which requests name by their numbers, from 1."""
        self.stack = stack_adapters(self.params, adapters)

    @property
    def weights(self) -> SplitParams | AdapterStack:
        """The weights, with the adapters where there are any."""
        return self.params if self.stack is None else self.stack

    def logits(self, ids: np.ndarray) -> jax.Array:
        """Compute the float32 logits [B, T, V] of the token after each position of ids [B, T]."""
        with self.on_mesh():
            return self._logits(self.params, ids)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefix:
        """Read prompts of 1 to context_length tokens each."""
        tokens, lengths = self._padded(prompts)
        with self.on_mesh():
            return self._prefill(self.params, tokens, lengths)

    def start(self, prompts: Sequence[Sequence[int]], requests: Sequence[Request], slots: int) -> State:
        """Allocate a batch of as many rows as there are prompts, and place these in it."""
        tokens, lengths = self._padded(prompts)
        rows, fresh = len(prompts), as_arrays(requests, len(lengths))
        with self.on_mesh():
            return self._start(self.params, tokens, lengths, fresh, rows=rows, slots=slots)

    def init_state(self, rows: int, slots: int) -> State:
        """Allocate a batch of empty rows. A row's prompt must fit its slots, and it draws until they are full."""
        with self.on_mesh():
            return self._empty(rows=rows, slots=slots)

    def insert(self, state: State, prefix: Prefix, rows: Sequence[int], requests: Sequence[Request]) -> State:
        """Place the first prompts of a prefix in rows of the batch, in place of what these held.

        It takes the state over: use only the one that it returns.
        """
        N = len(prefix.lengths)
        places = np.zeros(N, np.int32)
        places[: len(rows)] = rows
        with self.on_mesh():
            return self._insert(state, prefix, places, np.int32(len(rows)), as_arrays(requests, N))

    def step(self, state: State, n: int) -> tuple[State, np.ndarray, np.ndarray]:
        """Draw up to n tokens, at most CHUNK, for every row that has any left to draw.

        It takes the state over: use only the one that it returns.

        Returns:
            the state; tokens [B, n] int32, -1 where a row drew none; and their log-probabilities under the model
            (before temperature and cuts), [B, n] float32.
        """
        with self.on_mesh():
            state, tokens, logprobs = self._step(self.weights, state, np.int32(n))
        return state, np.asarray(tokens)[:, :n], np.asarray(logprobs)[:, :n]

    def restrict(self, state: State, allowed: np.ndarray) -> State:
        """Let each row's next token be one of those allowed, [B, vocab_size] bool; it takes the state over."""
        with self.on_mesh():
            return state._replace(logits=self._restrict(state.logits, allowed))

    def release(self, state: State, row: int) -> State:
        """End a row's request."""
        return state._replace(left=state.left.at[row].set(0))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [N, T] and lengths [N], int32, with N and T rounded up so that few programs serve all."""
        lengths = np.ones(power_of_two(len(prompts)), np.int32)  # rows that are added read one token
        lengths[: len(prompts)] = [len(ids) for ids in prompts]
        width = min(power_of_two(int(lengths.max())), self.config.context_length)
        tokens = np.zeros((len(lengths), width), np.int32)
        for row, ids in zip(tokens, prompts, strict=False):
            row[: len(ids)] = ids
        return tokens, lengths

    def on_mesh(self) -> Any:
        """Return the context in which the engine's programs run."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def run(self, params, inputs: Inputs, cache: list[Cache] | None = None):
        """Return the bound model, its hidden states before the readout, and the cache."""
        rest, layers = params
        model = bind_split(self.graphdef, rest, layers)
        x, cache, _ = model.apply_blocks(model.embed_inputs(inputs), inputs, cache, layers)
        return model, x, cache

    def next_logits(self, model, x: jax.Array) -> jax.Array:
        """Compute the logits of each row's last token, x [B, 1, D]: [B, V] float32."""
        return constrain(logits(model, model.readout(x))[:, 0], "batch", None)

    def _full_logits(self, params, ids: jax.Array) -> jax.Array:
        model, x, _ = self.run(params, Inputs(ids))
        return logits(model, model.readout(x))

    def empty_cache(self, rows: int, slots: int) -> list[Cache]:
        """Return a cache without tokens (to be called inside jit)."""
        cfg = self.config

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros(shape, cfg.dtype)

        kv = [constrain(zeros(rows, cfg.kv_heads, slots, cfg.d_head), *CACHE_AXES)] * 2
        recent = [None if cfg.conv_width is None else zeros(rows, cfg.conv_width - 1, cfg.d_model)] * 2
        return [Cache(tuple(kv), tuple(recent)) for _ in range(cfg.n_layers)]

    def _empty_state(self, rows: int, slots: int) -> State:
        count = jnp.zeros(rows, jnp.int32)
        share = jnp.zeros(rows, jnp.float32)
        return State(
            cache=self.empty_cache(rows, slots),
            slots=CacheSlots(jnp.full((rows, slots), UNUSED, jnp.int32), jnp.int32(0)),
            logits=jnp.zeros((rows, self.config.vocab_size), jnp.float32),
            position=count,
            left=count,
            drawn=count,
            key=jnp.zeros((rows, 2), jnp.uint32),
            sampling=RowSampling(share, count, share + 1, share),
            adapter=count,
        )

    def _read_prompts(self, params, tokens: jax.Array, lengths: jax.Array) -> Prefix:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = jnp.where(positions < lengths[:, None], positions, -1)
        model, x, cache = self.run(params, Inputs(tokens, positions))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
        return Prefix(cache, lengths, self.next_logits(model, last))

    def _start_rows(self, params, tokens: jax.Array, lengths: jax.Array, fresh, rows: int, slots: int) -> State:
        """Lay out the prompts of all rows at once, as inserting one after the other before slot 0 does."""
        prefix = self._read_prompts(params, tokens, lengths)
        prefix, fresh = jax.tree.map(lambda x: x[:rows], (prefix, fresh))
        index = jnp.arange(slots) - (slots - prefix.lengths[:, None])  # [B, S], which token of its row a slot holds
        positions = jnp.where(index >= 0, index, UNUSED).astype(jnp.int32)

        def lay_out(prompt: jax.Array) -> jax.Array:  # [B, G, W, K] -> [B, G, S, K]
            taken = jnp.take_along_axis(prompt, index[:, None, :, None], axis=2, mode="clip")
            return constrain(jnp.where(index[:, None, :, None] >= 0, taken, 0), *CACHE_AXES)

        return State(
            cache=[Cache(jax.tree.map(lay_out, cache.kv), cache.recent) for cache in prefix.cache],
            slots=CacheSlots(positions, jnp.int32(0)),
            logits=prefix.logits,
            position=prefix.lengths,
            **fresh | {"left": self._most_left(fresh["left"], prefix.lengths, slots)},
        )

    def _most_left(self, left: jax.Array, lengths: jax.Array, slots: int) -> jax.Array:
        """Return how many tokens rows may draw: the last is drawn from a full context."""
        return jnp.minimum(left, min(slots, self.config.context_length) + 1 - lengths)

    def _insert_rows(self, state: State, prefix: Prefix, places, count, fresh: dict[str, Any]) -> State:
        """Place the first `count` prompts in the rows `places` [N]."""
        S = state.slots.positions.shape[1]

        def insert_one(i, state: State) -> State:
            row, length = places[i], prefix.lengths[i]
            first = state.slots.next - length  # the slot of the prompt's first token, in the circle
            index = (jnp.arange(S) - first) % S
            positions = jnp.where(index < length, index, UNUSED).astype(jnp.int32)

            def in_circle(old, new):  # [B, G, S, K], and [N, G, W, K]
                return _write_in_circle(old, new[i], row, first, length)

            cache = [
                Cache(
                    jax.tree.map(in_circle, old.kv, new.kv),
                    jax.tree.map(lambda a, b: a.at[row].set(b[i]), old.recent, new.recent),
                )
                for old, new in zip(state.cache, prefix.cache, strict=True)
            ]
            given = {name: jax.tree.map(lambda x: x[i], values) for name, values in fresh.items()}
            given["left"] = self._most_left(given["left"], length, S)
            given |= {"logits": prefix.logits[i], "position": length}
            changed = {
                name: jax.tree.map(lambda old, new: old.at[row].set(new), getattr(state, name), values)
                for name, values in given.items()
            }
            slots = state.slots._replace(positions=state.slots.positions.at[row].set(positions))
            return state._replace(cache=cache, slots=slots, **changed)

        return jax.lax.fori_loop(0, count, insert_one, state)

    def _draw_tokens(self, weights, state: State, n):
        """Draw n tokens for every row, and return CHUNK columns. One program serves any n."""
        B, S = state.slots.positions.shape
        params = for_rows(weights, state.adapter, self.config.dtype)
        state = state._replace(cache=_each_kv(merge_heads, state.cache))

        def one(i, carry):
            s, tokens, logprobs = carry
            token, logprob = self.draw_rows(s.logits, s.key, s.drawn, s.sampling)
            going = s.left > 0
            slots = s.slots._replace(
                positions=s.slots.positions.at[:, s.slots.next].set(jnp.where(going, s.position, UNUSED))
            )
            inputs = Inputs(token[:, None], s.position[:, None], slots=slots)
            model, x, cache = self.run(params, inputs, _each_kv(partial(split_heads, rows=B), s.cache))
            ended = jnp.isin(token, self.end_ids) if len(self.end_ids) else jnp.zeros(B, bool)
            moved = s._replace(
                cache=_each_kv(merge_heads, cache),
                slots=CacheSlots(slots.positions, jnp.where(slots.next + 1 < S, slots.next + 1, 0)),
                logits=self.next_logits(model, x),
                position=s.position + going,
                left=jnp.where(going & ~ended, s.left - 1, 0),
                drawn=s.drawn + going,
            )
            return moved, tokens.at[:, i].set(jnp.where(going, token, -1)), logprobs.at[:, i].set(logprob)

        buffers = jnp.full((B, CHUNK), -1, jnp.int32), jnp.zeros((B, CHUNK), jnp.float32)
        state, tokens, logprobs = jax.lax.fori_loop(0, n, one, (state, *buffers))
        return state._replace(cache=_each_kv(partial(split_heads, rows=B), state.cache)), tokens, logprobs

    def draw_rows(
        self, logits: jax.Array, key: jax.Array, drawn: jax.Array, sampling: RowSampling
    ) -> tuple[jax.Array, jax.Array]:
        """Draw the next token of each row of logits [B, V]: ids [B] int32, and their log-probabilities [B] float32.

        Args:
            key, drawn, sampling: as `sampling.draw` takes them.
        """
        raw = logits
        if self.n_ids < raw.shape[1]:
            raw = jnp.where(jnp.arange(raw.shape[1]) < self.n_ids, raw, -jnp.inf)
        token = draw(raw, key, drawn, sampling)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return token, logprob


def as_arrays(requests: Sequence[Request], n: int) -> dict[str, Any]:
    """Return requests as arrays of n rows, by the names that `State` has for them; the first fills what is left."""
    filled = [*requests, *[requests[0]] * (n - len(requests))]
    return {
        "left": np.array([r.max_new_tokens for r in filled], np.int32),
        "drawn": np.array([r.drawn for r in filled], np.int32),
        "key": np.stack([r.key for r in filled]),
        "sampling": as_rows([r.sampling for r in filled]),
        "adapter": np.array([r.adapter for r in filled], np.int32),
    }


def _write_in_circle(old: jax.Array, prompt: jax.Array, row, first, length) -> jax.Array:
    """Write a prompt's keys or values [G, W, K] into a row of old [B, G, S, K], from slot `first` of the circle.

    The row's other slots become zero: values that are not finite would reach its sums through weights of zero. The
    prompt is written in blocks, in place; a roll of the whole row would pass four times through its memory.
    """
    S = old.shape[2]
    old, first, block = old.at[row].set(0), first % S, min(S, INSERT_BLOCK)
    n_blocks = -(-S // block)

    def write(number, old: jax.Array) -> jax.Array:
        start = jnp.minimum((first // block + number) % n_blocks * block, S - block)
        index = (start + jnp.arange(block) - first) % S
        piece = jnp.where((index < length)[:, None], jnp.take(prompt, index, axis=1, mode="clip"), 0)
        return jax.lax.dynamic_update_slice(old, piece[None], (row, 0, start, 0))

    # One more than the prompt covers, since the circle's last block may overlap the one before it.
    count = jnp.minimum(-(-(first % block + length) // block) + 1, n_blocks)
    return jax.lax.fori_loop(0, count, write, old)


def _each_kv(f, caches: list[Cache]) -> list[Cache]:
    return [cache._replace(kv=tuple(map(f, cache.kv))) for cache in caches]


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
