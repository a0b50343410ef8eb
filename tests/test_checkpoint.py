"""What counts as a damaged checkpoint, and what does not; tests/pod has the same for several processes."""

import gc
import os
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from conftest import ROOT

from gptjax.checkpoint import Checkpoints, newest_sound, read_newest
from gptjax.config import CheckpointConfig
from gptjax.errors import UserError

STATE = {"weights": jnp.arange(600, dtype=jnp.float32), "bias": jnp.ones(3)}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run's directory with checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = Checkpoints(str(workdir), CheckpointConfig(keep_last=5))
    for step in (1, 2):
        state = jax.tree.map(lambda x, step=step: x + step, STATE)
        checkpoints.save(step, state, {"moment": state["bias"]}, {"note": f"step {step}"}, 3.0 - step)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


DAMAGES = {"gone": Path.unlink, "half": lambda path: os.truncate(path, path.stat().st_size // 2), "flip": flip}
# The time of the save, which nothing reads, and marks that are empty on a disk.
UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")


def read(workdir: Path) -> tuple[int, np.ndarray, str]:
    checkpoints = Checkpoints(str(workdir))

    def read_step(step: int):
        params, rest = checkpoints.restore(step, ABSTRACT, {"moment": ABSTRACT["bias"]})
        assert np.array_equal(rest["moment"], np.ones(3) + step)
        return np.asarray(params["weights"]), checkpoints.meta(step)["note"]

    found = read_newest(checkpoints, read_step)
    checkpoints.close()
    return found[0], *found[1]


@pytest.mark.parametrize("how", DAMAGES)
def test_any_damaged_file_gives_the_checkpoint_before(saved, tmp_path, how, capsys):
    """Whichever file, the values are never wrong. One that nothing reads may do no harm."""
    checked = 0
    for number, file in enumerate(files_of(saved / "checkpoints" / "2")):
        workdir = Path(shutil.copytree(saved, tmp_path / str(number)))
        DAMAGES[how](workdir / file.relative_to(saved))
        step, weights, note = read(workdir)
        assert note == f"step {step}"
        np.testing.assert_array_equal(weights, np.arange(600) + step)
        warned = "checkpoint 2" in capsys.readouterr().err
        assert warned == (step == 1)
        # Without its list an item is like one of an older version, which has none.
        harmless = file.name in UNREAD or (how == "gone" and file.name == "checksums.json")
        assert step == (2 if harmless else 1), file
        checked += 1
    assert checked > 15


def test_a_flipped_bit_of_an_array_is_found(workdir):
    """The largest file of the weights, at every place of it in turn."""
    arrays = max((workdir / "checkpoints" / "2" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole = arrays.read_bytes()
    for place in range(0, len(whole), len(whole) // 50):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        arrays.write_bytes(data)
        checkpoints = Checkpoints(str(workdir))
        assert newest_sound(checkpoints) == 1, place
        checkpoints.close()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        OSError(5, "Input/output error"),
        ConnectionResetError("the network"),
        ValueError("User-provided restore item and on-disk value metadata tree structures do not match"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        UserError("the corpus has another tokenizer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_raised_and_nothing_is_renamed(workdir, error, capsys):
    """Also of a checkpoint of an older version, which has no checksums."""
    before = sorted(path for path in workdir.rglob("*"))

    def fail(step):
        raise error

    for old in (False, True):
        if old:
            for path in workdir.rglob("checksums*"):
                path.unlink()
            before = sorted(path for path in workdir.rglob("*"))
        checkpoints = Checkpoints(str(workdir))
        with pytest.raises(type(error)) as raised:
            read_newest(checkpoints, fail)
        checkpoints.close()
        assert raised.value is error
        assert sorted(path for path in workdir.rglob("*")) == before
    assert not capsys.readouterr().err


def test_another_structure_is_not_damage(workdir):
    checkpoints = Checkpoints(str(workdir))
    other = {**ABSTRACT, "more": ABSTRACT["bias"]}
    with pytest.raises(ValueError, match="structure"):
        read_newest(checkpoints, lambda step: checkpoints.restore(step, other, {"moment": ABSTRACT["bias"]}))
    checkpoints.close()


def test_where_all_are_damaged_the_run_ends_and_all_stay(workdir):
    for step in (1, 2):
        flip(workdir / "checkpoints" / str(step) / "meta" / "metadata")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        read(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def test_newer_ones_are_set_aside_and_older_ones_whose_loss_is_damaged(workdir):
    flip(workdir / "checkpoints" / "2" / "meta" / "metadata")
    checkpoints = Checkpoints(str(workdir))
    checkpoints.set_aside_after(newest_sound(checkpoints))
    checkpoints.close()
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "damaged-2"]
    Checkpoints(str(workdir), CheckpointConfig()).close()


def test_a_checkpoint_of_an_older_version_is_checked_by_reading(tmp_path):
    old = Path(shutil.copytree(ROOT / "tests" / "old_run" / "run", tmp_path / "run"))
    checkpoints = Checkpoints(str(old))
    assert not checkpoints.has_checksums(20)
    assert newest_sound(checkpoints) == 20
    checkpoints.close()
    flip(old / "checkpoints" / "20" / "meta" / "metadata")
    checkpoints = Checkpoints(str(old))
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        newest_sound(checkpoints)
    checkpoints.close()


def test_the_form_of_a_folder_is_made_once(tmp_path):
    """TensorStore never frees what it returns, and Orbax asks for it once for each array of a save."""
    spec = {"driver": "file", "path": f"{tmp_path}/a'b/"}
    tracemalloc.start()
    try:
        first = tensorstore.KvStore.Spec(spec).to_json()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(300):
            again = tensorstore.KvStore.Spec(spec).to_json()
            assert again == first == spec
            again["path"] = "another"  # each caller has its own
        assert tracemalloc.get_traced_memory()[0] - before < 20_000  # 70,000 otherwise
    finally:
        tracemalloc.stop()
    assert tensorstore.KvStore.Spec({**spec, "path": "/c/"}).to_json()["path"] == "/c/"


@pytest.mark.whole
def test_saves_leave_nothing_behind_in_the_process(tmp_path):
    """TensorStore's metrics, which Orbax asked for in every save, left a list of each metric each time."""
    checkpoints, left = Checkpoints(str(tmp_path / "run"), CheckpointConfig()), []
    for step in range(1, 12):
        checkpoints.save(step, STATE, {"moment": STATE["bias"]}, {"note": "a"}, 3.0)
        checkpoints.manager.wait_until_finished()
        gc.collect()
        left.append(len(gc.get_objects()))
    checkpoints.close()
    assert left[-1] - left[2] < 160, left  # 456 with the lists
