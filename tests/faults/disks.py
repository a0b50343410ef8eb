"""Faults of disks: a file of a checkpoint is damaged, a disk is full, a shard becomes shorter."""

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .trials import TOTAL_STEPS, Ground, Wrong

MIB = 2**20


def truncate(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(max(1, len(data)))])


def flip_bit(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "deleted": lambda path, _: path.unlink(),
    "truncated": truncate,
    "flipped": flip_bit,
}
# What nothing reads: the times of a save, and marks that are empty on a disk. Without its list of checksums an item
# is like one of an older version, which has none.
UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")
LIST = "checksums.json"


def files_of_checkpoint(workdir: Path) -> list[Path]:
    """Return the files of the newest checkpoint that are not empty, relative to the run's directory."""
    newest = workdir / "checkpoints" / str(TOTAL_STEPS)
    found = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(path.relative_to(workdir) for path in found)


def damage_file(how: str) -> Callable[[Ground, int], None]:
    """Return an injection that damages one file of the newest checkpoint, each trial another one."""

    def inject(ground: Ground, number: int) -> None:
        whole, training = ground.whole(), ground.new()
        shutil.copytree(whole.training.workdir, training.workdir)
        files = files_of_checkpoint(training.workdir)
        chosen = files[number % len(files)]
        DAMAGES[how](training.workdir / chosen, ground.chance)
        harmless = chosen.name in UNREAD or (how == "deleted" and chosen.name == LIST)
        row = f"a file of the newest checkpoint {how}"
        try:
            ground.finish(training, whole.wanted)
        except Wrong as error:
            ground.notes.append((row, False))
            raise Wrong(f"{chosen}: {error}") from None
        detected = (training.workdir / f"damaged-{TOTAL_STEPS}").exists()
        ground.notes.append((row, detected))
        if not detected and not harmless:
            raise Wrong(f"{chosen}: the damage was not noticed")

    return inject


def limit_files(ground: Ground, _: int) -> None:
    """No file can be longer than a checkpoint's: a write fails in the middle."""
    wanted, training = ground.whole().wanted, ground.new()
    longest = ground.chance.randrange(2_000, 150_000)
    code, errors = ground.run(training, fault={"limit": longest})
    ground.notes.append(("disk full: a limit on the length of files", code != 0))
    check_message(code, errors)
    ground.finish(training, wanted)


def fill_disk(when: str) -> Callable[[Ground, int], None]:
    """Return an injection that fills a small file system while something is written to it, and makes room later."""

    def inject(ground: Ground, _: int) -> None:
        more = ("--checkpoint.save_interval_steps=1000",) if when == "log" else ()
        wanted = ground.whole(*more).wanted
        disk = ground.folder / "disk"
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
        try:
            training = ground.new(*more, cache=disk / "cache" if when == "cache" else None)
            if when != "cache":
                training.workdir.symlink_to(disk / "run")
                (disk / "run").mkdir()
            times = ground.chance.randint(1, {"save": 5, "log": 30}.get(when, 1))
            phase = {"save": "save", "log": "data", "cache": "prepare", "start": "restore"}[when]
            code, errors = ground.run(training, fault={"fill": [phase, times, str(disk)]})
            ground.notes.append((f"disk full: {WHEN[when]}", code != 0))
            check_message(code, errors)
            (disk / "filler").unlink(missing_ok=True)
            ground.finish(training, wanted)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    return inject


WHEN = {
    "save": "during a save",
    "log": "while metrics are written",
    "cache": "while the token cache is written",
    "start": "while a run begins",
}


def check_message(code: int, errors: str) -> None:
    """Raise Wrong where a process that could not write ends with anything but one or two clear lines."""
    ours = [line for line in errors.splitlines() if "UserWarning: " not in line and "warnings.warn(" not in line]
    lines = [line for line in ours if not line.startswith(("note:", "warning:"))]  # JAX warns of its cache
    if code not in (0, 2) or (code == 2 and (len(lines) > 2 or "error: cannot write" not in errors)):
        raise Wrong(f"it ended with {code} and {len(lines)} lines: {errors.strip()[-300:]}")


def truncate_shard(ground: Ground, number: int) -> None:
    """A shard of prepared data becomes shorter while a run reads it, with and without workers, and is mended."""
    folder, workers = ground.folder / "prepared", number % 3
    if not folder.exists():
        words = ["data", "prepare", str(ground.corpus), f"--out={folder}", "--tokenizer=byte", "--workers=1"]
        subprocess.run([sys.executable, "-m", "gptjax", *words], check=True, capture_output=True)
    more = (f"--data.path={folder}",)
    wanted, training = ground.whole(*more).wanted, ground.new(*more)
    shard = next(folder.glob("train-*.tokens"))
    data = shard.read_bytes()
    process = training.start(f"--data.workers={workers}", "--distributed.stall_timeout_s=20")
    training.wait_for_step(ground.chance.randint(1, 30), process)
    with shard.open("r+b") as stream:
        stream.truncate(ground.chance.choice([0, 5000, 4096 * 3]))
    _, errors = process.communicate(timeout=120)
    shard.write_bytes(data)
    code = process.returncode
    ground.notes.append((f"a shard truncated, {workers} workers", code != 0))
    lines = [line for line in errors.splitlines() if "resource_tracker" not in line]  # it frees what workers shared
    if code not in (0, 2) or (code == 2 and (shard.name not in errors or len(lines) > 1)):
        raise Wrong(f"it ended with {code}: {errors.strip()[-300:]}")
    ground.finish(training, wanted)
