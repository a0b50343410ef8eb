"""`gptjax data inspect`: what a prepared folder contains, and what looks wrong with it."""

import hashlib
import json as json_library
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptjax.apps.data_prep.conversations import describe_conversations, in_colours, text_with_names
from gptjax.config import DataConfig
from gptjax.data.shards import Split, check_files, is_prepared, load_manifest, load_tokenizer
from gptjax.errors import UserError
from gptjax.shell.display import table
from gptjax.shell.paths import UserPath, user_path
from gptjax.tokenizers import Tokenizer

SAMPLED_TOKENS = 2**26  # of a split, spread evenly: enough for shares of a percent, seconds to read
SAMPLED_DOCUMENTS = 2**20
OPENING = 32  # tokens by which documents are compared
SHORT = 16  # tokens; shorter documents are reported
NOTABLE = 0.02  # smallest share that is reported


def inspect(
    folder: UserPath,
    split: str = "train",
    windows: int = 2,
    context_length: int = 128,
    top: int = 20,
    seed: int = 0,
    verify: bool = False,
    kind: str = "text",
    tokenizer: UserPath | None = None,
    chat_template: UserPath | None = None,
    train_on: Literal["responses", "all"] = "responses",
    json: bool = False,
) -> None:
    """Print what a prepared folder contains: documents, lengths, frequent tokens, and windows as the model sees them.

    Of conversations, print rows with the tokens that are learnt in another colour.

    Args:
        folder: what gptjax data prepare wrote; with --kind sft, files of conversations.
        split: train or val.
        windows: how many windows to show.
        context_length: their length in tokens; rows of packed data have their own.
        top: how many of the most frequent tokens to show.
        seed: chooses the windows.
        verify: first compare every file with its checksum.
        kind: text, or sft for conversations, read as data.kind sft reads them.
        tokenizer: of conversations, as data.tokenizer.
        chat_template: of conversations, as data.chat_template.
        train_on: of conversations, as data.train_on.
        json: print all of it as JSON.
    """
    if kind != "text":
        cfg = DataConfig(folder, kind, tokenizer=tokenizer, chat_template=chat_template, train_on=train_on)
        described = describe_conversations(cfg, split, windows, context_length, seed)
        print(json_library.dumps(described, indent=1, ensure_ascii=False) if json else in_colours(described))
        return
    if not is_prepared(folder):
        raise UserError(f"{folder!r} is not a folder that gptjax data prepare finished; give its --out")
    path = Path(user_path(folder))
    manifest = load_manifest(path)
    if split not in manifest["splits"]:
        raise UserError(f"--split {split!r} is not known; there are: {', '.join(manifest['splits'])}")
    check_files(path, manifest, hashes=True if verify else None)
    made_by = load_tokenizer(path, manifest)
    half = Split(path, manifest, split)
    lengths = document_lengths(half)
    found = {
        "folder": folder,
        "split": split,
        **{key: manifest[key] for key in ("tokenizer", "licence", "options", "sources", "counts")},
        "tokens": len(half.tokens),
        "documents": half.documents,
        "bytes_per_token": half.text_bytes / len(half.tokens),
        "length_histogram": histogram(lengths),
        "top_tokens": frequent_tokens(half, made_by, top),
        "warnings": warnings(half, manifest, lengths),
        "windows": list(shown_windows(half, made_by, windows, context_length, seed)),
    }
    print(json_library.dumps(found, indent=1, ensure_ascii=False) if json else in_words(found))


def document_lengths(half: Split) -> np.ndarray:
    """Return the lengths in tokens of the documents (of their parts, in packed data), of at most SAMPLED_DOCUMENTS a
    shard.
    """
    ends = [half.document_ends(number)[:SAMPLED_DOCUMENTS] for number in range(len(half.paths))]
    return np.concatenate([np.diff(some, prepend=0) for some in ends])


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Return how many documents have a length in each interval from a power of two up to the next."""
    classes = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    return [{"from": 2**i, "below": 2 ** (i + 1), "documents": int(n)} for i, n in enumerate(classes) if n]


def frequent_tokens(half: Split, tokenizer: Tokenizer, top: int) -> list[dict[str, Any]]:
    """Return the most frequent tokens of SAMPLED_TOKENS, with their share of all."""
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    parts = 64
    step = max(1, len(half.tokens) // parts)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(half.tokens), step):
        some = half.tokens[start : start + min(step, SAMPLED_TOKENS // parts)]
        counts += np.bincount(some, minlength=tokenizer.vocab_size)
    order = np.argsort(-counts, kind="stable")[:top]
    return [
        {
            "id": int(i),
            "text": names.get(int(i)) or tokenizer.decode([int(i)]),
            "frac": float(counts[i] / counts.sum()),
        }
        for i in order
        if counts[i]
    ]


def warnings(half: Split, manifest: dict[str, Any], lengths: np.ndarray) -> list[str]:
    """Return what a user should know before training on a folder."""
    found = []
    counts = manifest["counts"]
    for key, what in (("duplicates", "repeated others and were dropped"), ("bad", "could not be read")):
        total = counts["documents"] + counts["bad"]
        if counts[key] >= NOTABLE * total:
            found.append(f"{counts[key] / total:.1%} of the sources' documents {what}")
    if (share := repeated_openings(half)) >= NOTABLE:
        found.append(f"{share:.1%} of the documents begin with the same {OPENING} tokens as another: boilerplate?")
    if (share := float((lengths < SHORT).mean())) >= NOTABLE:
        found.append(f"{share:.1%} of the documents have fewer than {SHORT} tokens")
    used = manifest["splits"]["train"].get("used_frac", 1.0)
    if used < 0.98:
        found.append(f"{1 - used:.1%} of the packed positions are empty; a longer --pack_length wastes less")
    return found


def repeated_openings(half: Split) -> float:
    """Return the share of the documents of at least OPENING tokens whose first OPENING tokens another document
    shares.
    """
    openings: dict[bytes, int] = {}
    for number in range(len(half.paths)):
        base = int(half.tokens.ends[number]) - half.shards[number]["tokens"]
        starts = np.concatenate([[0], half.document_ends(number)[:SAMPLED_DOCUMENTS]])
        for start in starts[:-1][np.diff(starts) >= OPENING] + base:
            data = half.tokens[int(start) : int(start) + OPENING].tobytes()
            key = hashlib.blake2b(data, digest_size=8).digest()
            openings[key] = openings.get(key, 0) + 1
    return sum(n for n in openings.values() if n > 1) / max(1, sum(openings.values()))


def shown_windows(half: Split, tokenizer: Tokenizer, count: int, length: int, seed: int) -> Iterator[list[str]]:
    """Yield windows as the model reads them, each as the texts of its documents, special tokens by their names."""
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    rng = np.random.default_rng(seed)
    for _ in range(count):
        if half.rows:
            ids, lengths = half.row(int(rng.integers(half.rows)))
        else:
            start = int(rng.integers(max(1, len(half.tokens) - length)))
            ids = half.tokens[start : start + length]
            ends = np.flatnonzero(ids == tokenizer.eos_id) + 1 if tokenizer.eos_id is not None else []
            lengths = np.diff([0, *ends, *([] if len(ends) and ends[-1] == len(ids) else [len(ids)])])
        yield [text_with_names(part.tolist(), tokenizer, names) for part in np.split(ids, np.cumsum(lengths)[:-1])]


def in_words(found: dict[str, Any]) -> str:
    """Return the same as text for a reader."""
    made_by = f"tokenizer {found['tokenizer']['name']}, licence {found['licence'] or 'not stated'}"
    lines = [
        f"{found['folder']} ({found['split']}): {found['tokens']:,} tokens in {found['documents']:,} documents, "
        f"{found['bytes_per_token']:.2f} bytes a token, {made_by}",
        "left out: {duplicates:,} duplicates, {empty:,} empty, {bad:,} not readable".format(**found["counts"]),
        *(f"warning: {warning}" for warning in found["warnings"]),
        "",
        "tokens a document",
    ]
    most = max(row["documents"] for row in found["length_histogram"])
    bars = [
        (
            f"{row['from']:,}",
            f"{row['below'] - 1:,}",
            f"{row['documents']:,}",
            "█" * round(40 * row["documents"] / most),
        )
        for row in found["length_histogram"]
    ]
    lines += table(bars, ("from", "to", "documents", ""), left=(-1,))
    tokens = [(repr(row["text"]), str(row["id"]), f"{row['frac']:.2%}") for row in found["top_tokens"]]
    lines += ["", "most frequent tokens", *table(tokens, ("token", "id", "share"))]
    packed = found["options"]["pack_length"] is not None
    for number, window in enumerate(found["windows"], 1):
        lines += ["", f"{'row' if packed else 'window'} {number}"]
        for text in window:
            lines += [f"--- document ({'attention ends here' if packed else 'in the same window'})", text]
    return "\n".join(lines)
