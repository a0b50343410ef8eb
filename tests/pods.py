"""What a Kubernetes cluster and GKE do with a JobSet, as far as one machine can: a process for each pod, on CPUs."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml


def expand(text: str, variables: dict[str, str]) -> str:
    """Replace $(NAME) as Kubernetes does in commands and values: $$ is a single $, an unknown NAME stays."""
    found = re.compile(r"\$\$|\$\(([^)]*)\)")
    return found.sub(lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


@contextmanager
def metadata_server() -> Iterator[dict[str, str]]:
    """Answer as Google's metadata server of a TPU node, which JAX asks for what its environment lacks.

    Yields:
        the variable by which JAX finds it.
    """

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ZONE: 'us-west4-a'\nACCELERATOR_TYPE: 'v5litepod-8'\n")

        def log_message(self, *_) -> None: ...

    server = ThreadingHTTPServer(("localhost", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield {"GCE_METADATA_IP": f"localhost:{server.server_port}"}
    server.shutdown()
    server.server_close()


def pods(manifest: Path, secrets: dict[str, dict[str, str]] | None = None) -> list[tuple[list[str], dict[str, str]]]:
    """Return the command and the environment of each pod of a JobSet.

    TPU hosts have what GKE sets (cloud.google.com/kubernetes-engine/docs/how-to/tpus and tpu-multislice): their
    number in the slice, the names of its hosts, its topology, and of several slices those of Megascale. Every host is
    this machine, and JAX is told to believe in TPUs while it runs on the CPU.

    Args:
        secrets: by name, the keys and values of the secrets that the cluster holds.
    """
    _, jobset = yaml.safe_load_all(manifest.read_text())
    (workers,) = jobset["spec"]["replicatedJobs"]
    slices, job = workers["replicas"], workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    port = str(free_port())
    made = []
    for number in range(slices):
        for index in range(job["completions"]):
            given = {"JOB_COMPLETION_INDEX": str(index)}
            if "google.com/tpu" in container["resources"]["limits"]:
                given |= tpu_host(pod["nodeSelector"], index, job["completions"], number, slices)
                given |= {"JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": port}
            for reference in container.get("envFrom", []):
                given |= (secrets or {})[reference["secretRef"]["name"]]
            for entry in container["env"]:
                given[entry["name"]] = value_of(entry, given, index)
            command = [expand(word, given) for word in container["command"]]
            name = f"{jobset['metadata']['name']}-workers-0-0.{jobset['metadata']['name']}:8476"
            made.append(([word.replace(name, f"localhost:{port}") for word in command], given))
    return made


def value_of(entry: dict[str, Any], given: dict[str, str], index: int) -> str:
    """Return the value of a container's variable."""
    if "value" in entry:
        return expand(entry["value"], given)
    assert "job-completion-index" in entry["valueFrom"]["fieldRef"]["fieldPath"]
    return str(index)


def tpu_host(selector: dict[str, str], index: int, hosts: int, number: int, slices: int) -> dict[str, str]:
    """Return what GKE sets in a container that asks for TPUs."""
    given = {
        "TPU_WORKER_ID": str(index),
        "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * hosts),
        "TPU_TOPOLOGY": selector["cloud.google.com/gke-tpu-topology"],
        "TPU_ACCELERATOR_TYPE": selector["cloud.google.com/gke-tpu-accelerator"],
        "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    }
    if slices > 1:
        given |= {
            "MEGASCALE_NUM_SLICES": str(slices),
            "MEGASCALE_SLICE_ID": str(number),
            "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        }
    return given
