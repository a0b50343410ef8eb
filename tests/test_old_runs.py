"""A run that commit 7539928 wrote (`old_run/`), with what that commit then made of it (`old_run/expected.json`)."""

import json
import shutil

import pytest
from conftest import ROOT, run_script

from gptjax.metrics import read_metrics

OLD = ROOT / "tests" / "old_run"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture
def old_run(tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.whole
def test_an_old_run_resumes_with_its_losses(old_run, tmp_path):
    command = ["train.py", old_run / "config.yaml", "--workdir", old_run, "--train.total_steps", 30]
    result = run_script(*command, "--data.cache_dir", tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    losses = {str(row["step"]): row["train/loss"] for row in read_metrics(old_run) if row["step"] > 20}
    assert losses == pytest.approx(EXPECTED["losses"], abs=1e-5)
    val = {
        str(row["step"]): row["val/loss"] for row in read_metrics(old_run) if row["step"] > 20 and "val/loss" in row
    }
    assert val == pytest.approx(EXPECTED["val"], abs=1e-5)


def test_an_old_run_samples_its_text(old_run):
    command = ["sample.py", old_run, "--prompt", "The king", "--max_new_tokens", 40, "--format", "jsonl"]
    greedy = json.loads(run_script(*command, "--temperature", 0, "--logprobs").stdout)
    assert greedy["text"] == EXPECTED["greedy"]["text"]
    assert greedy["logprobs"] == pytest.approx(EXPECTED["greedy"]["logprobs"], abs=1e-4)
    drawn = json.loads(run_script(*command, "--temperature", 0.8, "--top_k", 10, "--seed", 3).stdout)
    assert drawn["text"] == EXPECTED["drawn"]
