"""A model with its tokenizer, text in and text out: a client of the engine.

Each prompt is a row of the engine's batch. A row that reaches the context length forgets its older half: the client
reads the newer half again and inserts it, while the other rows stay as they are.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import ModelConfig
from gptjax.engine import CHUNK, Engine, Request, power_of_two
from gptjax.errors import UserError
from gptjax.nn.transformer import Params
from gptjax.sampling import Sampling
from gptjax.tokenizers import HuggingFaceTokenizer, NoTokenizer, TextDecoder, Tokenizer, text_after

CHUNK_OF_TEXT = 4  # tokens that are drawn before their text is shown


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


class Control(Protocol):
    """What decides, beside the model, which tokens are drawn and where a text ends."""

    def allowed(self) -> np.ndarray | None:
        """Return which ids each row may draw next, [B, vocab_size] bool; None for all."""

    def take(self, tokens: np.ndarray, logprobs: np.ndarray) -> Sequence[int]:
        """Take what was drawn, [B, n] each; return the rows whose text is complete."""


class LanguageModel:
    """A model with its tokenizer, ready to generate.

    Args:
        config: of the model.
        params: float32 or lower-precision weights, as `transformer.init_params` lays them out.
        tokenizer: text to ids.
        mesh: what the weights are sharded over; None for one device.
        delete: delete the stacked weights of the blocks as they are split (see `split_layers`).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        delete: bool = False,
    ):
        self.config, self.tokenizer = config, tokenizer
        # As in transformers, an imported model may draw any id: its tokenizer decodes one that it lacks to nothing.
        draws_any = isinstance(tokenizer, HuggingFaceTokenizer | NoTokenizer)
        n_ids = config.vocab_size if draws_any else tokenizer.vocab_size
        self.engine = Engine(config, params, mesh, n_ids, tokenizer.eos_ids, delete)

    @property
    def params(self) -> tuple[Params, list[Params]]:
        """The weights outside the blocks, and those of each block."""
        return self.engine.params

    def logits(self, ids: Any) -> jax.Array:
        """Compute the float32 logits [B, T, V] of the token after each position of ids [B, T].

        Raises:
            UserError: ids of another shape, longer than the context, or outside the vocabulary.
        """
        ids, cfg = np.asarray(ids), self.config
        if ids.ndim != 2 or not 0 < ids.shape[1] <= cfg.context_length or ids.dtype.kind not in "iu":
            raise UserError(
                f"ids of shape {ids.shape} and type {ids.dtype}: logits takes integers [B, T] with 1 <= T <= "
                f"{cfg.context_length}"
            )
        outside = ids[(ids < 0) | (ids >= cfg.vocab_size)]
        if outside.size:
            raise UserError(f"id {outside[0]} is not in the model's vocabulary; ids lie in [0, {cfg.vocab_size})")
        return self.engine.logits(ids.astype(np.int32))

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
        """Return continuations, each after its prompt: all of the first prompt, then all of the second.

        Without a temperature every token is the likeliest, as in `transformers`.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        repeated = [p for p in prompts for _ in range(num_return_sequences)]
        return [c.prompt + c.text for c in self.complete(repeated, max_new_tokens, sampling, seed)]

    def complete(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int = 0
    ) -> list[Completion]:
        """Return one continuation for each prompt. Row i draws by (seed, i), whatever else is in the batch."""
        none = np.zeros((2, len(prompts), 0), int)  # joins to nothing, where nothing is drawn
        read = [self.prompt_ids(prompt) for prompt in prompts]
        chunks = [none, *self.stream(read, max_new_tokens, sampling, seed)]
        tokens, logprobs = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
        completions = []
        for prompt, before, row, row_logprobs in zip(prompts, read, tokens, logprobs, strict=True):
            ends = np.flatnonzero(np.isin(row, self.tokenizer.eos_ids))
            length = int(ends[0]) if len(ends) else len(row)
            ids = row[:length].tolist()
            text = text_after(self.tokenizer, before, ids)
            completions.append(Completion(prompt, ids, text, row_logprobs[:length].tolist()))
        return completions

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        chunk: int = CHUNK,
        control: Control | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ids and log-probabilities as they are drawn, [B, n] each; after its end token a row repeats it.

        When a sequence reaches the context length, its older half is forgotten and the rest is read again: a token
        sees between half a context and a whole one, whatever the lengths of the others.

        Args:
            prompts: texts, or their ids.
            max_new_tokens: the most tokens to draw for each.
            sampling: how they are drawn.
            seed: of the draws.
            chunk: the most tokens to draw before they are yielded.
            control: decides what may be drawn, once for each chunk; None for nothing of the kind.
        """
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens {max_new_tokens} must not be negative")
        sampling.check()
        T, keys = self.config.context_length, row_keys(seed, len(prompts))
        windows = [self.prompt_ids(prompt)[-T:] for prompt in prompts]  # what each row attends to
        longest = max(map(len, windows), default=1)
        # Few sizes, so that few programs serve all; the smaller, since every token reads all slots.
        rounded = power_of_two(longest) + power_of_two(max_new_tokens)
        slots = min(power_of_two(longest + max_new_tokens), rounded, T)
        running = list(range(len(prompts)))
        requests = [Request(sampling, key, max_new_tokens) for key in keys]
        state = self.engine.start(windows, requests, slots) if max_new_tokens and prompts else None
        last = np.zeros(len(prompts), np.int32)
        drawn = 0
        while drawn < max_new_tokens and running:
            room = T + 1 - max(len(windows[row]) for row in running)
            n = min(chunk, max_new_tokens - drawn, room)
            if control is not None and (allowed := control.allowed()) is not None:
                state = self.engine.restrict(state, allowed)
            state, tokens, logprobs = self.engine.step(state, n)
            counts = (tokens >= 0).sum(axis=1)  # what a row does not draw comes after what it does
            last = np.where(counts > 0, tokens[np.arange(len(tokens)), counts - 1], last)
            tokens = np.where(tokens >= 0, tokens, last[:, None])
            yield tokens, logprobs
            drawn += n
            ended = np.isin(last, self.tokenizer.eos_ids)
            for row in () if control is None else control.take(tokens, logprobs):
                ended[row], state = True, self.engine.release(state, row)
            running = [row for row in running if not ended[row]]
            for row in running:
                windows[row] = windows[row] + tokens[row].tolist()
            full = [row for row in running if len(windows[row]) > T]
            if full and drawn < max_new_tokens:
                for row in full:
                    windows[row] = windows[row][-((T + 1) // 2) :]
                prefix = self.engine.prefill([windows[row] for row in full])
                left = [Request(sampling, keys[row], max_new_tokens - drawn, drawn) for row in full]
                state = self.engine.insert(state, prefix, full, left)

    def stream_text(
        self, prompt: str | Sequence[int], max_new_tokens: int, sampling: Sampling, seed: int = 0
    ) -> Iterator[str]:
        """Yield one continuation of one prompt, a text or its ids, piece by piece."""
        decoder = TextDecoder(self.tokenizer, self.prompt_ids(prompt))
        for tokens, _ in self.stream([prompt], max_new_tokens, sampling, seed, CHUNK_OF_TEXT):
            if piece := decoder.add(i for i in tokens[0].tolist() if i not in self.tokenizer.eos_ids):
                yield piece
        if rest := decoder.finish():
            yield rest

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the ids that the model continues: those of a text, with the tokens that belong around it, or ids."""
        if not isinstance(prompt, str):
            return list(prompt)
        ids = self.tokenizer.encode_prompt(prompt).tolist()
        if ids:
            return ids
        # From nothing: as after the end of a document, or after a blank line (the alphabet begins with a new line).
        return list(self.tokenizer.eos_ids[:1]) or [0, 0]


def row_keys(seed: int, n: int) -> np.ndarray:
    """Return the data of the keys by which rows 0 ... n - 1 of a batch draw, [n, 2] uint32."""
    # The low half of the seed, as `jax.random.key` takes it: a key made in the compiled program costs no dispatch.
    return np.asarray(_row_keys(np.int64(seed).astype(np.int32), n))


@partial(jax.jit, static_argnames="n")
def _row_keys(seed: jax.Array, n: int) -> jax.Array:
    key = jax.random.key(seed)
    return jax.random.key_data(jax.vmap(partial(jax.random.fold_in, key))(np.arange(n)))
