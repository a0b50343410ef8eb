"""Ids of runs at Weights & Biases; with the library itself, without a network."""

import json
import re
from pathlib import Path

import pytest

from gptjax.metrics import WandB, make_trackers


def test_runs_of_one_name_have_ids_of_their_own_that_survive_a_resume(tmp_path):
    ids = {}
    for place in ("a/lr1", "b/lr1", "c/x:y#z"):
        (tmp_path / place).mkdir(parents=True)
        ids[place] = WandB.run_id(str(tmp_path / place), step=0)
        assert WandB.run_id(str(tmp_path / place), step=5) == ids[place]
        assert re.fullmatch(r"[a-z0-9]{16}", ids[place])
    assert len(set(ids.values())) == 3
    assert WandB.run_id(str(tmp_path / "a/lr1"), step=0) != ids["a/lr1"]  # begun anew


def test_a_run_that_was_begun_under_its_name_goes_on_under_it(tmp_path):
    (tmp_path / "lr1/wandb/offline-run-20250101_000000-lr1").mkdir(parents=True)
    assert WandB.run_id(str(tmp_path / "lr1"), step=5) == "lr1"


def test_wandb_takes_the_id_and_the_name(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = tmp_path / "x:y#z"
    workdir.mkdir()
    found = []
    for step in (0, 5):
        lines, tracker = make_trackers(("wandb",), str(workdir), step, "project", {"seed": 1})
        found.append((tracker.run.id, tracker.run.name, Path(tracker.run.dir).is_relative_to(workdir)))
        for made in (lines, tracker):
            made.write(step + 5, {"train/loss": 1.0})
            made.close()
    assert wandb.run is None
    assert found == [(found[0][0], "x:y#z", True)] * 2
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [5, 10]
