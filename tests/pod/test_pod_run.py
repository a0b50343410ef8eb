"""Real runs of several processes, whose virtual devices lie as those of TPU hosts do."""

import importlib.util
import itertools
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster, assembled
from conftest import TINY_RUN, run_script
from etils import epath

from gptjax.checksums import read_checksums
from gptjax.configfile import load_config
from gptjax.data.batches import Batches, training_examples, validation_batches
from gptjax.data.corpus import load_corpus
from gptjax.metrics import read_metrics

B, T = 16, 32
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
RUN = [*TINY_RUN, f"--train.batch_sequences={B}", "--train.eval_sequences=20", "--optim.schedule=constant"]
OPEN = ["--train.total_steps=100000", "--checkpoint.save_interval_steps=100000", "--train.eval_interval_steps=100000"]


@pytest.fixture
def arguments(corpus_file, token_cache) -> list[str]:
    return [*RUN, f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}"]


def expected_batches(arguments: list[str]) -> tuple[list[dict], list[dict]]:
    """Return the validation batches and the first training batches of a run that reads all rows itself."""
    cfg = load_config([*arguments, "--workdir=unused"])
    corpus = load_corpus(cfg.data)
    validation = list(validation_batches(corpus.sources[0].val, T, B, cfg.train.eval_sequences, range(B)))
    batches = Batches(training_examples(corpus, cfg.data, T, B, cfg.seed), B, range(B))
    return validation, [batches[step] for step in range(3)]


def check_equal(found: list[dict], wanted: list[dict]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, array in other.items():
            assert array.dtype == one[name].dtype
            np.testing.assert_array_equal(one[name], array)


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}


@pytest.mark.whole
def test_hosts_whose_rows_lie_apart_read_the_global_batch(arguments, tmp_path):
    """Four hosts of v5e:4x4, each with rows that are no range: evaluation, three steps, the files of the run.

    Their clocks differ by up to an hour.
    """
    steps = ["--train.total_steps=3", "--train.eval_interval_steps=100", "--checkpoint.save_interval_steps=100"]
    others = [name for name, package in TRACKERS.items() if importlib.util.find_spec(package)]
    more = ["--mesh.data=4", "--mesh.fsdp=4", f"--log.trackers={json.dumps(others)}"]
    batches, quiet = tmp_path / "batches", {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "POD_CLOCKS": "-1200"}
    run = Cluster("v5e:4x4", [*arguments, *steps, *more], tmp_path / "run", batches=batches, **quiet)
    assert run.codes() == [0] * 4, run.said()
    validation, training = expected_batches(arguments)
    found = assembled(tmp_path / "batches", (B, T))
    check_equal(found, [*validation, *training, *validation])
    assert sorted(losses(run.workdir)) == [1, 2, 3]
    assert (run.workdir / "loss.png").exists()
    # One process writes the files, and all of them their parts of the checkpoint, with checksums.
    assert sorted(row["step"] for row in read_metrics(run.workdir)) == [0, 1, 2, 3]
    assert json.loads((run.workdir / "env.json").read_text())["processes"] == 4
    opened = {"tensorboard": "tensorboard/events*", "wandb": "wandb/offline-run-*"}
    assert [len(list(run.workdir.glob(opened[name]))) for name in others] == [1] * len(others)
    params = run.workdir / "checkpoints" / "3" / "params"
    names = {path.name for path in params.iterdir()}
    assert {"checksums.json", *(f"checksums.process_{i}.json" for i in range(4))} <= names
    assert "parameters" in run.said(0)
    # Gloo's threads write parts of their messages between one another's, so that no line is certain to be whole.
    gloo = r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+"
    assert [re.sub(gloo, "", run.said(i)).strip() for i in (1, 2, 3)] == ["", "", ""]


@pytest.mark.slow
def test_a_run_moves_from_cluster_to_cluster(arguments, tmp_path):
    """4 x 4, 2 x 4 and 4 x 2 devices, of which a signal to one host stops all: losses of one process, to 1e-5."""
    layouts = [
        ("v5e:4x4", ["--mesh.data=4", "--mesh.fsdp=4"]),
        ("v5e:2x4", ["--mesh.data=1", "--mesh.fsdp=4", "--mesh.tensor=2"]),
        ("v5p:2x2x2, two processes a host", ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.context=2"]),
        ("v5e:4x4", ["--mesh.data=1", "--mesh.fsdp=16"]),
    ]
    workdir, last = tmp_path / "run", 0
    for number, (place, mesh) in enumerate(layouts):
        run = Cluster(place, [*arguments, *OPEN, *mesh], workdir, batches=tmp_path / f"batches-{number}")
        run.wait_for_step(last + 4)
        run.signal(number % len(run.processes), signal.SIGINT if number == 1 else signal.SIGTERM)
        assert run.codes() == [75] * len(run.processes), run.said()
        last = max(losses(workdir))
        assert f"stopped at step {last} of 100000" in run.said(0)
        assert (workdir / "checkpoints" / str(last)).is_dir()
    assert sorted(losses(workdir)) == list(range(1, last + 1))

    alone = run_script("train.py", *arguments, *OPEN, f"--train.total_steps={last}", "--workdir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    wanted, found = losses(tmp_path / "alone"), losses(workdir)
    np.testing.assert_allclose([found[s] for s in wanted], list(wanted.values()), atol=1e-5, rtol=0)

    # The batches of all layouts one after another are those that one process reads.
    cfg = load_config([*arguments, "--workdir=unused"])
    corpus = load_corpus(cfg.data)
    one = Batches(training_examples(corpus, cfg.data, T, B, cfg.seed), B, range(B))
    parts = [assembled(tmp_path / f"batches-{number}", (B, T)) for number in range(len(layouts))]
    evaluation = len(list(validation_batches(corpus.sources[0].val, T, B, cfg.train.eval_sequences, range(B))))
    parts[0] = parts[0][evaluation:]  # of step 0
    check_equal(list(itertools.chain(*parts)), [one[step] for step in range(last)])

    sampled = run_script("sample.py", workdir, "--max_new_tokens", "5", "--format", "jsonl")
    assert sampled.returncode == 0, sampled.stderr
    assert not sampled.stderr


TWO_HOSTS = [
    "--mesh.data=1",
    "--mesh.fsdp=8",
    "--train.eval_interval_steps=100",
    "--checkpoint.save_interval_steps=2",
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, corpus_file, token_cache) -> Path:
    """A run of two hosts that holds checkpoints of steps 2 and 4."""
    data = [f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}"]
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    run = Cluster("v5e:2x4", [*RUN, *data, *TWO_HOSTS, "--train.total_steps=4"], workdir)
    assert run.codes() == [0, 0], run.said()
    return workdir


def damage_a_file_that_one_process_checks(workdir: Path, process: int) -> None:
    """Flip a bit of an array of step 4 that only this one of two processes reads before the restore."""
    params = workdir / "checkpoints" / "4" / "params"
    sizes = read_checksums(epath.Path(params))
    largest = max(sorted(sizes)[process::2], key=lambda name: sizes[name][0])
    data = bytearray((params / largest).read_bytes())
    data[len(data) // 2] ^= 1
    (params / largest).write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_both_pass_over_what_one_process_finds_damaged(stopped, arguments, tmp_path, process):
    workdir = Path(shutil.copytree(stopped, tmp_path / "run"))
    damage_a_file_that_one_process_checks(workdir, process)
    run = Cluster("v5e:2x4", [*arguments, *TWO_HOSTS, "--train.total_steps=6"], workdir)
    assert run.codes() == [0, 0], run.said()
    assert run.said().count("warning: checkpoint 4") == 1
    assert (workdir / "damaged-4" / "params").is_dir()
    found = losses(workdir)
    assert {step: found[step] for step in losses(stopped)} == losses(stopped)
    assert max(found) == 6


@pytest.mark.slow
def test_a_process_without_memory_ends_both_and_nothing_is_renamed(stopped, arguments, tmp_path):
    workdir = Path(shutil.copytree(stopped, tmp_path / "run"))
    run = Cluster("v5e:2x4", [*arguments, *TWO_HOSTS, "--train.total_steps=6"], workdir, POD_NO_MEMORY="1")
    codes = run.codes(200)
    assert codes[1] == 1
    assert codes[0] not in (0, 2, 75)
    assert "MemoryError: no memory for a restore" in run.said(1)
    assert "damaged" not in run.said()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert not list(workdir.glob("damaged-*"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["is missing", "differs"])
def test_a_fault_of_one_hosts_data_ends_all_with_its_message(arguments, corpus_file, tmp_path, fault):
    other = tmp_path / "other.txt"
    if fault == "differs":
        other.write_text(corpus_file.read_text()[:-100])
    separate = {i: [f"--data.cache_dir={tmp_path / str(i)}"] for i in range(2)}
    separate[1] += [f"--data.path={other}"]
    run = Cluster("v5e:2x4", [*arguments, *TWO_HOSTS], tmp_path / "run", separate)
    assert run.codes() == [2, 2], run.said()
    for process in range(2):
        assert {"is missing": "(process 1)", "differs": "on process 1 differs"}[fault] in run.said(process)
        assert "Traceback" not in run.said(process)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_hosts_tokenize_into_a_cache_that_they_share_or_each_into_its_own(arguments, tmp_path):
    steps = ["--train.total_steps=2"]
    shared = Cluster(
        "v5e:2x4", [*arguments, *TWO_HOSTS, *steps, f"--data.cache_dir={tmp_path}/all"], tmp_path / "one"
    )
    assert shared.codes() == [0, 0], shared.said()
    caches = {i: [f"--data.cache_dir={tmp_path / str(i)}"] for i in range(2)}
    separate = Cluster("v5e:2x4", [*arguments, *TWO_HOSTS, *steps], tmp_path / "two", caches)
    assert separate.codes() == [0, 0], separate.said()
    folders = [[path.name for path in (tmp_path / name).iterdir()] for name in ("all", "0", "1")]
    assert folders[0] == folders[1] == folders[2]
    assert len(folders[0]) == 1
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
