"""Measure how fast texts become token ids: into a run's cache, by `gptjax data prepare`, and by libraries alone."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from gptjax.apps.bench.pairs import spread_of
from gptjax.configfile import config_from_dict
from gptjax.errors import UserError


def measure_loading(tokenizer: str, path: str, times: int, batch: int, context: int) -> dict[str, float]:
    """Return the text's size in MB, MB per second into an empty token cache, and batches delivered per second."""
    from gptjax.data.batches import Batches, training_examples
    from gptjax.data.corpus import load_corpus

    seconds, rates = [], []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as cache:
            read = {"path": path, "tokenizer": tokenizer, "cache_dir": cache}
            cfg = config_from_dict({"workdir": "-", "data": read})
            began = time.perf_counter()
            corpus = load_corpus(cfg.data)
            seconds.append(time.perf_counter() - began)
            batches = Batches(training_examples(corpus, cfg.data, context, batch, 0), batch, range(batch))
            rates.append(_delivered(batches, 4000))
    source = corpus.sources[0]
    # Bytes of the whole text, from those of its validation part.
    text_mb = source.val_bytes / len(source.val) * (source.train_tokens + len(source.val)) / 1e6
    rate = text_mb / statistics.median(seconds)
    return {"text_mb": text_mb, "mb_per_s": rate, "delivered_per_s": statistics.median(rates)}


def _delivered(batches: Any, count: int) -> float:
    """Return the batches per second that a run's data loader delivers without training."""
    incoming = batches.iterate(0, prefetch=8)
    next(incoming)
    began = time.perf_counter()
    for _ in range(count):
        next(incoming)
    incoming.close()
    return count / (time.perf_counter() - began)


def read_texts(path: str) -> list[str]:
    """Return the documents of a source that have text."""
    from gptjax.data.reading import Reading, documents
    from gptjax.data.sources import list_files, pieces_of

    pieces = pieces_of([list_files(path).files], Reading(), val_frac=0)
    return [document.text for piece in pieces for document in documents(piece, Reading()) if document.text]


def encode_beside_tiktoken(tokenizer: str, path: str, pairs: int) -> dict[str, Any]:
    """Return the ratios of pairs: seconds of tiktoken's encode_ordinary_batch by those of a load into the cache.

    Raises:
        UserError: the tokenizer is none of tiktoken's.
    """
    from gptjax.data.corpus import load_corpus
    from gptjax.tokenizers import TiktokenTokenizer, make_tokenizer

    made, texts = make_tokenizer(tokenizer, []), read_texts(path)
    if not isinstance(made, TiktokenTokenizer):
        raise UserError(f"peer tiktoken cannot run tokenizer {tokenizer!r}; give gpt2, cl100k or o200k")

    def load() -> None:
        with tempfile.TemporaryDirectory() as cache:
            read = {"path": path, "tokenizer": tokenizer, "cache_dir": cache}
            load_corpus(config_from_dict({"workdir": "-", "data": read}).data)

    return spread_of([_seconds(lambda: made.encode_by_tiktoken(texts)) / _seconds(load) for _ in range(pairs)])


def prepare_beside_the_tokenizer(tokenizer: str, path: str, pairs: int) -> dict[str, Any]:
    """Return MB of text per second of `gptjax data prepare` and of its tokenizer alone, and the share of the latter.

    Raises:
        UserError: the command failed.
    """
    from gptjax.tokenizers import make_tokenizer

    texts = read_texts(path)
    text_mb = sum(len(text.encode()) for text in texts) / 1e6
    alone, whole = [], []
    for _ in range(pairs):
        made = make_tokenizer(tokenizer, [])  # anew: what it remembers of the texts would make it faster
        alone.append(_seconds(lambda made=made: made.encode_batch(texts)))
        whole.append(_seconds(lambda: _prepare(tokenizer, path)))
    return {
        "text_mb": text_mb,
        "prepare_mb_per_s": text_mb / statistics.median(whole),
        "tokenizer_mb_per_s": text_mb / statistics.median(alone),
        "share": spread_of([a / w for a, w in zip(alone, whole, strict=True)]),
    }


def _prepare(tokenizer: str, path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gptjax", "data", "prepare", path, "--tokenizer", tokenizer]
        command += ["--out", os.path.join(folder, "out")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"gptjax data prepare failed: {done.stderr.strip()[-300:]}")


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
