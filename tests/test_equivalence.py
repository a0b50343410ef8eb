"""Changing the parallelism changes nothing: the losses of one device on every mesh, and along a run that moves."""

import itertools
import json
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from mesh_losses import CONFIGS, losses_on
from test_train import losses, start

AXES = ("data", "fsdp", "tensor", "context")
# Every pair and triple of axes on 8 devices. GPT-2's kind has 4 heads, the modern one 2 heads of keys.
PAIRS = [{a: 4, b: 2} if b == "tensor" else {a: 2, b: 4} for a, b in itertools.combinations(AXES, 2) if a != "tensor"]
MESHES = [*PAIRS, {"tensor": 2, "context": 4}, *(dict.fromkeys(axes, 2) for axes in itertools.combinations(AXES, 3))]


@pytest.fixture(scope="module")
def one_device():
    return {name: losses_on(name, {}, jax.devices()[:1]) for name in CONFIGS}


@pytest.mark.slow  # a few meshes are in test_step.py
@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_pair_and_triple_of_axes_gives_the_losses_of_one_device(one_device, name, axes):
    np.testing.assert_allclose(losses_on(name, axes, jax.devices()), one_device[name], atol=1e-5, rtol=0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_of_four_devices_give_the_losses_of_one(one_device):
    """All ten meshes, in one pair of processes."""
    cases = [("muon", axes) for axes in MESHES]
    arguments = (ROOT / "tests" / "mesh_losses.py", json.dumps(cases), f"127.0.0.1:{free_port()}", 2)
    both = [start(*arguments, i) for i in range(2)]
    outputs = [process.communicate(timeout=1500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    for output in outputs:
        for axes, found in zip(MESHES, json.loads(output.splitlines()[-1]), strict=True):
            np.testing.assert_allclose(found, one_device["muon"], atol=1e-5, rtol=0, err_msg=str(axes))


# A run's command line, with every row of data that its steps take written to ROWS as "STEP ROW HASH".
WATCHED = """
import hashlib, sys
from gptjax.process import prepare_process
from gptjax.configfile import load_config
cfg = load_config(sys.argv[2:])
prepare_process(cfg.mesh.cpu_devices, cfg.distributed)
import numpy as np
from gptjax.hooks import Hook
from gptjax.trainer import train
class Watched(Hook):
    def after_step(self, end):
        held = {}
        for name, array in end.batch.items():
            held[name] = np.zeros(array.shape, array.dtype)
            rows = set()
            for shard in array.addressable_shards:
                held[name][shard.index] = shard.data
                rows |= set(range(*shard.index[0].indices(len(array))))
        with open(sys.argv[1], "a") as f:
            for row in sorted(rows) if end.batch else ():
                data = b"".join(held[name][row].tobytes() for name in sorted(held))
                print(end.step, row, hashlib.sha256(data).hexdigest(), file=f)
sys.exit(train(cfg, [Watched()]))
"""


def rows_seen(*files: Path) -> set[str]:
    return {line for file in files for line in file.read_text().splitlines()}


@pytest.mark.slow
def test_a_run_that_moves_sees_the_same_data_and_has_the_same_losses(tiny_run, tmp_path):
    """8 devices, then 4, then 1, then 2 processes of 2, for 15 steps each, beside 60 steps on one device."""
    config = tiny_run[1:]
    every = ["--checkpoint.save_interval_steps=15", "--train.eval_interval_steps=15", "--optim.schedule=constant"]

    def go_on(workdir: str, steps: int, rows: str, *mesh: str, processes: int = 1):
        command = [*config, *every, f"--workdir={tmp_path / workdir}", f"--train.total_steps={steps}", *mesh]
        if processes > 1:
            command += [f"--distributed.coordinator=127.0.0.1:{free_port()}", "--distributed.num_processes=2"]
        ids = [[f"--distributed.process_id={i}"] if processes > 1 else [] for i in range(processes)]
        files = [tmp_path / f"{rows}-{i}" for i in range(processes)]
        started = [start("-c", WATCHED, file, *command, *own) for file, own in zip(files, ids, strict=True)]
        outputs = [process.communicate(timeout=600)[0] for process in started]
        assert [process.returncode for process in started] == [0] * processes, outputs
        return files

    straight = rows_seen(*go_on("straight", 60, "rows-straight"))
    moved = [
        *go_on("moved", 15, "rows-8", "--mesh.cpu_devices=8", "--mesh.fsdp=2", "--mesh.tensor=2"),
        *go_on("moved", 30, "rows-4", "--mesh.cpu_devices=4", "--mesh.context=2", "--mesh.fsdp=2"),
        *go_on("moved", 45, "rows-1"),
        *go_on("moved", 60, "rows-2", "--mesh.cpu_devices=2", "--mesh.data=2", "--mesh.fsdp=2", processes=2),
    ]
    # 60 steps; a step that two stages had taken, or rows that two processes had, would differ in number.
    assert len(straight) == 60 * len({line.split()[1] for line in straight})
    assert rows_seen(*moved) == straight
    assert sum(len(file.read_text().splitlines()) for file in moved) == len(straight)
    for one, other in zip(losses(tmp_path / "straight"), losses(tmp_path / "moved"), strict=True):
        assert other == pytest.approx(one, abs=1e-5)
