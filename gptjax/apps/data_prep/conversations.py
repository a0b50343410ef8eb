"""`gptjax data inspect --kind sft` and `--kind preferences`: rows as they are trained on, with what is learnt."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.batches import examples_of
from gptjax.data.corpus import load_corpus
from gptjax.shell.display import colours_allowed, paint
from gptjax.tokenizers import Tokenizer

LEARNT, GIVEN = "green", "dim"  # colours


def describe_conversations(cfg: DataConfig, split: str, count: int, context_length: int, seed: int) -> dict[str, Any]:
    """Return counts of a source of conversations, and some of its rows.

    Args:
        split: train or val.
        count: rows to show.

    Raises:
        UserError: as `load_corpus`; no conversation fits the context.
    """
    corpus = load_corpus(cfg)
    source = corpus.sources[0]
    half = source.train if split == "train" else source.val
    examples = examples_of(half, context_length, split)
    rows = (examples.example(index, 0) for index in range(len(examples)))
    used, learnt = (sum(counts) for counts in zip(*map(_counts, rows), strict=True))
    chosen = np.random.default_rng(seed).choice(len(examples), min(count, len(examples)), replace=False)
    return {
        "path": cfg.path,
        "split": split,
        "rows": len(examples),
        "tokens": used,
        "learnt_tokens": learnt,
        "used_frac": used / (len(examples) * context_length),
        "notes": corpus.notes,
        "shown": [list(shown_parts(examples.example(int(i), 0), source.tokenizer)) for i in chosen],
    }


def _counts(example: dict[str, np.ndarray]) -> tuple[int, int]:
    """Return how many positions of a row hold a conversation, and how many of their targets are learnt."""
    used = sum((example["segments"] == segment).sum() for segment in conversations_in(example))
    return int(used), int((example["weights"] > 0).sum())


def conversations_in(example: dict[str, np.ndarray]) -> np.ndarray:
    """Return the segments of a row that hold a conversation: those with a learnt token."""
    return np.unique(example["segments"][example["weights"] > 0])


def shown_parts(example: dict[str, np.ndarray], tokenizer: Tokenizer) -> Iterator[list[dict[str, Any]]]:
    """Yield each conversation of a row as runs of text, special tokens by their names, learnt or not."""
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    for segment in conversations_in(example):
        inside = example["segments"] == segment
        ids = [int(example["tokens"][inside][0]), *example["targets"][inside].tolist()]
        learnt = [False, *(example["weights"][inside] > 0).tolist()]
        edges = [0, *(i for i in range(1, len(ids)) if learnt[i] != learnt[i - 1]), len(ids)]
        yield [
            {"text": text_with_names(ids[start:stop], tokenizer, names), "learnt": learnt[start]}
            for start, stop in itertools.pairwise(edges)
        ]


def text_with_names(ids: list[int], tokenizer: Tokenizer, names: dict[int, str]) -> str:
    """Return the text of ids, special tokens by their names."""
    pieces, run = [], []
    for id in [*ids, None]:
        if id is None or id in names:
            pieces += [tokenizer.decode(run), names.get(id, "")]
            run = []
        else:
            run.append(id)
    return "".join(pieces)


def in_colours(found: dict[str, Any]) -> str:
    """Return the same as text: what is learnt in one colour and the rest in another, or in «» without colours."""
    lines = [
        f"{found['path']} ({found['split']}): {found['tokens']:,} positions in {found['rows']:,} rows, "
        f"{found['used_frac']:.1%} used; {found['learnt_tokens']:,} tokens are learnt",
        *(f"note: {note}" for note in found["notes"]),
        f"{paint('learnt', LEARNT)} and {paint('given', GIVEN)}" if colours_allowed() else "learnt is in «»",
    ]
    for number, row in enumerate(found["shown"], 1):
        for part, runs in enumerate(row, 1):
            lines += ["", f"row {number}, conversation {part}", "".join(map(_marked, runs))]
    return "\n".join(lines)


def _marked(run: dict[str, Any]) -> str:
    if colours_allowed():
        return paint(run["text"], LEARNT if run["learnt"] else GIVEN)
    return f"«{run['text']}»" if run["learnt"] else run["text"]
