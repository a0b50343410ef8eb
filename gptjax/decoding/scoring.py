"""Log-probabilities of given continuations, many at a time.

Sequences are packed: several short ones share a row, each its own segment, and rows have a width of few powers of
two. So hardly any position is padding, and few programs are compiled. Requests that continue one context by one token
each share its forward pass. Logits are computed only where a token is scored.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine import power_of_two
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.nn.transformer import Inputs, bind_split, logits
from gptjax.sharding import constrain
from gptjax.tokenizers import Tokenizer

NARROWEST = 512  # tokens of a row at least, where the context has as many
AT_ONCE = 512  # positions whose logits are in memory at a time
BATCH_TOKENS = {"cpu": 2048}  # of one forward pass, by platform
BATCH_TOKENS_ELSEWHERE = 32768


class Score(NamedTuple):
    """What a model gives a continuation.

    Attributes:
        logprobs: [n] float32, natural log of each of its tokens' probability.
        greedy: whether each token is the likeliest one.
    """

    logprobs: np.ndarray
    greedy: bool


class Passage(NamedTuple):
    """A sequence to read, and the (request, target ids) pairs scored in it; targets follow its last positions."""

    ids: tuple[int, ...]
    scored: list[tuple[int, tuple[int, ...]]]


class Scorer:
    """Scores continuations under a model.

    Args:
        lm: the model.
        batch_tokens: tokens of one forward pass; None for the platform's default.
    """

    def __init__(self, lm: LanguageModel, batch_tokens: int | None = None):
        self.engine, self.context_length = lm.engine, lm.config.context_length
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_ELSEWHERE)
        self.row_multiple = 1 if lm.engine.mesh is None else lm.engine.mesh.size
        self._hidden = jax.jit(self._run_rows)
        self._read = jax.jit(self._score_positions)

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, Score]]:
        """Score (context ids, continuation ids) pairs; yield each one's number and score, longest sequences first.

        A context that is too long loses its first tokens, as in lm-eval.

        Raises:
            UserError: an empty context or continuation, or a continuation longer than the context length.
        """
        for width, rows in pack(self._sequences(requests), self.context_length):
            n = max(1, self.batch_tokens // width)
            n = -(-n // self.row_multiple) * self.row_multiple
            for start in range(0, len(rows), n):
                yield from self._score_batch(rows[start : start + n], n, width)

    def _sequences(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Passage]:
        found: dict[tuple[int, ...], Passage] = {}
        for number, (context, target) in enumerate(requests):
            if not len(context) or not len(target):
                raise UserError(
                    f"request {number} has an empty context or continuation; give each at least one token"
                )
            if len(target) > self.context_length:
                raise UserError(
                    f"a continuation of {len(target)} tokens exceeds the model's context of {self.context_length}"
                )
            ids = tuple([*context, *target][-(self.context_length + 1) :][:-1])
            found.setdefault(ids, Passage(ids, [])).scored.append((number, tuple(target)))
        return list(found.values())

    def _score_batch(self, rows: Sequence[list[Passage]], n: int, width: int) -> Iterator[tuple[int, Score]]:
        tokens, segments = np.zeros((n, width), np.int32), np.zeros((n, width), np.int32)
        positions = np.zeros((n, width), np.int32)
        places: list[tuple[int, int, int]] = []  # row, position and target of every scored token
        spans: list[tuple[int, int, int]] = []  # request, and its first and last place
        for row, sequences in enumerate(rows):
            end = 0
            for number, sequence in enumerate(sequences, 1):
                start, end = end, end + len(sequence.ids)
                tokens[row, start:end], segments[row, start:end] = sequence.ids, number
                positions[row, start:end] = np.arange(end - start)
                for request, target in sequence.scored:
                    spans.append((request, len(places), len(places) + len(target)))
                    places += [(row, end - len(target) + i, id) for i, id in enumerate(target)]
        with self.engine.on_mesh():
            x = self._hidden(self.engine.params, tokens, positions, segments)
            logprobs, greedy = self._read_all(x, np.array(places, np.int32))
        for request, first, last in spans:
            yield request, Score(logprobs[first:last], bool(greedy[first:last].all()))

    def _read_all(self, x: jax.Array, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for start in range(0, len(places), AT_ONCE):
            part = places[start : start + AT_ONCE]
            padded = np.zeros((max(16, power_of_two(len(part))), 3), np.int32)
            padded[: len(part)] = part
            logprobs, greedy = self._read(self.engine.params, x, padded)
            parts.append((np.asarray(logprobs)[: len(part)], np.asarray(greedy)[: len(part)]))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _run_rows(self, params, tokens, positions, segments):
        tokens, positions, segments = (constrain(a, "batch", None) for a in (tokens, positions, segments))
        return self.engine.run(params, Inputs(tokens, positions, segments))[1]

    def _score_positions(self, params, x, places):
        row, position, target = places.T
        rest, layers = params
        model = bind_split(self.engine.graphdef, rest, layers)
        raw = logits(model, model.readout(x[row, position][None]))[0]
        chosen = jnp.take_along_axis(raw, target[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(raw, axis=-1), jnp.argmax(raw, axis=-1) == target


def pack(sequences: Sequence[Passage], longest: int) -> list[tuple[int, list[list[Passage]]]]:
    """Place sequences in rows, each in the first row with room for it, longest first (first-fit decreasing).

    Args:
        longest: the widest row, the context length.

    Returns:
        (width, rows) pairs, widest first. A width is the least power of two that holds the longest sequence of its
        rows, at least NARROWEST.
    """
    by_width: dict[int, list[list[Passage]]] = {}
    rooms: list[tuple[int, list[Passage]]] = []  # of every row not full
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        length = len(sequence.ids)
        place = next((i for i, (room, _) in enumerate(rooms) if room >= length), None)
        if place is None:
            width = min(longest, max(NARROWEST, power_of_two(length)))
            row: list[Passage] = []
            by_width.setdefault(width, []).append(row)
            rooms.append((width, row))
            place = len(rooms) - 1
        room, row = rooms[place]
        row.append(sequence)
        rooms[place] = (room - length, row)
        if room - length < 8:
            del rooms[place]
    return sorted(by_width.items(), reverse=True)


def rolling_windows(ids: Sequence[int], first: int, width: int) -> list[tuple[list[int], list[int]]]:
    """Cut a text into (context, continuation) windows in which every token is scored once.

    As in lm-eval's rolling windows with a context of one token: each window but the last predicts `width` tokens from
    the token before; the last one's context is as long as the width allows.

    Args:
        ids: of the text.
        first: the id that the first token follows.
        width: the context length.
    """
    ids = list(ids)
    windows = [([first], ids[:width])] if ids else []
    for start in range(width, len(ids), width):
        end = min(start + width, len(ids))
        window = ids[max(0, end - width - 1) : end]
        windows.append((window[: len(window) - (end - start)], window[len(window) - (end - start) :]))
    return windows


def first_id(tokenizer: Tokenizer) -> int:
    """Return the id that the first token of a text follows: the beginning of a text, else the end of one, else 0."""
    bos = getattr(tokenizer, "bos_id", None)
    return (*tokenizer.eos_ids, 0)[0] if bos is None else bos


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation: those of the whole text, cut where the context's end.

    As in lm-eval, spaces at the context's end count to the continuation: many tokenizers join them to the next word.
    """
    text = context.rstrip()
    whole = tokenizer.encode_prompt(context + continuation).tolist()
    ids = tokenizer.encode_prompt(text).tolist() if text else []
    rest = whole[len(ids) :]
    return ids or [first_id(tokenizer)], rest
