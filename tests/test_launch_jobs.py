"""Generated jobs carried out: pods as processes, scripts against stand-ins, and arguments that need quotes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY_RUN
from pods import metadata_server, pods

from gptjax.apps.launch.commands import VERBS
from gptjax.apps.launch.container import CONFIG_FOLDER
from gptjax.cli import launch
from gptjax.errors import UserError

HARD = 'it\'s "quoted" $HOME $(date) `id` \\n two  spaces\nand a line; # %j {x}'
TPU = {"image": "example.com/gptjax:1", "topology": "v5e:16x16"}
BUCKET = "--workdir=gs://bucket/runs/a"


def fake(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """Return an environment in which these programs of the shell are found first."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "POLL_S": "0"}


def run_bash(script: Path, env: dict[str, str], **how) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False, timeout=120, **how)


# ---------------------------------------------------------------------------------------------------------------
# Google's Kubernetes

LAYOUTS = {
    "a slice of two hosts": {"topology": "v5e:2x4"},
    "two slices of a host": {"topology": "v5e:2x2", "num_slices": 2},
    "two GPU nodes": {"gpu": "nvidia-h100-80gb", "nodes": 2, "gpus_per_node": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pods_of_a_jobset_train_together(tmp_path, corpus_file, layout):
    """The command lines and environments of the manifest, on the CPU: nothing but the devices is another."""
    pytest.importorskip("requests", reason="JAX asks Google's metadata server by it: pip install requests")
    (tmp_path / "disk").mkdir()
    flags = [*TINY_RUN[1:], "--train.total_steps=2", "--mesh.cpu_devices=4", f"--data.path={corpus_file}"]
    flags += [f"--workdir={tmp_path / 'disk/run'}", f"--data.cache_dir={tmp_path / 'tokens'}"]
    options = {"image": "i", "volume": [f"claim:{tmp_path / 'disk'}"], "env": [f"HARD={HARD}"], "secret": ["wandb"]}
    VERBS["gke"](str(ROOT / TINY_RUN[0]), flags, **options, **LAYOUTS[layout], out=str(tmp_path / "job"))
    started = []
    with metadata_server() as metadata:
        for command, given in pods(tmp_path / "job/jobset.yaml", {"wandb": {"KEY": "x"}}):
            assert (given["HARD"], given["KEY"]) == (HARD, "x")
            assert command[:2] == ["python", "-u"]
            command = [sys.executable, *(word.replace(CONFIG_FOLDER, str(tmp_path / "job")) for word in command[1:])]
            env = {k: v for k, v in os.environ.items() if k != "NPROC"} | given | metadata
            env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # a CPU knows no flags of GPUs
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, env=env, cwd=ROOT, **pipes))
        logs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], logs
    assert json.loads((tmp_path / "disk/run/env.json").read_text())["processes"] == 2
    rows = [json.loads(line) for line in (tmp_path / "disk/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_a_tpu_pod_runs_as_root_and_the_images_user_may_write_to_the_volumes_of_a_gpu_pod(tmp_path):
    volume = {"volume": ["claim:/data"]}
    flags = ["--workdir=/data/run", "--data.path=/data/owt"]

    def pod_of(**options) -> dict:
        VERBS["gke"](str(ROOT / "configs/llama_1b.yaml"), flags, image="i", **options, **volume, out=str(tmp_path))
        jobset = list(yaml.safe_load_all((tmp_path / "jobset.yaml").read_text()))[1]
        return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]

    tpu, gpu = pod_of(topology="v5e:16x16"), pod_of(gpu="nvidia-h100-80gb", nodes=8)
    assert tpu["containers"][0]["securityContext"]["runAsUser"] == 0
    assert "securityContext" not in gpu["containers"][0]
    user = next(line.split()[1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("USER"))
    assert gpu["securityContext"] == {"fsGroup": int(user)}


REFUSED = {
    "relative workdir": (["--workdir=runs/a"], {}, "workdir runs/a would vanish with the container"),
    "no volume there": (["--workdir=/data/a"], {"volume": ["claim:/datasets"]}, "workdir /data/a would vanish"),
    "out of the volume": (["--workdir=/data/../a"], {"volume": ["claim:/data"]}, "would vanish with the container"),
    "relative data": ([BUCKET, "--data.path=data/owt"], {}, "data.path data/owt is a path on this machine"),
    "data at home": ([BUCKET, "--data.path=~/owt"], {}, "data.path .*/owt is a path on this machine"),
    "relative tokenizer": ([BUCKET, "--data.tokenizer=t/tokenizer.json"], {}, "data.tokenizer t/tokenizer.json is"),
    "relative weights": ([BUCKET, "--init_from=./base"], {}, "init_from ./base is a path on this machine"),
    "no value": ([BUCKET], {"env": ["HF_HOME"]}, "--env 'HF_HOME' is not NAME=VALUE"),
    "no name": ([BUCKET], {"env": ["a b=1"]}, "is not NAME=VALUE"),
    "twice": ([BUCKET], {"env": ["A=1", "A=2"]}, "--env A is given twice"),
    "no path": ([BUCKET], {"volume": ["claim"]}, "--volume 'claim' is not SOURCE:/PATH"),
    "two at a path": ([BUCKET], {"volume": ["a:/d", "b:/d/"]}, "something else is mounted at /d"),
}


@pytest.mark.parametrize("verb", ["gke", "tpu-vm"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_container_would_not_find_is_refused_before_anything_is_written(tmp_path, name, verb):
    flags, options, message = REFUSED[name]
    flags = ["--data.path=/data/owt", *flags]
    zone = {"zone": "z"} if verb == "tpu-vm" else {}
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        VERBS[verb](str(ROOT / "configs/llama_1b.yaml"), flags, out=str(tmp_path / "job"), **TPU, **zone, **options)
    assert not (tmp_path / "job").exists()


def test_names_that_are_no_paths_are_accepted(tmp_path):
    flags = [BUCKET, "--data.path=tinyshakespeare", "--data.tokenizer=gpt2", "--init_from=openai-community/gpt2"]
    VERBS["gke"](str(ROOT / "configs/llama_1b.yaml"), flags, **TPU, out=str(tmp_path))
    assert (tmp_path / "jobset.yaml").exists()


def test_caches_lie_in_the_containers_home_and_not_in_that_of_this_machine(tmp_path):
    VERBS["gke"](str(ROOT / "configs/llama_1b.yaml"), [BUCKET, "--data.path=/d"], **TPU, out=str(tmp_path))
    config_map = next(yaml.safe_load_all((tmp_path / "jobset.yaml").read_text()))
    for text in (config_map["data"]["config.yaml"], (tmp_path / "config.yaml").read_text()):
        assert yaml.safe_load(text)["data"]["cache_dir"].startswith("~/")


# ---------------------------------------------------------------------------------------------------------------
# Slurm


def directives(script: Path) -> list[str]:
    lines = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)]


def test_a_folder_with_spaces_and_percent_signs_is_one_option_of_sbatch(tmp_path):
    folder = tmp_path / "my 100%j job's"
    VERBS["slurm"](str(ROOT / "configs/llama_1b.yaml"), [], nodes=8, out=str(folder), dry_run=True)
    (output,) = [word for word in directives(folder / "job.sbatch") if word.startswith("--output")]
    assert output == f"--output={str(folder).replace('%', '%%')}/%j.log"


def test_the_helps_own_example_of_sbatchs_options_works(tmp_path, capsys):
    args = ["slurm", str(ROOT / "configs/llama_1b.yaml"), "--nodes", "8", "--dry_run", "--out", str(tmp_path)]
    launch([*args, "--sbatch", "--exclusive --constraint=h100 --comment='two words'"])
    words = directives(tmp_path / "job.sbatch")
    assert words[-3:] == ["--exclusive", "--constraint=h100", "--comment=two words"]
    with pytest.raises(SystemExit):
        launch([*args, "--sbatch", "--comment='no end"])
    assert '--sbatch "--comment=\'no end": No closing quotation' in capsys.readouterr().err


def test_options_that_come_several_times_are_one_list(monkeypatch):
    called = {}

    def gke(
        config: str,
        flags: list[str],
        *,
        env: list[str] | None = None,
        secret: list[str] | None = None,
        zone: str = "",
    ) -> None:
        """Launch."""
        called.update(locals())

    monkeypatch.setitem(VERBS, "gke", gke)
    launch(["gke", "c.yaml", "--env", "A=--b", "--seed", "7", "--env=B=2", "--secret", "s"])
    assert (called["env"], called["secret"], called["flags"]) == (["A=--b", "B=2"], ["s"], ["--seed=7"])
    launch(["gke", "c.yaml"])
    assert called["env"] is None


SCONTROL = 'case "$2" in hostnames) echo n1;; node) echo "NodeAddr=fd00::7 x";; *) exit 0;; esac'


def test_the_tasks_of_a_batch_job_get_the_values_as_they_were_given(tmp_path):
    VERBS["slurm"](
        str(ROOT / "configs/llama_1b.yaml"),
        [],
        nodes=8,
        env=[f"HARD={HARD}"],
        out=str(tmp_path / "a b"),
        dry_run=True,
    )
    srun = 'printf %s "$HARD" > hard; printf %s "$JAX_COORDINATOR_ADDRESS" > address; printf %s "${@: -1}" > config'
    env = fake(tmp_path, {"srun": srun, "scontrol": SCONTROL}) | {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    done = run_bash(tmp_path / "a b/job.sbatch", env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hard").read_text() == HARD
    assert (tmp_path / "config").read_text() == str(tmp_path / "a b/config.yaml")
    assert (tmp_path / "address").read_text() == "[fd00::7]:61441"


BROKEN_SLURM = {
    "no scontrol": ({"srun": "exit 0", "scontrol": "exit 127"}, 1, "does not report the address of the first node"),
    "no srun": ({"scontrol": SCONTROL, "srun": "exec no-such-program"}, 127, "not found"),
    "no requeue": (
        {"srun": "exit 75", "scontrol": f'[ "$1" = requeue ] && exit 1; {SCONTROL}'},
        75,
        "scontrol requeue failed: submit the job again to resume",
    ),
}


@pytest.mark.parametrize("name", BROKEN_SLURM)
def test_a_batch_job_says_which_program_of_slurm_failed(tmp_path, name):
    programs, code, message = BROKEN_SLURM[name]
    VERBS["slurm"](str(ROOT / "configs/llama_1b.yaml"), [], nodes=8, out=str(tmp_path / "job"), dry_run=True)
    env = fake(tmp_path, programs) | {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    done = run_bash(tmp_path / "job/job.sbatch", env, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr


SBATCH = {
    "absent": (None, "cannot run sbatch: No such file or directory; on a login node: sbatch "),
    "failing": ("echo 'error: Invalid\naccount' >&2; exit 1", "sbatch failed with code 1: error: Invalid account"),
    "slow": ("exec /bin/sleep 3600", "sbatch did not end within 1 s and was killed"),
}


@pytest.mark.parametrize("state", SBATCH)
def test_a_batch_job_that_cannot_be_submitted_is_kept_and_said(tmp_path, monkeypatch, state):
    body, message = SBATCH[state]
    env = fake(tmp_path, {} if body is None else {"sbatch": body})
    monkeypatch.setenv("PATH", env["PATH"].split(":")[0])
    if state == "slow":
        monkeypatch.setattr("gptjax.apps.launch.commands.SBATCH_TIMEOUT_S", 1)
    with pytest.raises(UserError, match=message):
        VERBS["slurm"](str(ROOT / "configs/llama_1b.yaml"), [], nodes=8, out=str(tmp_path / "job"))
    assert (tmp_path / "job/job.sbatch").exists()


# ---------------------------------------------------------------------------------------------------------------
# TPU VMs


def write_tpu_vm(folder: Path, **options) -> Path:
    """Write the script of a slice of one host with hard values, and return it."""
    options = {"image": "example.com/gptjax:1", "topology": "v5e:16x16", "zone": "us-west4-a"} | options
    VERBS["tpu-vm"](str(ROOT / "configs/llama_1b.yaml"), [BUCKET, "--data.path=/d"], **options, out=str(folder))
    return folder / "tpu_vm.sh"


# gcloud runs the commands for the hosts here, in a home of their own; docker notes its arguments.
GCLOUD = r"""
echo "$@" >> "$LOG/gcloud.log"
for word; do case "$word" in --command=*) HOME=$LOG/home exec bash -c "${word#--command=}";; esac; done
case "$*" in
  *" scp "*) target=${6#*:}; cp "$5" "$LOG/home/$target";;
  *describe*) [ -e "$LOG/created" ] && echo ACTIVE;;
  *" create "*) touch "$LOG/created";;
  *" delete "*) rm "$LOG/created";;
esac
"""
DOCKER = 'if [ "$1" = run ]; then printf "%s\\0" "$@" > "$LOG/docker"; cp "$3" "$LOG/env"; fi'


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    (folder / "home").mkdir()
    made = {"gcloud": GCLOUD, "docker": DOCKER, "sudo": '[ "$1" = gcloud ] || exec "$@"'} | programs
    return fake(folder, made) | {"LOG": str(folder)}


def test_containers_of_tpu_vms_get_the_values_as_they_were_given(tmp_path):
    options = {"env": [f"HARD={HARD}"], "secret": ["WANDB_API_KEY"], "volume": ["/mnt/a b:/data"]}
    script = write_tpu_vm(tmp_path / "a b", **options, image="example.com/a$b:1")
    done = run_bash(script, stand_ins(tmp_path) | {"WANDB_API_KEY": "k$1 '\""})
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "docker").read_text().split("\0")[:-1]
    assert f"HARD={HARD}" in words
    assert words[-3:] == ["example.com/a$b:1", "train", "/config.yaml"]
    assert "/mnt/a b:/data" in words
    assert (tmp_path / "env").read_text() == "WANDB_API_KEY=k$1 '\"\n"
    assert "k$1" not in script.read_text()
    assert not (tmp_path / "created").exists()


def test_a_secret_that_is_not_set_stops_the_script_before_it_asks_for_anything(tmp_path):
    script = write_tpu_vm(tmp_path / "job", secret=["SURELY_NOT_SET"])
    done = run_bash(script, stand_ins(tmp_path))
    assert (done.returncode, "--secret SURELY_NOT_SET" in done.stderr) == (2, True)
    assert not (tmp_path / "gcloud.log").exists()


BROKEN_GCLOUD = {
    "refuses to create": ('[ "$3" = queued-resources ] && exit 1', 1, "gcloud does not report the state of a"),
    "hangs": ("exec /bin/sleep 3600", 1, "gcloud does not report the state of a"),
    "cannot copy": (
        f'case "$*" in *" scp "*) exit 9;; esac\n{GCLOUD}',
        9,
        "training ended with 9; the slices are kept",
    ),
}


@pytest.mark.parametrize("name", BROKEN_GCLOUD)
def test_the_script_of_tpu_vms_ends_where_gcloud_cannot_go_on(tmp_path, name):
    body, code, message = BROKEN_GCLOUD[name]
    limit = {"GCLOUD_TIMEOUT_S": "0.2"} if name == "hangs" else {}
    done = run_bash(write_tpu_vm(tmp_path / "job"), stand_ins(tmp_path, gcloud=body) | limit)
    assert done.returncode == code
    assert message in done.stderr


def test_the_script_of_tpu_vms_says_that_there_is_no_gcloud(tmp_path):
    script = write_tpu_vm(tmp_path / "job")
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    done = run_bash(script, {"PATH": str(tmp_path / "bin")})
    assert (done.returncode, "install the Google Cloud CLI" in done.stderr) == (2, True)
