"""Damage files of models, tokenizers and corpora at random, and read them: each is read, or refused in one line.

`python tests/malformed_files.py [TRIALS [SEED]]` prints how many of each kind were read and refused, the largest
memory, and every other outcome with the number of its trial.
"""

import contextlib
import io
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptjax import load
from gptjax.config import DataConfig
from gptjax.data.corpus import load_corpus
from gptjax.errors import UserError

ROOT = Path(__file__).parent.parent
LONGEST_S = 5.0


def damage(data: bytes, chance: random.Random) -> bytes:
    """Return data with one to three random changes, most of them near the start, where headers are."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(max(1, min(len(data), chance.choice([64, 2000, len(data) + 1]))))
        end = at + chance.choice([1, 1, 4, 8, 100])
        how = chance.randrange(6)
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = data[:at] + chance.randbytes(end - at) + data[end:]
        elif how == 2:
            data = data[:at] + chance.choice([b"\xff", b"\x00"]) * (end - at) + data[end:]
        elif how == 3:
            data = data[:at] + data[at:end] * chance.choice([2, 1000]) + data[end:]
        elif how == 4:
            data = data[:at] + data[end:]
        else:
            words = [b"null", b"-1", b"1e999", b"99999999999999999999", b'"\\ud800"', b"[" * 3000, b"{}", b"NaN"]
            data = data[:at] + chance.choice(words) + data[end:]
    return data


def make_files(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Return for each kind a sound file, and what reads a folder in which it is damaged."""
    run, text = folder / "run", folder / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 100)
    tiny = ("--model.n_layers=1", "--model.d_model=32", "--train.total_steps=1", "--data.tokenizer=byte")
    tiny += ("--model.positions=rope", "--model.norm=rmsnorm", "--model.mlp=swiglu", "--model.bias=false")  # as Llama
    for words in (
        [
            "train.py",
            "configs/debug.yaml",
            *tiny,
            f"--data.path={text}",
            f"--data.cache_dir={folder}",
            f"--workdir={run}",
        ],
        ["-m", "gptjax", "convert", "to-hf", str(run), f"--out={folder / 'hf'}"],
        ["-m", "gptjax", "convert", "to-gguf", str(run), f"--out={folder / 'gguf' / 'model.gguf'}"],
    ):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    rows = [{"text": f"to be or not to be, {n}"} for n in range(200)]
    corpora = folder / "corpora"
    corpora.mkdir()
    (corpora / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (corpora / "text.txt").write_text("".join(row["text"] + "\n" for row in rows))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), corpora / "rows.parquet")
    kinds = {name: (corpora / name, read_corpus(name)) for name in ("rows.jsonl", "text.txt", "rows.parquet")}
    kinds["gguf"] = (folder / "gguf" / "model.gguf", lambda copy: load(str(copy / "model.gguf")))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        kinds[name] = (folder / "hf" / name, lambda copy: load(str(copy)).tokenizer.encode("to be"))
    return kinds


def read_corpus(name: str) -> Callable[[Path], object]:
    """Return what tokenizes a file of a folder and reads all of it."""

    def read(copy: Path) -> object:
        corpus = load_corpus(DataConfig(path=str(copy / name), tokenizer="byte", cache_dir=str(copy / "cache")))
        return np.asarray(corpus.sources[0].train[:]).sum()

    return read


def try_one(
    folder: Path, kinds: dict[str, tuple[Path, Callable]], number: int, chance: random.Random
) -> tuple[str, str]:
    """Return the kind of a trial, and what came of it: read, refused, or what else."""
    kind = list(kinds)[number % len(kinds)]
    file, read = kinds[kind]
    copy = folder / "copy"
    shutil.copytree(file.parent, copy)
    (copy / file.name).write_bytes(damage(file.read_bytes(), chance))
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read(copy)
        outcome = "read"
    except UserError as error:
        outcome = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"a message of lines: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(copy)
    took_s = time.monotonic() - began
    return kind, outcome if took_s < LONGEST_S else f"{took_s:.0f} s: {outcome}"


def main(trials: int, seed: int) -> int:
    """Print the table; return 1 where a file was neither read nor refused."""
    counts: Counter[tuple[str, str]] = Counter()
    problems = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = make_files(folder)
        for file, read in kinds.values():
            read(file.parent)  # as they are
        for number in range(trials):
            kind, outcome = try_one(folder, kinds, number, random.Random(f"{seed} {number}"))
            counts[kind, outcome if outcome in ("read", "refused") else "other"] += 1
            if outcome not in ("read", "refused"):
                problems.append(f"{kind}, trial {number}: {outcome}")
    for kind in kinds:
        shown = ", ".join(f"{counts[kind, outcome]} {outcome}" for outcome in ("read", "refused", "other"))
        print(f"{kind}: {shown}")
    print(f"largest memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*[int(word) for word in [*sys.argv[1:], *("2000", "0")[len(sys.argv) - 1 :]]]))
