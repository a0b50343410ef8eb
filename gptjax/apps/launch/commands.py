"""The commands of `gptjax launch`. Each writes a folder with the run's whole config and the job that trains it."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gptjax.apps.launch.clusters import check_mesh, parse_slice
from gptjax.apps.launch.container import VARIABLE, check_model, parse_variables, parse_volumes, prepare_container
from gptjax.apps.launch.gke import GkeJob, manifests
from gptjax.apps.launch.serve_gke import GkeServer, server_manifests
from gptjax.apps.launch.slurm import SlurmJob, batch_script
from gptjax.apps.launch.tpu_vm import TpuVmJob, script
from gptjax.config import Config
from gptjax.configfile import config_to_yaml, load_config
from gptjax.errors import UserError
from gptjax.shell.environment import ProgramError, run_program
from gptjax.shell.paths import UserPath, writing

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
    """Write a batch job for Slurm and submit it. The job requeues itself until the run is done.

    Args:
        config: the run's config file, as for train.py; flags such as --train.total_steps 1000 override its keys.
        nodes: number of nodes; the mesh must fit nodes x gpus_per_node devices.
        gpus_per_node: number of GPUs on each node; 0 for a cluster of CPUs.
        tasks_per_node: processes on a node: 1, which uses all of its GPUs, or as many as GPUs; try the latter if a
            process with several GPUs hangs.
        time: time limit of one attempt, such as 24:00:00; the default is the partition's. The job saves and requeues
            itself before the limit.
        partition: Slurm partition; the default is the cluster's.
        account: account that is charged, where the cluster requires one.
        sbatch: further options of sbatch, such as "--exclusive --constraint=h100".
        setup: shell commands to run before the tasks start, such as "module load cuda".
        env: environment variable of the tasks, as NAME=VALUE; may be repeated. sbatch itself passes on the variables
            of the submitting shell, secrets included.
        grace_s: seconds before the time limit at which the tasks are told to save; raise it if a checkpoint takes
            longer than that.
        out: directory of the job's files and log; the default is launch/NAME.
        dry_run: write the files without submitting the job, to read or edit them first.
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
    if dry_run:
        print(f"{shlex.join(['sbatch', str(path)])}    submits it")
    else:
        submit(path)


def submit(path: Path) -> None:
    """Submit a Slurm job, and print its number and log; raise UserError if sbatch fails."""
    try:
        number = run_program(["sbatch", "--parsable", str(path)], SBATCH_TIMEOUT_S).partition(";")[0]
    except ProgramError as error:
        by_hand = shlex.join(["sbatch", str(path)])
        raise UserError(f"{error}; on a login node: {by_hand}   (--dry_run only writes it)") from None
    print(f"job {number}, log {path.parent}/{number}.log    (scancel --signal=TERM {number} saves and requeues it)")


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
    """Write a JobSet for Google Kubernetes Engine, for `kubectl apply`.

    Args:
        config: the run's config file, as for train.py; flags such as --train.total_steps 1000 override its keys.
        image: the container image, built from the repository's Dockerfile.
        topology: type and shape of a TPU slice, such as v5e:16x16; or give gpu.
        num_slices: number of TPU slices, joined by the data-centre network; mesh.data must be a multiple of it.
        gpu: type of GPU nodes, by their label, such as nvidia-h100-80gb; or give topology.
        nodes: number of GPU nodes.
        gpus_per_node: number of GPUs on each node.
        queue: local queue of Kueue, where the cluster uses it.
        service_account: Kubernetes service account, if the default one may not write to the run's bucket.
        spot: use spot nodes, which are cheaper and may be preempted; the run then resumes.
        max_restarts: restarts after failures before the job gives up; preemptions do not count.
        grace_s: seconds that a preempted pod has to save; raise it if a checkpoint takes longer.
        env: environment variable of the container, as NAME=VALUE; may be repeated.
        secret: name of a Kubernetes secret whose keys become environment variables (kubectl create secret generic
            wandb --from-literal=WANDB_API_KEY=...); may be repeated.
        volume: persistent volume claim and its mount point, as CLAIM:/PATH; may be repeated.
        out: directory of the job's files; the default is launch/NAME.
    """
    if (topology is None) == (gpu is None):
        raise UserError("give the devices to run on: --topology v5e:16x16, or --gpu nvidia-h100-80gb with --nodes")
    cfg, name = read_run(config, flags)
    cfg, variables, volumes = prepare_container(cfg, env, volume)
    if "PROCESS_ID" in variables:
        raise UserError("--env PROCESS_ID is reserved for the number of a pod; use another name")
    tpus = None if topology is None else parse_slice(topology)
    check_mesh(cfg, nodes * gpus_per_node if tpus is None else tpus.chips * num_slices)
    layout = (tpus, num_slices, gpu, nodes, gpus_per_node, queue, service_account, spot, max_restarts, grace_s)
    given = (variables, secret or [], volumes)
    job = GkeJob(name, image, config_to_yaml(cfg), *layout, *given)
    path = make_folder(out, name, cfg) / "jobset.yaml"
    path.write_text(_to_yaml(manifests(job)))
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
    """Write a shell script that queues for TPU VMs with gcloud and trains on them.

    Args:
        config: the run's config file, as for train.py; flags such as --train.total_steps 1000 override its keys.
        image: the container image, built from the repository's Dockerfile.
        topology: type and shape of a TPU slice, such as v5e:16x16.
        zone: zone of Google Cloud, such as us-west4-a.
        num_slices: number of TPU slices, joined by the data-centre network; mesh.data must be a multiple of it.
        spot: use spot capacity, which is cheaper and may be preempted; the script then queues again and resumes.
        env: environment variable of the container, as NAME=VALUE; may be repeated.
        secret: name of an environment variable of the script, such as WANDB_API_KEY, whose value is passed to the
            container and written to no file of the job; may be repeated.
        volume: directory of every host and its mount point, as DIRECTORY:/PATH; may be repeated.
        out: directory of the job's files; the default is launch/NAME.
    """
    cfg, name = read_run(config, flags)
    cfg, variables, volumes = prepare_container(cfg, env, volume)
    if strange := [text for text in secret or [] if not re.fullmatch(VARIABLE, text)]:
        raise UserError(f"--secret {strange[0]!r} is not the name of a variable; write it as --secret WANDB_API_KEY")
    tpus = parse_slice(topology)
    check_mesh(cfg, tpus.chips * num_slices)
    given = (variables, secret or [], volumes)
    path = make_folder(out, name, cfg) / "tpu_vm.sh"
    path.write_text(script(TpuVmJob(name, image, tpus, num_slices, zone, spot, *given)))
    print(f"{shlex.join(['bash', str(path)])}    runs it, best inside tmux")


def serve_gke(
    model: str,
    *,
    image: str,
    api_key: str | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    topology: str | None = None,
    replicas: int = 1,
    options: str | None = None,
    timeout_s: int = 600,
    name: str | None = None,
    service_account: str | None = None,
    env: list[str] | None = None,
    secret: list[str] | None = None,
    volume: list[str] | None = None,
    out: UserPath | None = None,
) -> None:
    """Write a Deployment and a Service that serve a model in Google Kubernetes Engine, for `kubectl apply`.

    Args:
        model: a path inside the container, a bucket's address, or a Hugging Face id such as gpt2.
        image: the container image, built from the repository's Dockerfile with the extra serve.
        api_key: Kubernetes secret that holds the key clients must send, as SECRET/KEY (kubectl create secret generic
            gptjax --from-literal=api-key=...); without it, anyone inside the cluster can use the server.
        gpu: type of GPU nodes, by their label, such as nvidia-l4; without gpu and topology, CPUs serve.
        gpus: number of GPUs of each pod.
        topology: type and shape of a TPU slice of one host, such as v5e:2x2, in place of gpu.
        replicas: number of pods, each with the whole model; the Service spreads requests over them.
        options: further options of `gptjax serve`, such as "--slots 16 --dtype int8".
        timeout_s: longest time of an answer in seconds; a pod that ends has as long to finish what runs.
        name: of the Deployment and the Service, a DNS label, and of the model; the default is the model's last part.
        service_account: Kubernetes service account, if the default one may not read the model's bucket.
        env: environment variable of the container, as NAME=VALUE; may be repeated.
        secret: name of a Kubernetes secret whose keys become environment variables; may be repeated.
        volume: persistent volume claim and its mount point, as CLAIM:/PATH; may be repeated.
        out: directory of the file; the default is launch/NAME.
    """
    shown = name or dns_label(model)
    if shown != dns_label(shown):
        raise UserError(f"--name {shown!r} is not a DNS label; write lower-case letters, digits and dashes")
    if gpu is not None and topology is not None:
        raise UserError("--gpu and --topology exclude each other; leave one out")
    if replicas < 1 or gpus < 1 or timeout_s < 1:
        raise UserError("--replicas, --gpus and --timeout_s must be at least 1")
    tpus = None if topology is None else parse_slice(topology)
    if tpus is not None and tpus.hosts > 1:
        raise UserError(f"--topology {topology} has {tpus.hosts} hosts; a server runs on one, such as v5e:2x2")
    volumes = parse_volumes(volume)
    check_model(model, volumes)
    arguments = [model, "--name", shown, *_words("options", options or "")]
    devices = (tpus, gpu, gpus, _parse_key(api_key), timeout_s, service_account)
    server = GkeServer(shown, image, arguments, replicas, *devices, parse_variables(env), secret or [], volumes)
    with writing(os.path.join(out or f"launch/{shown}", "serve.yaml")) as path:
        path.write_text(_to_yaml(server_manifests(server)))
    apply = shlex.join(["kubectl", "apply", "-f", str(path.absolute())])
    print(f"{apply}    starts it; kubectl port-forward service/{shown} 8000:80 reaches it from here")


def _parse_key(given: str | None) -> tuple[str, str] | None:
    """Return the secret and its key of SECRET/KEY; None for none."""
    if given is None:
        return None
    secret, slash, key = given.partition("/")
    if not (secret and slash and key) or "/" in key:
        raise UserError("--api_key names a Kubernetes secret, as SECRET/KEY, and is not the key itself")
    return secret, key


VERBS: dict[str, Callable[..., None]] = {"slurm": slurm, "gke": gke, "tpu-vm": tpu_vm, "serve-gke": serve_gke}


def read_run(config: str, flags: list[str]) -> tuple[Config, str]:
    """Return the run's config, and its name as a DNS label."""
    cfg = load_config([config, *flags])
    return cfg, dns_label(cfg.workdir or "")


def dns_label(path: str) -> str:
    """Return the last part of a path as a DNS label."""
    name = re.sub(r"[^a-z0-9]+", "-", path.rstrip("/").rpartition("/")[2].lower()).strip("-")[:40].rstrip("-")
    return name if name[:1].isalpha() else f"run-{name}".rstrip("-")


def make_folder(out: str | None, name: str, cfg: Config) -> Path:
    """Return the directory of a job's files, with the run's whole config; raise UserError if it cannot be written."""
    with writing(os.path.join(out or f"launch/{name}", "config.yaml")) as path:
        path.write_text(config_to_yaml(cfg), encoding="utf-8")
    return path.parent.absolute()


def _words(option: str, text: str) -> list[str]:
    """Return the words of an option's value, as a shell splits them; raise UserError for an unclosed quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{option} {text!r}: {error}; quote it as for a shell") from None


def _to_yaml(documents: list[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)


class _Dumper(yaml.SafeDumper):
    """A dumper that writes texts of several lines as blocks."""


def _represent(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent)
