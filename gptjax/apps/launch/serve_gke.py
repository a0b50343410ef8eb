"""Write a Deployment and a Service, with which Kubernetes serves a model from as many pods as are asked for."""

from typing import Any, NamedTuple

from gptjax.apps.launch.clusters import CHIPS_PER_HOST, Slice
from gptjax.apps.launch.gke import USER, as_tpu_container, environment_of, mount, pass_secrets, select_tpus

PORT = 8000
PROBE_S = 5  # between two probes
COMPILE_S = 1800  # the longest that a pod may take to load its model and compile
DRAIN_S = 10  # beyond the longest answer


class GkeServer(NamedTuple):
    """A model's server in a Kubernetes cluster.

    Attributes:
        name: of the Deployment and the Service, a DNS label.
        image: container image, built from the repository's Dockerfile with the extra serve.
        arguments: of `gptjax serve`, without its address.
        replicas: number of pods, each with the whole model.
        slice: the TPU slice of each pod, which is one host; None for GPUs or CPUs.
        gpu: value of the node label cloud.google.com/gke-accelerator; None for TPUs or CPUs.
        gpus: number of GPUs of each pod.
        key: name of a Kubernetes secret and its key that holds the API key; None for no key.
        timeout_s: the longest answer in seconds.
        service_account: Kubernetes service account; None for the default one.
        variables: environment variables.
        secrets: names of Kubernetes secrets, whose keys become environment variables.
        volumes: path inside the container -> claim of a persistent volume, which is mounted to be read.
    """

    name: str
    image: str
    arguments: list[str]
    replicas: int
    slice: Slice | None
    gpu: str | None
    gpus: int
    key: tuple[str, str] | None
    timeout_s: int
    service_account: str | None
    variables: dict[str, str]
    secrets: list[str]
    volumes: dict[str, str]


def server_manifests(server: GkeServer) -> list[dict[str, Any]]:
    """Return the Deployment, and a Service that is reached inside the cluster at http://NAME."""
    labels = {"app": server.name}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": server.name, "labels": labels},
        "spec": {
            "replicas": server.replicas,
            "selector": {"matchLabels": labels},
            # A node's accelerators are all in use: the old pod leaves before the new one comes.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {"metadata": {"labels": labels}, "spec": _pod(server)},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": server.name, "labels": labels},
        "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": PORT}]},
    }
    return [deployment, service]


def _pod(server: GkeServer) -> dict[str, Any]:
    container = _container(server)
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]  # HOME: caches of compiled programs
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    mount(server.volumes, volumes, mounts)
    for number in range(len(server.volumes)):
        mounts[1 + number]["readOnly"] = True
    container["volumeMounts"] = mounts
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": server.timeout_s + DRAIN_S,
        "containers": [container],
        "volumes": volumes,
        "automountServiceAccountToken": server.service_account is not None,
    }
    if server.slice is not None:
        pod["nodeSelector"] = select_tpus(server.slice)
        container["resources"] = {"limits": {"google.com/tpu": str(min(server.slice.chips, CHIPS_PER_HOST))}}
        as_tpu_container(container)
    else:
        container["securityContext"] = {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if server.gpu is not None:
            pod["nodeSelector"] = {"cloud.google.com/gke-accelerator": server.gpu}
            container["resources"] = {"limits": {"nvidia.com/gpu": str(server.gpus)}}
    if server.service_account is not None:
        pod["serviceAccountName"] = server.service_account
    return pod


def _container(server: GkeServer) -> dict[str, Any]:
    """Return the container without its mounts and devices."""
    environment = environment_of(server.variables)
    if server.key is not None:
        secret, key = server.key
        reference = {"secretKeyRef": {"name": secret, "key": key}}
        environment.append({"name": "GPTJAX_API_KEY", "valueFrom": reference})
    healthy = {"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": PROBE_S}
    command = ["python", "-u", "-m", "gptjax", "serve", *server.arguments]
    container = {
        "name": "serve",
        "image": server.image,
        "command": [*command, "--host", "0.0.0.0", "--port", str(PORT), "--timeout_s", str(server.timeout_s)],
        "env": environment,
        "ports": [{"containerPort": PORT}],
        # /healthz answers 503 while programs compile, and again while the server ends: that is no reason to kill it.
        "startupProbe": healthy | {"failureThreshold": COMPILE_S // PROBE_S},
        "readinessProbe": healthy,
        "livenessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 20, "failureThreshold": 6},
    }
    pass_secrets(container, server.secrets)
    return container
