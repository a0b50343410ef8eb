"""A run whose directory is in a bucket: an emulator of Google Cloud Storage stands in for it."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script
from test_train import losses

from gptjax.data.reading import readable
from gptjax.errors import UserError
from gptjax.shell.console import describe_failure


@pytest.fixture
def bucket(tmp_path, request):
    """Environment variables that lead gs://bucket to an emulator in memory; the parameter is BUSY's value."""
    if not (importlib.util.find_spec("gcp_storage_emulator") and importlib.util.find_spec("gcsfs")):
        pytest.skip("pip install gcp-storage-emulator gcsfs")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [ROOT / "tests/cluster/gcs.py", "start", "--host", "localhost", "--port", str(port), "--in-memory"]
    busy = {} if request.param is None else {"BUSY": str(request.param)}
    with (tmp_path / "emulator.log").open("w") as log:
        command = [sys.executable, *command, "--default-bucket", "bucket"]
        emulator = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | busy)
    for _ in range(300):
        with socket.socket() as s:
            if s.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.1)
    # The first is read by gcsfs, for which etils asks; the second by TensorStore, which writes Orbax' arrays.
    yield dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), f"http://localhost:{port}")
    emulator.kill()
    emulator.wait()


READ = """
import sys
from etils import epath
run = epath.Path(sys.argv[1])
print(sorted(path.name for path in run.iterdir()), sorted(path.name for path in (run / "checkpoints").iterdir()))
epath.Path(sys.argv[2], "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
"""


RUN_FILES = ["attempts.jsonl", "checkpoints", "config.yaml", "env.json", "events.jsonl", "loss.png", "metrics.jsonl"]
RUN_FILES += ["outcome.json", "samples.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [None, 20], indirect=True, ids=["at rest", "refuses every 20th request"])
def test_a_run_in_a_bucket_is_that_of_a_disk(bucket, tiny_run, tmp_path):
    """Begun, gone on with from there to the same bits, refused for another config, and sampled from."""
    whole = ["train.py", *tiny_run[1:], "--optim.schedule=constant", "--log.sample_tokens=8"]
    for steps in ("--train.total_steps=10", "--train.total_steps=30"):
        result = run_script(*whole, "--workdir=gs://bucket/runs/tiny", steps, timeout=900, **bucket)
        assert result.returncode == 0, result.stderr
    assert "resuming after step 10" in result.stdout
    straight = run_script(*tiny_run, f"--workdir={tmp_path / 'straight'}", "--optim.schedule=constant")
    assert straight.returncode == 0, straight.stderr
    listed = run_script("-c", READ, "gs://bucket/runs/tiny", tmp_path, **bucket)
    assert str(RUN_FILES) in listed.stdout, listed.stderr
    assert losses(tmp_path) == losses(tmp_path / "straight")
    other = run_script(*tiny_run, "--workdir=gs://bucket/runs/tiny", "--model.d_model=64", **bucket)
    assert other.returncode == 2
    assert "gs://bucket/runs/tiny holds a run of another config: model.d_model (32 there, 64 here)" in other.stderr
    sampled = run_script("sample.py", "gs://bucket/runs/tiny", "--max_new_tokens", "5", "--format", "jsonl", **bucket)
    assert len(json.loads(sampled.stdout)["tokens"]) == 5, sampled.stderr


def test_a_bucket_without_its_library_is_one_line(tiny_run, tmp_path):
    (tmp_path / "gcsfs.py").write_text("raise ImportError")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from gptjax.cli import train; train(sys.argv[1:])"
    result = run_script("-c", code, *tiny_run[1:], "--workdir=gs://bucket/run")
    assert result.returncode == 2
    assert "cannot read gs://bucket/run" in result.stderr
    assert "pip install 'gptjax[cloud]'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [1], indirect=True)
def test_a_bucket_that_always_refuses_is_one_line(bucket, tiny_run):
    result = run_script(*tiny_run, "--workdir=gs://bucket/run", **bucket)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: cannot read gs://bucket/run: "), result.stderr


def test_a_busy_bucket_is_no_fault_of_the_program():
    refusal = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("Service Unavailable, 503")
    with pytest.raises(UserError, match="cannot read gs://b/run: Service Unavailable, 503"), readable("gs://b/run"):
        raise refusal
    code, text = describe_failure(refusal)
    assert code == 1
    assert (
        text == "error: the storage refused a request: Service Unavailable, 503; run the same command again to resume"
    )
