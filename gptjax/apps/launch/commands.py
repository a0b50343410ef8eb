"""The verbs of `gptjax launch`. Each writes a folder: the run's whole config, and the job that trains from it."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gptjax.apps.launch.clusters import check_mesh, parse_slice
from gptjax.apps.launch.container import VARIABLE, check_paths, for_container, parse_variables, parse_volumes
from gptjax.apps.launch.gke import GkeJob, manifests
from gptjax.apps.launch.slurm import SlurmJob, batch_script
from gptjax.apps.launch.tpu_vm import TpuVmJob, script
from gptjax.config import Config
from gptjax.configfile import config_to_yaml, load_config
from gptjax.environment import ProgramError, run_program
from gptjax.errors import UserError
from gptjax.paths import UserPath, writing

SBATCH_TIMEOUT_S = 120


def slurm(
    config: UserPath,
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
    env: list[str] | None = None,
    grace_s: int = 120,
    out: UserPath | None = None,
    dry_run: bool = False,
) -> None:
    """Write a batch job for Slurm, and submit it. It requeues itself until the run is done.

    Args:
        config: the run's file, as for train.py; flags such as --train.total_steps 1000 change it.
        flags: the flags that change it.
        nodes: how many.
        gpus_per_node: 0 for a cluster of CPUs.
        tasks_per_node: processes on a node: 1, which holds all of its GPUs, or one for each GPU.
        time: limit of one attempt, such as 24:00:00; without it the partition's.
        partition: where to run; without it Slurm's default.
        account: who pays.
        sbatch: further options of sbatch, such as "--exclusive --constraint=h100".
        setup: shell lines before the tasks start, such as "module load cuda".
        env: NAME=VALUE, a variable of the tasks' environment; may be given several times. Variables of the shell
            that submits, secrets among them, are passed on by sbatch itself.
        grace_s: seconds before the time limit at which the tasks are told to save.
        out: folder of the job's files and log; without it launch/ and the run's name.
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
    options += _words("sbatch", sbatch or "")
    log = str(folder).replace("%", "%%") + "/%j.log"
    job = SlurmJob(name, command, log, *layout, options, setup, parse_variables(env))
    path = folder / "job.sbatch"
    path.write_text(batch_script(job))
    by_hand = shlex.join(["sbatch", str(path)])
    if dry_run:
        print(f"{by_hand}    submits it")
        return
    try:
        number = run_program(["sbatch", "--parsable", str(path)], SBATCH_TIMEOUT_S).partition(";")[0]
    except ProgramError as error:
        raise UserError(f"{error}; on a login node: {by_hand}   (--dry_run only writes it)") from None
    print(f"job {number}, log {folder}/{number}.log    (scancel --signal=TERM {number} saves and requeues it)")


def gke(
    config: UserPath,
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
    env: list[str] | None = None,
    secret: list[str] | None = None,
    volume: list[str] | None = None,
    out: UserPath | None = None,
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
        env: NAME=VALUE, a variable of the container's environment; may be given several times.
        secret: a secret of Kubernetes, whose keys become variables of the environment (kubectl create secret generic
            wandb --from-literal=WANDB_API_KEY=...); may be given several times.
        volume: CLAIM:/PATH, a persistent volume's claim and where it is mounted; may be given several times.
        out: folder of the job's files; without it launch/ and the run's name.
    """
    if (topology is None) == (gpu is None):
        raise UserError("say what to run on: --topology v5e:16x16, or --gpu nvidia-h100-80gb with --nodes")
    cfg, name = read_run(config, flags)
    volumes = parse_volumes(volume)
    check_paths(cfg, volumes)
    cfg = for_container(cfg)
    variables = parse_variables(env)
    if "PROCESS_ID" in variables:
        raise UserError("--env PROCESS_ID is what tells a pod its number; give another name")
    tpus = None if topology is None else parse_slice(topology)
    check_mesh(cfg, nodes * gpus_per_node if tpus is None else tpus.chips * num_slices)
    text = config_to_yaml(cfg)
    layout = (tpus, num_slices, gpu, nodes, gpus_per_node)
    given = (variables, secret or [], volumes)
    job = GkeJob(name, image, text, *layout, queue, service_account, spot, max_restarts, grace_s, *given)
    path = make_folder(out, name, cfg) / "jobset.yaml"
    path.write_text(yaml.dump_all(manifests(job), Dumper=_Dumper, sort_keys=False, width=1000))
    apply = shlex.join(["kubectl", "apply", "-f", str(path)])
    print(f"{apply}    submits it; kubectl logs -f job/{name}-workers-0 follows it")


def tpu_vm(
    config: UserPath,
    flags: list[str],
    *,
    image: str,
    topology: str,
    zone: str,
    num_slices: int = 1,
    spot: bool = False,
    env: list[str] | None = None,
    secret: list[str] | None = None,
    volume: list[str] | None = None,
    out: UserPath | None = None,
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
        env: NAME=VALUE, a variable of the container's environment; may be given several times.
        secret: NAME of a variable that the script's own environment has when it runs, such as WANDB_API_KEY; its
            value is in no file of the job. May be given several times.
        volume: DIRECTORY:/PATH, a directory of every host and where it is mounted; may be given several times.
        out: folder of the job's files; without it launch/ and the run's name.
    """
    cfg, name = read_run(config, flags)
    volumes = parse_volumes(volume)
    check_paths(cfg, volumes)
    cfg = for_container(cfg)
    if strange := [text for text in secret or [] if not re.fullmatch(VARIABLE, text)]:
        raise UserError(f"--secret {strange[0]!r} is no name of a variable; give e.g. --secret WANDB_API_KEY")
    tpus = parse_slice(topology)
    check_mesh(cfg, tpus.chips * num_slices)
    given = (parse_variables(env), secret or [], volumes)
    path = make_folder(out, name, cfg) / "tpu_vm.sh"
    path.write_text(script(TpuVmJob(name, image, tpus, num_slices, zone, spot, *given)))
    print(f"{shlex.join(['bash', str(path)])}    runs it, best inside tmux")


VERBS: dict[str, Callable[..., None]] = {"slurm": slurm, "gke": gke, "tpu-vm": tpu_vm}


def read_run(config: str, flags: list[str]) -> tuple[Config, str]:
    """The run, and its name as a DNS label."""
    cfg = load_config([config, *flags])
    name = re.sub(r"[^a-z0-9]+", "-", (cfg.workdir or "").rstrip("/").rpartition("/")[2].lower()).strip("-")[:40]
    return cfg, name if name[:1].isalpha() else f"run-{name}".rstrip("-")


def make_folder(out: str | None, name: str, cfg: Config) -> Path:
    """The folder of a job's files, with the run's whole config in it; raises UserError where it cannot be written."""
    with writing(os.path.join(out or f"launch/{name}", "config.yaml")) as path:
        path.write_text(config_to_yaml(cfg), encoding="utf-8")
    return path.parent.absolute()


def _words(option: str, text: str) -> list[str]:
    """The words of an option's value, as a shell splits them; raises UserError for a quote without its end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{option} {text!r}: {error}; quote it as for a shell") from None


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are, instead of quoted."""


def _represent(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent)
