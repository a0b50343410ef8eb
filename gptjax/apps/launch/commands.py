"""The verbs of `gptjax launch`. Each writes a folder: the run's whole config, and the job that trains from it."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gptjax.apps.launch.clusters import check_mesh, parse_slice
from gptjax.apps.launch.gke import GkeJob, manifests
from gptjax.apps.launch.slurm import SlurmJob, batch_script
from gptjax.apps.launch.tpu_vm import TpuVmJob, script
from gptjax.config import Config
from gptjax.configfile import config_to_yaml, load_config
from gptjax.errors import UserError

TRAINING = ("seed", "workdir", "init_from", "profile")  # keys of a config that have no dot


def split_flags(args: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and those of train.py: `--a.b VALUE` and the keys in TRAINING."""
    own: list[str] = []
    training: list[str] = []
    target = own
    for argument in args:
        if argument.startswith("--"):
            name = argument.removeprefix("--").partition("=")[0]
            target = training if "." in name or name in TRAINING else own
        target.append(argument)
        if not argument.startswith("--") or "=" in argument:
            target = own
    return own, training


def slurm(
    config: str,
    flags: list[str],
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    tasks_per_node: int = 1,
    time: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    sbatch: str | None = None,
    setup: str | None = None,
    grace_s: int = 120,
    out: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write a batch job for Slurm, and submit it. It requeues itself until the run is done.

    Args:
        config: the run's file, as for train.py; flags such as --train.total_steps 1000 change it.
        flags: the flags that change it.
        nodes: how many.
        gpus_per_node: 0 for a cluster of CPUs.
        tasks_per_node: processes on a node: 1, which holds all of its GPUs, or one for each GPU.
        time: limit of one attempt, such as 24:00:00; null means the partition's.
        partition: where to run; null means Slurm's default.
        account: who pays.
        sbatch: further options of sbatch, such as "--exclusive --constraint=h100".
        setup: shell lines before the tasks start, such as "module load cuda".
        grace_s: seconds before the time limit at which the tasks are told to save.
        out: folder of the job's files and log; null means launch/ and the run's name.
        dry_run: write the files, submit nothing.
    """
    cfg, name = read_run(config, flags)
    if gpus_per_node and tasks_per_node not in (1, gpus_per_node):
        raise UserError(f"tasks_per_node {tasks_per_node} must be 1, or gpus_per_node {gpus_per_node}")
    check_mesh(cfg, nodes * (gpus_per_node or tasks_per_node * (cfg.mesh.cpu_devices or 1)))
    folder = make_folder(out, name, cfg)
    asked = {"time": time, "partition": partition, "account": account}
    options = [f"--{option}={value}" for option, value in asked.items() if value is not None]
    command = [sys.executable, "-u", "-m", "gptjax", "train", str(folder / "config.yaml")]
    layout = (nodes, tasks_per_node, gpus_per_node, grace_s)
    job = SlurmJob(name, command, f"{folder}/%j.log", *layout, options + (sbatch or "").split(), setup)
    path = folder / "job.sbatch"
    path.write_text(batch_script(job))
    if dry_run:
        print(f"sbatch {path}    submits it")
        return
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch here; on a login node: sbatch {path}   (--dry_run only writes it)")
    result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"sbatch refused {path}: {' '.join(result.stderr.split())}")
    number = result.stdout.strip().partition(";")[0]
    print(f"job {number}, log {folder}/{number}.log    (scancel --signal=TERM {number} saves and requeues it)")


def gke(
    config: str,
    flags: list[str],
    *,
    image: str,
    topology: str | None = None,
    num_slices: int = 1,
    gpu: str | None = None,
    nodes: int = 1,
    gpus_per_node: int = 8,
    queue: str | None = None,
    service_account: str | None = None,
    spot: bool = False,
    max_restarts: int = 10,
    grace_s: int = 120,
    out: str | None = None,
) -> None:
    """Write a JobSet for Google's Kubernetes, to be given to kubectl apply.

    Args:
        config: the run's file, as for train.py; flags such as --train.total_steps 1000 change it.
        flags: the flags that change it.
        image: the container image, built from the repository's Dockerfile.
        topology: the TPUs of a slice, such as v5e:16x16.
        num_slices: slices, joined by the data-centre network.
        gpu: GPUs instead: the label of their nodes, such as nvidia-h100-80gb.
        nodes: of GPUs.
        gpus_per_node: on each.
        queue: of Kueue.
        service_account: of Kubernetes, which may write to the run's bucket.
        spot: whether nodes may be taken away.
        max_restarts: after faults; a preemption does not count.
        grace_s: seconds that a pod has to save when it is taken away.
        out: folder of the job's files; null means launch/ and the run's name.
    """
    if (topology is None) == (gpu is None):
        raise UserError("say what to run on: --topology v5e:16x16, or --gpu nvidia-h100-80gb with --nodes")
    cfg, name = read_run(config, flags)
    check_bucket(cfg)
    tpus = None if topology is None else parse_slice(topology)
    check_mesh(cfg, nodes * gpus_per_node if tpus is None else tpus.chips * num_slices)
    text = config_to_yaml(cfg)
    layout = (tpus, num_slices, gpu, nodes, gpus_per_node)
    job = GkeJob(name, image, text, *layout, queue, service_account, spot, max_restarts, grace_s)
    path = make_folder(out, name, cfg) / "jobset.yaml"
    path.write_text(yaml.dump_all(manifests(job), Dumper=_Dumper, sort_keys=False, width=1000))
    print(f"kubectl apply -f {path}    submits it; kubectl logs -f job/{name}-workers-0 follows it")


def tpu_vm(
    config: str,
    flags: list[str],
    *,
    image: str,
    topology: str,
    zone: str,
    num_slices: int = 1,
    spot: bool = False,
    out: str | None = None,
) -> None:
    """Write a script of gcloud commands that queues for TPU VMs and trains on them.

    Args:
        config: the run's file, as for train.py; flags such as --train.total_steps 1000 change it.
        flags: the flags that change it.
        image: the container image, built from the repository's Dockerfile.
        topology: the TPUs of a slice, such as v5e:16x16.
        zone: of Google Cloud, such as us-west4-a.
        num_slices: slices, joined by the data-centre network.
        spot: whether they may be taken away.
        out: folder of the job's files; null means launch/ and the run's name.
    """
    cfg, name = read_run(config, flags)
    check_bucket(cfg)
    tpus = parse_slice(topology)
    check_mesh(cfg, tpus.chips * num_slices)
    path = make_folder(out, name, cfg) / "tpu_vm.sh"
    path.write_text(script(TpuVmJob(name, image, tpus, num_slices, zone, spot)))
    print(f"bash {path}    runs it, best inside tmux")


VERBS: dict[str, Callable[..., None]] = {"slurm": slurm, "gke": gke, "tpu-vm": tpu_vm}


def read_run(config: str, flags: list[str]) -> tuple[Config, str]:
    """The run, and its name as a DNS label."""
    cfg = load_config([config, *flags])
    name = re.sub(r"[^a-z0-9]+", "-", (cfg.workdir or "").rstrip("/").rpartition("/")[2].lower()).strip("-")[:40]
    return cfg, name if name[:1].isalpha() else f"run-{name}".rstrip("-")


def make_folder(out: str | None, name: str, cfg: Config) -> Path:
    """The folder of a job's files, with the run's whole config in it."""
    folder = Path(out or f"launch/{name}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_to_yaml(cfg))
    return folder


def check_bucket(cfg: Config) -> None:
    """Raise UserError where the run's directory would vanish with the machine."""
    workdir = cfg.workdir or ""
    if "://" not in workdir and not workdir.startswith("/"):
        raise UserError(
            f"workdir {workdir} would vanish with the machine; give --workdir gs://BUCKET/NAME, or the absolute path "
            "of a mounted disk that all hosts share"
        )


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are, instead of quoted."""


def _represent(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent)
