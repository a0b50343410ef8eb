"""Job files, read back by Kubernetes' client and run against stand-ins; and how processes find each other."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT

import gptjax.cpu
from gptjax import cli
from gptjax.apps.launch.clusters import TPUS, XLA_FLAGS, check_mesh, parse_slice
from gptjax.apps.launch.commands import VERBS
from gptjax.config import DistributedConfig
from gptjax.configfile import load_config
from gptjax.data.batches import Batches
from gptjax.errors import UserError
from gptjax.process import find_processes

TPU = {"image": "example.com/gptjax:1", "topology": "v5e:16x16"}
BUCKET = ["--workdir=gs://bucket/runs/Llama_1B.v2", "--data.path=/data/fineweb"]


def write(verb: str, tmp_path: Path, flags: list[str], **options) -> Path:
    """The folder that a verb wrote."""
    VERBS[verb](str(ROOT / "configs/llama_1b.yaml"), flags, out=str(tmp_path / "job"), **options)
    return tmp_path / "job"


def test_a_job_has_the_whole_config_and_its_overrides(tmp_path):
    folder = write("slurm", tmp_path, ["--train.total_steps=7"], nodes=8, dry_run=True)
    cfg = load_config([str(folder / "config.yaml")])
    assert cfg == load_config([str(ROOT / "configs/llama_1b.yaml"), "--train.total_steps=7"])


def test_options_of_a_config_belong_to_training(monkeypatch):
    called = {}

    def slurm(config: str, flags: list[str], *, nodes: int = 1, spot: bool = False, time: str | None = None) -> None:
        """Launch."""
        called.update(locals())

    monkeypatch.setitem(VERBS, "slurm", slurm)
    args = ["--nodes", "2", "--train.total_steps", "-7", "--workdir=w", "--spot", "c.yaml", "--seed", "1", "--time=5"]
    assert cli.launch(["slurm", *args]) == 0
    assert called["flags"] == ["--train.total_steps=-7", "--workdir=w", "--seed=1"]
    assert (called["config"], called["nodes"], called["spot"], called["time"]) == ("c.yaml", 2, True, "5")


def test_a_batch_script_asks_for_what_was_said_and_requeues_on_75(tmp_path):
    layout = {"nodes": 4, "tasks_per_node": 16, "gpus_per_node": 16}
    folder = write("slurm", tmp_path, [], **layout, time="8:00:00", sbatch="--exclusive -C h100", dry_run=True)
    text = (folder / "job.sbatch").read_text()
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    asked = ["--nodes=4", "--ntasks-per-node=16", "--gpus-per-node=16", "--time=8:00:00", "--requeue"]
    assert {*asked, "--signal=TERM@120"} <= {word for line in options for word in line.split()}
    assert any("--exclusive -C h100" in line for line in options)
    subprocess.run(["bash", "-n", folder / "job.sbatch"], check=True)
    assert " ".join(XLA_FLAGS["cuda"][1]) in text


FAKE_SLURM = {  # what the batch script calls; the second attempt succeeds
    "srun": 'echo "$JAX_COORDINATOR_ADDRESS" >> srun.log; [ "$(wc -l < srun.log)" -gt 1 ] || exit 75',
    "scontrol": 'case "$2" in hostnames) echo n1; echo n2;; node) echo "  NodeAddr=10.0.0.7 NodeHostName=n1";; '
    '*) echo "$@" >> requeued.log;; esac',
}


def fake(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """An environment in which these programs of the shell are found first."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def test_the_batch_script_requeues_itself_only_where_all_is_saved(tmp_path):
    folder = write("slurm", tmp_path, [], nodes=8, dry_run=True)
    env = fake(tmp_path, FAKE_SLURM) | {"SLURM_JOB_ID": "4100", "SLURM_JOB_NODELIST": "n[1-2]"}
    codes = [subprocess.run(["bash", folder / "job.sbatch"], cwd=tmp_path, env=env, check=False) for _ in range(2)]
    assert [code.returncode for code in codes] == [75, 0]
    assert (tmp_path / "srun.log").read_text() == "10.0.0.7:61444\n" * 2
    assert (tmp_path / "requeued.log").read_text() == "requeue 4100\n"


@pytest.mark.parametrize(
    "options",
    [TPU | {"num_slices": 2, "spot": True}, {"image": "i", "gpu": "nvidia-h100-80gb", "nodes": 8, "queue": "team"}],
    ids=["tpu", "gpu"],
)
def test_manifests_load_through_the_official_client(tmp_path, options):
    """What its models do not know they drop: so everything must be there again."""
    client = pytest.importorskip("kubernetes.client", reason="pip install -e '.[peer]'")
    api = client.ApiClient()
    path = write("gke", tmp_path, BUCKET, **options) / "jobset.yaml"
    config_map, jobset = yaml.safe_load_all(path.read_text())

    def again(value: dict, model: type) -> dict:
        return api.sanitize_for_serialization(api._ApiClient__deserialize(value, model))

    assert again(config_map, client.V1ConfigMap) == config_map
    (workers,) = jobset["spec"]["replicatedJobs"]
    assert again(workers["template"], client.V1JobTemplateSpec) == workers["template"]
    assert again(jobset["metadata"], client.V1ObjectMeta) == jobset["metadata"]
    assert jobset["metadata"]["name"] == "llama-1b-v2"
    assert yaml.safe_load(config_map["data"]["config.yaml"])["workdir"] == "gs://bucket/runs/Llama_1B.v2"


def test_a_jobset_has_a_pod_for_each_host_and_restarts_without_end_after_a_preemption(tmp_path):
    path = write("gke", tmp_path, BUCKET, **TPU, num_slices=2) / "jobset.yaml"
    spec = list(yaml.safe_load_all(path.read_text()))[1]["spec"]
    (workers,) = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (workers["replicas"], job["completions"], job["parallelism"]) == (2, 64, 64)
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [75]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}


GCLOUD = """
echo "$@" >> gcloud.log
case "$*" in
  *describe*) [ -e created ] || exit 1; if [ -e gone ]; then echo SUSPENDED; else echo ACTIVE; fi;;
  *" create "*) touch created;;
  *delete*) rm -f created gone;;
  *"docker run"*) echo >> attempts; [ "$(wc -l < attempts)" -gt 1 ] || { touch gone; exit 255; };;
esac
"""


def test_the_script_of_tpu_vms_queues_again_after_a_preemption_and_gives_back(tmp_path):
    folder = write("tpu-vm", tmp_path, BUCKET, **TPU, zone="us-west4-a", spot=True)
    env = fake(tmp_path, {"gcloud": GCLOUD}) | {"POLL_S": "0"}
    result = subprocess.run(["bash", folder / "tpu_vm.sh"], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    calls = (folder / "gcloud.log").read_text()
    assert calls.count("queued-resources create llama-1b-v2") == calls.count("queued-resources delete") == 2
    assert "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --spot" in calls


@pytest.mark.parametrize("topology", ["v5p:4x4", "v9:2x2", "v5e:4", "v6e:0x4", "v5e"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(UserError, match=r"v5e:16x16|dimensions, such as"):
        parse_slice(topology)


def test_types_of_tpus_count_what_google_counts():
    assert [parse_slice(t).hosts for t in ("v5e:16x16", "v5p:8x8x8", "v6e:2x2", "v5e:1x1")] == [64, 128, 1, 1]
    assert TPUS["v5p"].cores_per_chip == 2  # v5p-1024 are 512 chips


BAD = {
    "mesh": ("slurm", {"nodes": 3}, [], "mesh.data -1, mesh.fsdp 64 does not fit the 24 devices"),
    "tasks": ("slurm", {"nodes": 8, "tasks_per_node": 3}, [], "tasks_per_node 3 must be 1, or gpus_per_node 8"),
    "workdir": ("gke", TPU, [], "workdir runs/llama_1b would vanish with the container"),
    "nothing to run on": ("gke", {"image": "i"}, BUCKET, "give the devices to run on"),
    "no sbatch": ("slurm", {"nodes": 8}, [], "cannot run sbatch"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_cluster_would_refuse_later_is_refused_now(tmp_path, monkeypatch, name):
    verb, options, flags, message = BAD[name]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        write(verb, tmp_path, flags, **options)


def test_a_mesh_without_a_rest_must_be_all_devices():
    cfg = load_config([str(ROOT / "configs/debug.yaml"), "--mesh.data=2", "--mesh.fsdp=4"])
    check_mesh(cfg, 8)
    with pytest.raises(UserError, match=r"mesh\.data 2, mesh\.fsdp 4 does not fit the 16 devices"):
        check_mesh(cfg, 16)


def test_the_compiler_knows_every_flag_for_gpus():
    """XLA ends a process that has a flag it does not know."""
    env = os.environ | {"XLA_FLAGS": " ".join(XLA_FLAGS["cuda"][1]), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.tpu
def test_the_compiler_knows_every_flag_for_tpus():
    env = os.environ | {"LIBTPU_INIT_ARGS": " ".join(XLA_FLAGS["tpu"][1]), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    code = (
        "from jax.experimental.topologies import get_topology_desc as get; print(len(get('v5e:2x2', 'tpu').devices))"
    )
    command = [sys.executable, "-c", code]
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "4", result.stderr


NOT_TOLD = DistributedConfig()
TASK = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3"}


def test_flags_win_over_the_environment():
    told = DistributedConfig("10.0.0.1:1234", 2, 1)
    found = find_processes(told, TASK | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"})
    assert found["coordinator_address"] == "10.0.0.1:1234"
    assert (found["num_processes"], found["process_id"]) == (2, 1)
    assert found["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(("tasks", "devices"), [("1(x16)", []), ("8(x2)", [3]), ("7,9", [3]), ("16", [3])])
def test_a_task_of_slurm_has_all_gpus_of_a_node_or_its_own(tasks, devices):
    found = find_processes(NOT_TOLD, TASK | {"SLURM_STEP_TASKS_PER_NODE": tasks})
    assert found == {"cluster_detection_method": "slurm", "local_device_ids": devices}


@pytest.mark.parametrize("alone", [{}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_process_on_its_own_finds_nobody(alone):
    """Also inside a batch job, but not in a task of srun: there, a scaling study's rungs run."""
    assert find_processes(NOT_TOLD, alone) is None


def test_pods_and_tpu_hosts_are_left_to_jax(monkeypatch, tmp_path):
    assert find_processes(NOT_TOLD, {"JOB_COMPLETION_INDEX": "0"}) == {}
    monkeypatch.setattr(gptjax.cpu, "TPU_DEVICES", (str(tmp_path),))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    assert find_processes(NOT_TOLD, {}) == {}


def test_a_host_reads_its_own_rows_alone():
    read = []

    class Examples:
        def __getitem__(self, n: int) -> dict:
            read.append(n)
            return {"tokens": np.full(4, n)}

    batch = Batches(Examples(), 8, range(4, 8))[3]
    assert read == [28, 29, 30, 31]
    np.testing.assert_array_equal(batch["tokens"][:, 0], read)
