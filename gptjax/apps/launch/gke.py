"""Write a JobSet, with which Kubernetes runs one pod on each host of TPU slices or GPU nodes."""

from typing import Any, NamedTuple

from gptjax.apps.launch.clusters import CHIPS_PER_HOST, Slice
from gptjax.apps.launch.container import CONFIG_FOLDER, merge_xla_flags
from gptjax.errors import STOPPED

PORT = 8476  # of JAX's coordinator
USER = 1000  # the Dockerfile's


class GkeJob(NamedTuple):
    """A job for a Kubernetes cluster.

    Attributes:
        name: name of the JobSet, a DNS label.
        image: container image, built from the repository's Dockerfile with the extra tpu or cuda.
        config: the run's config, as YAML.
        slice: the TPU slice; None for GPUs.
        num_slices: number of TPU slices, joined by the data-centre network.
        gpu: value of the node label cloud.google.com/gke-accelerator.
        nodes: number of GPU nodes.
        gpus_per_node: number of GPUs on each.
        queue: local queue of Kueue; None without Kueue.
        service_account: Kubernetes service account that may write to the bucket; None for the default one.
        spot: whether nodes may be preempted.
        max_restarts: restarts after failures; restarts after a preemption do not count.
        grace_s: seconds that a preempted pod has to save.
        variables: environment variables.
        secrets: names of Kubernetes secrets, whose keys become environment variables.
        volumes: path inside the container -> claim of a persistent volume.
    """

    name: str
    image: str
    config: str
    slice: Slice | None
    num_slices: int
    gpu: str | None
    nodes: int
    gpus_per_node: int
    queue: str | None
    service_account: str | None
    spot: bool
    max_restarts: int
    grace_s: int
    variables: dict[str, str]
    secrets: list[str]
    volumes: dict[str, str]


def manifests(job: GkeJob) -> list[dict[str, Any]]:
    """Return a ConfigMap with the run's config, and the JobSet."""
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name},
        "data": {"config.yaml": job.config},
    }
    metadata: dict[str, Any] = {"name": job.name}
    if job.slice is not None:  # a replicated job is a slice, with a node pool of its own
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    if job.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    pods = job.nodes if job.slice is None else job.slice.hosts
    batch_job = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": 0,  # one pod cannot rejoin alone: the whole set restarts
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [STOPPED]},
                },
            ]
        },
        "template": {"spec": _pod(job)},
    }
    spec = {
        # Preemptions, which the pods' policy names, restart without limit; anything else up to maxRestarts times.
        "failurePolicy": {
            "maxRestarts": job.max_restarts,
            "rules": [
                {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]},
            ],
        },
        "replicatedJobs": [{"name": "workers", "replicas": job.num_slices, "template": {"spec": batch_job}}],
    }
    jobset = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}
    return [config_map, jobset]


def _pod(job: GkeJob) -> dict[str, Any]:
    command = ["python", "-u", "-m", "gptjax", "train", f"{CONFIG_FOLDER}/config.yaml"]
    variables = merge_xla_flags(job.variables, "cuda" if job.slice is None else "tpu")
    environment = environment_of(variables)
    volumes: list[dict[str, Any]] = [{"name": "config", "configMap": {"name": job.name}}]
    mounts = [{"name": "config", "mountPath": CONFIG_FOLDER}]
    mount(job.volumes, volumes, mounts)
    if job.slice is None:  # GKE tells TPU hosts their numbers, but not GPU nodes
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment.append({"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}})
        command += [f"--distributed.coordinator={job.name}-workers-0-0.{job.name}:{PORT}"]
        command += [f"--distributed.num_processes={job.nodes}", "--distributed.process_id=$(PROCESS_ID)"]
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})  # NCCL's; a container has 64 MiB
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        selector = {"cloud.google.com/gke-accelerator": job.gpu}
        resource, count = "nvidia.com/gpu", job.gpus_per_node
    else:
        selector = select_tpus(job.slice)
        resource, count = "google.com/tpu", min(job.slice.chips, CHIPS_PER_HOST)
    container = {
        "name": "train",
        "image": job.image,
        "command": command,
        "env": environment,
        "resources": {"limits": {resource: str(count)}},
        "volumeMounts": mounts,
    }
    pass_secrets(container, job.secrets)
    if job.slice is not None:
        as_tpu_container(container)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if job.spot else {}),
        "containers": [container],
        "volumes": volumes,
    }
    if job.spot:
        tolerated = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        pod["tolerations"] = [tolerated]
    if job.slice is None and job.volumes:
        pod["securityContext"] = {"fsGroup": USER}  # so that the image's user may write to the volumes
    if job.service_account is not None:
        pod["serviceAccountName"] = job.service_account
    return pod


def environment_of(variables: dict[str, str]) -> list[dict[str, Any]]:
    """Return environment variables as a container has them."""
    # Kubernetes replaces $(NAME) in values; $$ stands for a single $.
    return [{"name": name, "value": value.replace("$", "$$")} for name, value in variables.items()]


def pass_secrets(container: dict[str, Any], secrets: list[str]) -> None:
    """Let the keys of Kubernetes secrets become environment variables of a container."""
    if secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in secrets]


def mount(claims: dict[str, str], volumes: list[dict[str, Any]], mounts: list[dict[str, Any]]) -> None:
    """Add persistent volumes, path -> claim, to a pod's volumes and a container's mounts."""
    for number, (path, claim) in enumerate(claims.items()):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": path})


def select_tpus(slice: Slice) -> dict[str, str]:
    """Return the labels of the nodes that hold a TPU slice."""
    labels = {"accelerator": slice.tpu.gke, "topology": slice.shape}
    return {f"cloud.google.com/gke-tpu-{name}": value for name, value in labels.items()}


def as_tpu_container(container: dict[str, Any]) -> None:
    """Let a container use TPUs.

    libtpu pins host memory: process.py raises the limit, which GKE asks for where containers are not privileged
    (cloud.google.com/kubernetes-engine/docs/how-to/tpus#privileged-mode). That needs SYS_RESOURCE; only root gets
    added capabilities; device files, too, keep the node's owner, which is root
    (kubernetes.io/blog/2021/11/09/non-root-containers-and-devices).
    """
    container["securityContext"] = {"runAsUser": 0, "capabilities": {"add": ["SYS_RESOURCE"]}}
