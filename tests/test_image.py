"""The image of the Dockerfile, built and run in a bare Debian root: as root, with Debian's mmdebstrap.

apt-get install mmdebstrap
pytest -m slow -n 0 -s tests/test_image.py
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_RUN
from image import INSTRUCTIONS, Image, build, steps
from pods import metadata_server, pods

from gptjax.apps.launch.commands import VERBS
from gptjax.apps.launch.container import CONFIG_FOLDER

CACHE = "/tmp"  # the Dockerfile's HOME


def test_every_instruction_of_the_dockerfile_is_known():
    names = [name for name, _ in steps(ROOT / "Dockerfile")]
    assert set(names) <= set(INSTRUCTIONS)
    assert names[0] == "FROM"
    assert {"USER", "ENTRYPOINT"} <= set(names)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    if os.geteuid() or shutil.which("mmdebstrap") is None:
        pytest.skip("as root: apt-get install mmdebstrap")
    began = time.perf_counter()
    root = tmp_path_factory.mktemp("image") / "root"
    root.parent.chmod(0o755)
    made = build(ROOT / "Dockerfile", root)
    print(f"\nbuilt with EXTRAS={made.arguments['EXTRAS']} in {time.perf_counter() - began:.0f} s")
    yield made
    shutil.rmtree(root)


@pytest.fixture
def disk(tmp_path, corpus_file, image) -> Path:
    """A directory to mount, which belongs to the image's user, with a corpus in it."""
    shutil.copy(corpus_file, tmp_path / "verse.txt")
    (tmp_path / "verse.txt").chmod(0o644)
    os.chown(tmp_path, int(image.user), int(image.user))
    return tmp_path


def words(image: Image, *flags: str) -> list[str]:
    """The command line of a container that trains a tiny model."""
    tiny = [word.replace("configs/", f"{image.folder}/configs/") for word in TINY_RUN]
    return [*image.entrypoint, "train", *tiny, "--data.path=/disk/verse.txt", "--workdir=/disk/run", *flags]


def read_rows(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


@pytest.mark.slow
def test_a_container_without_git_compiler_and_rights_trains_stops_resumes_and_samples(image, disk):
    began = time.perf_counter()
    for program in ("git", "cc", "gcc", "c++"):
        assert not [path for path in ("usr/bin", "usr/local/bin") if (image.root / path / program).exists()]
    assert int(image.user) > 0
    mounts = {"/disk": str(disk), CACHE: "tmpfs"}
    first = subprocess.Popen(image.command(words(image, "--train.total_steps=100000"), mounts))
    metrics = disk / "run/metrics.jsonl"
    while not any(row["step"] >= 1 for row in read_rows(metrics)):
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 75

    stopped_at = max(int(path.name) for path in (disk / "run/checkpoints").iterdir())
    last = stopped_at + 10
    again = subprocess.run(
        image.command(words(image, f"--train.total_steps={last}"), mounts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"after step {stopped_at}" in again.stdout
    assert [row["step"] for row in read_rows(metrics)][-1] == last

    sampled = [*image.entrypoint, "sample", "/disk/run", "--prompt", "The king", "--max_new_tokens", "20"]
    done = subprocess.run(image.command(sampled, mounts), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The king") and len(done.stdout) > len("The king") + 10
    assert json.loads((disk / "run/env.json").read_text())["git_commit"] is None
    assert (disk / "run/loss.png").exists()
    assert {path.stat().st_uid for path in (disk / "run").rglob("*")} == {int(image.user)}
    print(f"\ntrain, stop, resume, ten steps and sample in {time.perf_counter() - began:.0f} s")


@pytest.mark.slow
def test_a_container_in_which_only_the_run_can_be_written_trains(image, disk):
    flags = ("--train.total_steps=2", "--data.cache_dir=/disk/tokens")
    done = subprocess.run(
        image.command(words(image, *flags), {"/disk": str(disk)}), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


LAYOUTS = {"tpu": {"topology": "v5e:2x4"}, "gpu": {"gpu": "nvidia-h100-80gb", "nodes": 2, "gpus_per_node": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_pods_of_a_jobset_train_in_the_image(image, disk, kind):
    flags = [*TINY_RUN[1:], "--train.total_steps=10", "--mesh.cpu_devices=4"]
    flags += ["--data.path=/disk/verse.txt", "--workdir=/disk/run"]
    VERBS["gke"](
        str(ROOT / TINY_RUN[0]), flags, image="i", volume=["claim:/disk"], **LAYOUTS[kind], out=str(disk / "job")
    )
    mounts = {"/disk": str(disk), CACHE: "tmpfs", CONFIG_FOLDER: str(disk / "job")}
    started = []
    with metadata_server() as metadata:
        for command, given in pods(disk / "job/jobset.yaml"):
            given |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | metadata
            user = "0" if kind == "tpu" else image.user
            made = image.command(command, mounts, user, **given)
            started.append(subprocess.Popen(made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        logs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], logs
    assert json.loads((disk / "run/env.json").read_text())["processes"] == 2
    assert read_rows(disk / "run/metrics.jsonl")[-1]["step"] == 10
