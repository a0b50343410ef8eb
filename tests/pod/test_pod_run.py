"""Real runs of several processes, whose virtual devices lie as those of TPU hosts do."""

import itertools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster, assembled
from conftest import TINY_RUN, run_script

from gptjax.configfile import load_config
from gptjax.data.batches import Batches, training_examples, validation_batches
from gptjax.data.corpus import load_corpus
from gptjax.metrics import read_metrics

B, T = 16, 32
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


def test_hosts_whose_rows_lie_apart_read_the_global_batch(arguments, tmp_path):
    """Four hosts of v5e:4x4, each with rows that are no range: evaluation, three steps, the files of the run."""
    steps = ["--train.total_steps=3", "--train.eval_interval_steps=100", "--checkpoint.save_interval_steps=100"]
    mesh = ["--mesh.data=4", "--mesh.fsdp=4"]
    run = Cluster("v5e:4x4", [*arguments, *steps, *mesh], tmp_path / "run", batches=tmp_path / "batches")
    assert run.codes() == [0] * 4, run.said()
    validation, training = expected_batches(arguments)
    found = assembled(tmp_path / "batches", (B, T))
    check_equal(found, [*validation, *training, *validation])
    assert sorted(losses(run.workdir)) == [1, 2, 3]
    # One process writes the files, and all of them their parts of the checkpoint, with checksums.
    assert sorted(row["step"] for row in read_metrics(run.workdir)) == [0, 1, 2, 3]
    assert json.loads((run.workdir / "env.json").read_text())["processes"] == 4
    params = run.workdir / "checkpoints" / "3" / "params"
    names = {path.name for path in params.iterdir()}
    assert {"checksums.json", *(f"checksums.process_{i}.json" for i in range(4))} <= names
    said = [[line for line in run.said(i).splitlines() if line and "[Gloo]" not in line] for i in range(4)]
    assert [bool(lines) for lines in said] == [True, False, False, False], said


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
