"""Call the TPU compiler in a process of its own. It needs no TPU, and ignores libtpu's lock file."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from gptjax.apps.plan.chips import Topology
from gptjax.config import Config
from gptjax.configfile import config_to_yaml

# The process must not look for a TPU, must load libtpu while other processes use it (or after one has left its lock
# file in /tmp), and must not have virtual devices.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def has_compiler(topology: Topology) -> bool:
    """Return whether libtpu is installed and can compile for these chips."""
    return topology.chip.kind == "tpu" and importlib.util.find_spec("libtpu") is not None


def compile_for(cfg: Config, topology: Topology) -> dict[str, Any]:
    """Return the result of `worker.compile_step`; or `error`, one line that says why there is none."""
    request = {"config": config_to_yaml(cfg), "topology": topology.name, "num_slices": topology.num_slices}
    done = subprocess.run(
        [sys.executable, "-m", "gptjax.apps.plan.worker"],
        input=json.dumps(request),
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    if done.returncode < 0:
        return {"error": f"the compiler was killed by signal {-done.returncode}, perhaps for lack of memory"}
    return {"error": f"the compiler failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}"}
