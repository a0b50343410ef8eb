"""Generation: prefill, then a compiled loop over a key/value cache.

Prompts of a batch end in the same slot: shorter ones are padded on the left, at negative positions, which nothing
attends to. A slot of the cache that is not yet written has a position later than any query's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.nn.layers import Cache
from gptjax.nn.transformer import Params, abstract_model, bind, logits
from gptjax.tokenizers import TextDecoder, Tokenizer, text_after

UNWRITTEN = np.iinfo(np.int32).max  # the position of a slot that is not yet written
CHUNK = 32  # tokens between two looks from Python: for streaming, and to stop when all sequences have ended


class Sampling(NamedTuple):
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest; None for all.
        top_p: only the smallest set of tokens whose probability reaches p (Holtzman et al. 2019); None for all.
        min_p: only tokens at least p times as likely as the likeliest (Nguyen et al. 2024); None for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def check(self) -> "Sampling":
        """Itself; raises UserError for values out of range."""
        for name, value, good, rule in (
            ("temperature", self.temperature, self.temperature >= 0, "must not be negative"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "must be at least 1"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "must lie in [0, 1]"),
        ):
            if not good:
                raise UserError(f"{name} {value} {rule}")
        return self


class Progress(NamedTuple):
    """What the decoding loop carries.

    Attributes:
        logits: [B, V] float32, for the token to be drawn next.
        cache: of all layers, with S slots for keys and values.
        cache_positions: [B, S] int32.
        position: [B] int32, of the token to be drawn next.
        slot: int32 scalar, where in the cache it goes.
        drawn: int32 scalar, how many have been drawn.
        ended: [B] bool, whether a sequence has drawn an end token.
    """

    logits: jax.Array
    cache: Cache | list[Cache]
    cache_positions: jax.Array
    position: jax.Array
    slot: jax.Array
    drawn: jax.Array
    ended: jax.Array


class Completion(NamedTuple):
    """One generated sequence.

    Attributes:
        prompt: as given.
        tokens: ids drawn, without the end token.
        text: their text.
        logprobs: natural log of each id's probability under the model (before temperature and cuts).
    """

    prompt: str
    tokens: list[int]
    text: str
    logprobs: list[float]


def filter_logits(raw: jax.Array, s: Sampling) -> jax.Array:
    """Logits [B, V] divided by the temperature, and -inf where top-k, top-p or min-p leaves a token out."""
    x = raw / s.temperature
    if s.top_k is not None and s.top_k < x.shape[-1]:
        x = jnp.where(x < jax.lax.top_k(x, s.top_k)[0][:, -1:], -jnp.inf, x)
    if s.top_p is not None and s.top_p < 1:
        ordered = jnp.sort(x, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before < s.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        x = jnp.where(x < least, -jnp.inf, x)
    if s.min_p:
        x = jnp.where(x < x.max(-1, keepdims=True) + jnp.log(s.min_p), -jnp.inf, x)
    return x


def draw(raw: jax.Array, keys: jax.Array, s: Sampling) -> jax.Array:
    """One token for each row of logits [B, V], by that row's key: [B] int32."""
    if s.temperature == 0:
        return jnp.argmax(raw, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(raw, s)).astype(jnp.int32)


class LanguageModel:
    """A model with its tokenizer, ready to be asked.

    Args:
        config: of the model.
        params: float32 or lower-precision weights, as `transformer.init_params` lays them out.
        tokenizer: text to ids.
    """

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer):
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.graphdef = abstract_model(replace(config, attention="reference"))[0]
        self._logits = jax.jit(self._full_logits)
        self._prefill = jax.jit(self._prefill_from, static_argnames="slots")
        self._decode = jax.jit(self._decode_chunk, static_argnames="sampling", donate_argnums=1)

    def logits(self, ids: Any) -> jax.Array:
        """ids [B, T] -> float32 logits [B, T, V] of the token after each position."""
        ids = np.asarray(ids, np.int32)
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.config.context_length:
            raise UserError(
                f"ids of shape {ids.shape}: logits takes [B, T] with 1 <= T <= {self.config.context_length}"
            )
        return self._logits(self.params, ids)

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        num_return_sequences: int = 1,
    ) -> list[str]:
        """Return continuations, each with its prompt before it: all of the first prompt, then all of the second.

        Without a temperature every token is the likeliest, as in `transformers`.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        repeated = [p for p in prompts for _ in range(num_return_sequences)]
        return [c.prompt + c.text for c in self.complete(repeated, max_new_tokens, sampling, seed)]

    def complete(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int = 0
    ) -> list[Completion]:
        """One continuation for each prompt. Row i draws by (seed, i), whatever else is in the batch."""
        none = np.zeros((2, len(prompts), 0), int)  # what there is to join where nothing is drawn
        chunks = [none, *self.stream(prompts, max_new_tokens, sampling, seed)]
        tokens, logprobs = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
        completions = []
        for prompt, row, row_logprobs in zip(prompts, tokens, logprobs, strict=True):
            ends = np.flatnonzero(np.isin(row, self.tokenizer.eos_ids))
            length = int(ends[0]) if len(ends) else len(row)
            ids = row[:length].tolist()
            text = text_after(self.tokenizer, self._prompt_ids(prompt), ids)
            completions.append(Completion(prompt, ids, text, row_logprobs[:length].tolist()))
        return completions

    def stream(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and log-probabilities as they come, [B, n] each; after its end token a row repeats the first.

        When a sequence reaches the context length, its older half is forgotten and the rest read anew: a token
        sees between half a context and a whole one, whatever the lengths of the others.
        """
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens {max_new_tokens} must not be negative")
        sampling.check()
        key, T = jax.random.key(seed), self.config.context_length
        history = [self._prompt_ids(prompt) for prompt in prompts]
        starts = [max(0, len(ids) - T) for ids in history]  # what is before them is forgotten
        ended, drawn = np.zeros(len(prompts), bool), 0
        while drawn < max_new_tokens and not ended.all():
            known = [ids[start:] for ids, start in zip(history, starts, strict=True)]
            room = min(max_new_tokens - drawn, T - max(map(len, known)) + 1)
            progress = self._begin(known, room, ended, drawn)
            while room > 0 and not ended.all():
                n = min(CHUNK, room)
                progress, *chunk = self._decode(self.params, progress, key, np.int32(n), sampling=sampling)
                tokens, logprobs = (np.asarray(buffer)[:, :n] for buffer in chunk)
                yield tokens, logprobs
                rows = zip(history, tokens.tolist(), ended, strict=True)
                history = [ids if over else ids + row for ids, row, over in rows]  # what has ended needs no more room
                ended, drawn, room = np.asarray(progress.ended), drawn + n, room - n
            both = zip(starts, history, strict=True)
            starts = [start if len(ids) <= start + T else len(ids) - (T + 1) // 2 for start, ids in both]

    def stream_text(self, prompt: str, max_new_tokens: int, sampling: Sampling, seed: int = 0) -> Iterator[str]:
        """One continuation of one prompt, piece by piece, for a person who watches."""
        decoder = TextDecoder(self.tokenizer, self._prompt_ids(prompt))
        for tokens, _ in self.stream([prompt], max_new_tokens, sampling, seed):
            if piece := decoder.add(i for i in tokens[0].tolist() if i not in self.tokenizer.eos_ids):
                yield piece
        if rest := decoder.finish():
            yield rest

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode_prompt(prompt).tolist()
        if ids:
            return ids
        # From nothing: as after the end of a document, or after a blank line (the alphabet begins with a new line).
        return list(self.tokenizer.eos_ids[:1]) or [0, 0]

    def _begin(self, known: list[list[int]], room: int, ended: np.ndarray, drawn: int) -> Progress:
        """Read what is known, into a cache with room for so many tokens more."""
        # Lengths go up to powers of two, so that few programs serve them all.
        longest, T = max(map(len, known)), self.config.context_length
        width = min(_power_of_two(longest), T)
        slots = width + min(_power_of_two(room), T)
        tokens = np.zeros((len(known), width), np.int32)
        positions = np.full((len(known), width), -1, np.int32)
        for row, ids in enumerate(known):
            tokens[row, width - len(ids) :] = ids
            positions[row, width - len(ids) :] = np.arange(len(ids))
        return self._prefill(self.params, tokens, positions, ended, np.int32(drawn), slots=slots)

    def _full_logits(self, params: Params, ids: jax.Array) -> jax.Array:
        model = bind(self.graphdef, params)
        return logits(model, model(ids)[0])

    def _prefill_from(self, params, tokens, positions, ended, drawn, slots: int) -> Progress:
        model = bind(self.graphdef, params)
        hidden, cache = model(tokens, positions=positions)
        more = slots - tokens.shape[1]
        cache = jax.tree.map(lambda known: known.widened(more), cache, is_leaf=lambda x: isinstance(x, Cache))
        cache_positions = jnp.pad(positions, ((0, 0), (0, more)), constant_values=UNWRITTEN)
        last = logits(model, hidden[:, -1:])[:, 0]
        return Progress(last, cache, cache_positions, positions[:, -1] + 1, jnp.int32(tokens.shape[1]), drawn, ended)

    def _decode_chunk(self, params, progress: Progress, key, n, sampling: Sampling):
        """n tokens for every row: (progress, tokens and log-probabilities [B, CHUNK]). One program serves any n."""
        model, eos, rows = bind(self.graphdef, params), self.tokenizer.eos_ids, jnp.arange(len(progress.ended))

        def one(i, carry):
            p, tokens, logprobs = carry
            keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), p.drawn))(rows)
            token = draw(p.logits, keys, sampling)
            token = jnp.where(p.ended, eos[0], token) if eos else token
            logprob = jnp.take_along_axis(jax.nn.log_softmax(p.logits), token[:, None], axis=1)[:, 0]
            cache_positions = p.cache_positions.at[:, p.slot].set(p.position)
            hidden, cache = model(
                token[:, None], p.position[:, None], cache=p.cache, cache_positions=cache_positions, slot=p.slot
            )
            ended = p.ended | jnp.isin(token, jnp.array(eos)) if eos else p.ended
            after = Progress(
                logits(model, hidden)[:, 0], cache, cache_positions, p.position + 1, p.slot + 1, p.drawn + 1, ended
            )
            return after, tokens.at[:, i].set(token), logprobs.at[:, i].set(logprob)

        buffers = [jnp.zeros((len(rows), CHUNK), dtype) for dtype in (jnp.int32, jnp.float32)]
        return jax.lax.fori_loop(0, n, one, (progress, *buffers))


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
