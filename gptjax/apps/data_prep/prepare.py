"""`gptjax data prepare`: tokenize sources into shards of token ids, on all cores, resumable after any interruption.

Three phases, each a function of the sources only, so that neither the number of workers nor a kill changes a byte:

1. The plan cuts the sources into units of work (sources.py) and is written before anything else.
2. Workers tokenize units, in any order. A unit's files count once its marker is there, which is written last.
3. Duplicates are found, and the units' documents are copied in order into shards. The manifest is written last.
"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gptjax.apps.data_prep.commit import DOCUMENT, UnitFiles, find_duplicates, write_shards
from gptjax.data.corpus import DOCUMENT_END, separates
from gptjax.data.encoding import encode_documents
from gptjax.data.formats import SourceFile
from gptjax.data.reading import Piece, Reading, documents, readable
from gptjax.data.shards import MANIFEST, MANIFEST_FORMAT, TOKENIZER, WORK, check_files, load_manifest
from gptjax.data.sources import DOWNLOADS, UNIT_BYTES, list_files, pieces_of, units_of
from gptjax.errors import UserError
from gptjax.shell.files import changed_at, write_atomically
from gptjax.shell.paths import UserPath, local_path
from gptjax.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_dict

SPARED_BYTES = 2**30  # of the sources: more unfinished work than this, on other options, is never deleted
ORIGIN = ".plan"  # file in the output: hash of its plan, which includes the times of its sources


class Options(NamedTuple):
    """What decides the output, besides sources and tokenizer.

    Attributes:
        val_frac: share of the documents that are for validation.
        pack_length: positions of a packed row; None where documents are concatenated.
        skip_bad: omit documents that cannot be read.
        licence: for the manifest.
    """

    reading: Reading
    val_frac: float
    pack_length: int | None
    skip_bad: bool
    licence: str | None


def prepare(
    sources: list[UserPath],
    out: UserPath,
    tokenizer: UserPath = "gpt2",
    text_field: str = "text",
    separator: str | None = None,
    val_frac: float = 0.005,
    pack_length: int | None = None,
    skip_bad: bool = False,
    licence: str | None = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Tokenize text into shards that training reads. The same command resumes after an interruption.

    Args:
        sources: text, .jsonl, .parquet or .arrow files, plain, .gz or .zst; folders of them, saved Hugging Face
            datasets among them; gs:// or s3:// addresses; shakespeare; or tinyshakespeare.
        out: the folder to write.
        tokenizer: gpt2, cl100k, o200k, byte, char, or the path of a tokenizer.json or Hugging Face directory.
        text_field: the field of a JSON line, or the column, that holds a document's text.
        separator: the text between documents in text files, such as <|endoftext|>; without it a file is one document.
        val_frac: share of the documents kept for validation, chosen by their hash; of a single text file its end.
        pack_length: pack whole documents into rows of this many positions, the model's context_length; without it
            documents are concatenated and windows are cut anywhere.
        skip_bad: leave out and count documents that cannot be read, instead of stopping at the first.
        licence: the sources' licence, recorded in the manifest.
        workers: number of processes; the default is one for each core.
        json: print the manifest's counts as JSON.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    options = Options(Reading(text_field, separator), val_frac, pack_length, skip_bad, licence)
    manifest = prepare_data(sources, out, tokenizer, options, workers or os.cpu_count() or 1)
    print(_json(summary(out, manifest)) if json else describe(out, manifest))


def _json(values: Any) -> str:
    return json.dumps(values, indent=1)


def summary(out: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest's counts, without its files."""
    splits = {name: {**facts, "shards": len(facts["shards"])} for name, facts in manifest["splits"].items()}
    return {"out": out, "counts": manifest["counts"], "splits": splits, "fingerprint": manifest["fingerprint"]}


def describe(out: str, manifest: dict[str, Any]) -> str:
    """Return a manifest's counts as text."""
    lines = [f"{out} is prepared (tokenizer {manifest['tokenizer']['name']}):"]
    for name, facts in manifest["splits"].items():
        line = f"  {name:5} {facts['tokens']:,} tokens in {facts['documents']:,} documents"
        if manifest["options"]["pack_length"]:
            line += f", {facts['rows']:,} rows with {facts['used_frac']:.2%} of their positions used"
        lines.append(line)
    words = {"duplicates": "duplicates", "empty": "empty", "bad": "not readable"}
    lines.append("  left out: " + ", ".join(f"{manifest['counts'][key]:,} {word}" for key, word in words.items()))
    return "\n".join(lines)


def prepare_data(
    sources: list[str],
    out: str,
    tokenizer: str,
    options: Options,
    workers: int = 1,
) -> dict[str, Any]:
    """Run `prepare` from Python, and return the manifest.

    Raises:
        UserError: sources that cannot be read, invalid options, a full disk, or a folder that holds other data.
    """
    if not 0 < options.val_frac < 1:
        raise UserError(f"val_frac {options.val_frac} must lie between 0 and 1")
    if options.pack_length is not None and options.pack_length < 2:
        raise UserError(f"pack_length {options.pack_length} must be at least 2")
    folder = local_path(out)
    with _writing_to(folder), _locked(folder):
        plan = make_plan(sources, tokenizer, options)
        if (folder / MANIFEST).exists():
            manifest = load_manifest(folder)
            if (folder / ORIGIN).read_text() != _identity(plan):
                raise UserError(
                    f"{folder} holds data of other sources or options, or its sources have changed; remove it, or "
                    "give another --out"
                )
            check_files(folder, manifest)
            shutil.rmtree(folder / WORK, ignore_errors=True)
            return manifest
        work = folder / WORK
        start_work(work, plan, tokenizer, options)
        tokenize_units(work, plan, options, workers)
        manifest = commit(folder, plan, options)
        shutil.rmtree(work)
    return manifest


def make_plan(sources: list[str], tokenizer: str, options: Options) -> dict[str, Any]:
    """Return everything that the output depends on, as plain values: sources, options, and the units of work.

    Raises:
        UserError: a source that cannot be read.
    """
    made = None if tokenizer == "char" else make_tokenizer(tokenizer, [])
    listed = [list_files(source) for source in sources]
    for note in [note for listing in listed for note in listing.notes]:
        print(f"note: {note}", file=sys.stderr)
    files = [listing.files for listing in listed]
    licence = options.licence or "; ".join(sorted({DOWNLOADS[s].licence for s in sources if s in DOWNLOADS})) or None
    units = units_of(pieces_of(files, options.reading, options.val_frac))
    sizes = [sum(p.size for unit in units for p in unit if p.source == i) for i in range(len(sources))]
    return {
        "format": MANIFEST_FORMAT,
        "tokenizer": tokenizer,
        "tokenizer_spec": None if made is None else _identity(made.to_dict()),
        "options": {
            **options.reading._asdict(),
            "val_frac": options.val_frac,
            "pack_length": options.pack_length,
            "skip_bad": options.skip_bad,
        },
        "licence": licence,
        # The tokenizer has no token for the end of a document, and there are several documents.
        **({"separated": True} if separates(made, list(chain(*files)), options.reading.separator) else {}),
        "sources": [
            {"path": source, "files": len(found), "bytes": size}
            for source, found, size in zip(sources, files, sizes, strict=True)
        ],
        "units": [[list(piece) for piece in unit] for unit in units],
        "changed": [_newest(found) for found in files],
    }


def _newest(files: list[SourceFile]) -> int:
    """Return when the newest of these files was changed. (The plan also has the files' number and sizes.)"""
    with readable(files[0].path):
        return max(changed_at(file.path) for file in files)


def _identity(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def start_work(work: Path, plan: dict[str, Any], tokenizer: str, options: Options) -> None:
    """Write the plan and the tokenizer, or check that the existing work has the same plan.

    Raises:
        UserError: the existing work has another plan, and has read more than SPARED_BYTES.
    """
    path = work / "plan.json"
    if path.exists():
        if path.read_text() == json.dumps(plan):
            return
        if len(list(work.glob("unit-*.json"))) * UNIT_BYTES > SPARED_BYTES:
            raise UserError(
                f"{work} holds unfinished work on other sources or options, or its sources have changed; remove it "
                "to start again, or give another --out"
            )
        print(f"note: {work} is deleted and started again: sources or options have changed", file=sys.stderr)
    if work.exists():  # a kill during the lines below may have left it without a plan
        path.unlink(missing_ok=True)  # first, since no file counts without the plan
        shutil.rmtree(work)
    work.mkdir()
    texts = (d.text for unit in plan["units"] for piece in unit for d in _readable_only(Piece(*piece), options))
    texts = chain(texts, [DOCUMENT_END] if "separated" in plan else [])
    write_atomically(work / TOKENIZER, json.dumps(make_tokenizer(tokenizer, texts).to_dict()).encode())
    write_atomically(path, json.dumps(plan).encode())


def _readable_only(piece: Piece, options: Options) -> Iterator[Any]:
    return documents(piece, options.reading, *([lambda message: None] if options.skip_bad else []))


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Raise a UserError for an error of the filesystem about the output."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        where, reason = error.filename or folder, error.strerror or error
        remedy = "give another --out"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder).free
            remedy = f"{free / 1e9:.1f} GB are free: make room and run the same command to resume"
        raise UserError(f"cannot write to {where}: {reason}; {remedy}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it when the process ends, for whatever reason."""
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {folder}; wait for it, or give another --out") from None
        yield


# ---------------------------------------------------------------------------------------------------------------
# Units, in worker processes


def tokenize_units(work: Path, plan: dict[str, Any], options: Options, workers: int) -> None:
    """Tokenize every unit that is not finished yet.

    Raises:
        UserError: a document that cannot be read, a full disk, or a worker that was killed.
    """
    units, separated = [[Piece(*values) for values in unit] for unit in plan["units"]], "separated" in plan
    sizes = [sum(piece.size for piece in unit) for unit in units]
    left = [number for number in range(len(sizes)) if not UnitFiles(work, number).whole()]
    report = Progress(sum(sizes), sum(sizes) - sum(sizes[n] for n in left))
    if min(workers, len(left)) <= 1:
        for number in left:
            tokenize_unit(work, number, units[number], options, separated)
            report.add(sizes[number])
        report.close()
        return
    context = multiprocessing.get_context("spawn")  # a fork may inherit locks of the tokenizers' threads
    with ProcessPoolExecutor(min(workers, len(left)), context, end_with_parent) as pool:
        waiting, running = iter(left), {}
        try:
            while True:
                for number in waiting:
                    running[pool.submit(tokenize_unit, work, number, units[number], options, separated)] = number
                    if len(running) == 2 * workers:
                        break
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    _result(future)
                    report.add(sizes[running.pop(future)])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    report.close()


def _result(future: Future) -> None:
    try:
        future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps for lack of memory; run the same command with fewer --workers to resume"
        ) from None


def end_with_parent() -> None:
    """Make this worker exit when its parent is killed, and use one thread, since there is a worker for each core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _read_tokenizer(path: Path) -> Tokenizer:
    return tokenizer_from_dict(json.loads(path.read_text()))


def tokenize_unit(work: Path, number: int, pieces: list[Piece], options: Options, separated: bool) -> None:
    """Tokenize one unit. Its files are renamed into place whole, the marker last.

    Args:
        separated: whether DOCUMENT_END follows each document, in place of an end-of-text token.

    Raises:
        UserError: a document that cannot be read.
    """
    tokenizer, files = _read_tokenizer(work / TOKENIZER), UnitFiles(work, number)
    counts = {"documents": 0, "tokens": 0, "empty": 0, "bad": 0}
    examples: list[str] = []
    digests: list[tuple[int, str]] = []

    def complain(message: str) -> None:
        if not options.skip_bad:
            raise UserError(f"{message}; --skip_bad leaves such documents out")
        counts["bad"] += 1
        examples.extend([message] if len(examples) < 3 else [])

    end = np.zeros(0, np.int32) if tokenizer.eos_id is None else np.array([tokenizer.eos_id], np.int32)
    end = tokenizer.encode(DOCUMENT_END) if separated else end
    with files.writing(tokenizer.vocab_size) as write:
        for piece in pieces:
            digest = hashlib.sha256()
            read = documents(piece, options.reading, complain)
            for texts, ids, lengths, empty in encode_documents(read, tokenizer, end):
                counts["empty"] += empty
                facts = _facts(texts, lengths)
                by_hash = facts["hash"][:, 0] < np.uint64(options.val_frac * 2**64)
                facts["validation"] = by_hash if piece.validation is None else piece.validation
                digest.update(facts["hash"].tobytes())
                counts["documents"] += len(texts)
                counts["tokens"] += len(ids)
                write(ids, facts)
            digests.append((piece.source, digest.hexdigest()))
    marker = {**counts, "examples": examples, "pieces": digests}
    write_atomically(files.marker, json.dumps(marker).encode())


def _facts(texts: list[str], lengths: np.ndarray) -> np.ndarray:
    """Return what the commit needs of documents, DOCUMENT [n], all for training; `lengths` are in tokens."""
    encoded = [text.encode() for text in texts]
    hashes = b"".join(hashlib.blake2b(data, digest_size=16).digest() for data in encoded)
    facts = np.zeros(len(texts), DOCUMENT)
    facts["hash"] = np.frombuffer(hashes, "<u8").reshape(-1, 2)
    facts["text_bytes"] = np.fromiter(map(len, encoded), np.int64, len(encoded))
    facts["tokens"] = lengths
    return facts


class Progress:
    """Reports how much is read, how fast, and the remaining time: a bar on a terminal, lines elsewhere."""

    def __init__(self, total_bytes: int, done_bytes: int):
        self.bar = tqdm(
            total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
        )
        self.total, self.done, self.before = total_bytes, done_bytes, done_bytes
        self.began_at = self.reported_at = time.perf_counter()
        if done_bytes:
            print(f"note: resuming after {done_bytes / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB", file=sys.stderr)

    def add(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if self.bar.disable and time.perf_counter() - self.reported_at >= 10:
            self.reported_at = time.perf_counter()
            self._print_line()

    def _print_line(self) -> None:
        rate = (self.done - self.before) / (time.perf_counter() - self.began_at)
        left = f", {(self.total - self.done) / rate:,.0f} s left" if self.done < self.total else ""
        line = f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s{left}"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
        if self.done > self.before:
            self._print_line()


# ---------------------------------------------------------------------------------------------------------------
# The end


def commit(folder: Path, plan: dict[str, Any], options: Options) -> dict[str, Any]:
    """Turn tokenized units into shards and a manifest.

    Raises:
        UserError: a split without documents.
    """
    work = folder / WORK
    units = [UnitFiles(work, number) for number in range(len(plan["units"]))]
    markers = [json.loads(unit.marker.read_text()) for unit in units]
    counts = {key: sum(marker[key] for marker in markers) for key in ("documents", "tokens", "empty", "bad")}
    for message in list(chain.from_iterable(marker["examples"] for marker in markers))[:5]:
        print(f"left out: {message}", file=sys.stderr)
    spec = (work / TOKENIZER).read_bytes()
    tokenizer = tokenizer_from_dict(json.loads(spec))
    dropped, duplicates = find_duplicates(work, units, [marker["documents"] for marker in markers])
    splits = {
        name: write_shards(folder, name, units, dropped, tokenizer.vocab_size, options.pack_length)
        for name in ("train", "val")
    }
    paths = ", ".join(source["path"] for source in plan["sources"])
    if not counts["documents"]:
        raise UserError(f"{paths} is empty: there is no text in it")
    same = f" ({duplicates:,} duplicates are left out)" if duplicates else ""
    for name, remedy in (("train", "lower"), ("val", "raise")):
        if not splits[name]["tokens"]:
            raise UserError(
                f"none of the {counts['documents'] - duplicates:,} documents of {paths} are in the split "
                f"{name}{same}; {remedy} --val_frac {options.val_frac}, or give a --separator if a text file holds "
                "many documents"
            )
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "tokenizer": {
            "name": plan["tokenizer"],
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "sha256": hashlib.sha256(spec).hexdigest(),
        },
        "dtype": np.dtype(units[0].dtype(tokenizer.vocab_size)).name,
        "licence": plan["licence"],
        "options": plan["options"],
        "sources": [
            # A hash of the documents, not of the files, so that recompressing a source does not change it.
            {**source, "sha256": _chained(d for m in markers for s, d in m["pieces"] if s == number)}
            for number, source in enumerate(plan["sources"])
        ],
        "counts": {**counts, "duplicates": duplicates},
        "splits": splits,
    }
    contents = [shard["files"] for split in splits.values() for shard in split["shards"]]
    manifest["fingerprint"] = _identity({"shards": contents, "tokenizer": manifest["tokenizer"]["sha256"]})[:20]
    write_atomically(folder / TOKENIZER, spec)
    write_atomically(folder / ORIGIN, _identity(plan).encode())
    write_atomically(folder / MANIFEST, _json(manifest).encode())
    return manifest


def _chained(digests: Iterator[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
