"""Asking the TPU compiler, in a process of its own: no TPU is needed, and no lock file of libtpu is in the way."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from gptjax.apps.plan.chips import Topology
from gptjax.config import Config
from gptjax.configfile import config_to_yaml

# The process must not look for a TPU, must load libtpu beside others that do (or that left a lock file behind in
# /tmp), and must not show virtual devices.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def has_compiler(topology: Topology) -> bool:
    """Whether libtpu is here, and can compile for these chips."""
    return topology.chip.kind == "tpu" and importlib.util.find_spec("libtpu") is not None


def compile_for(cfg: Config, topology: Topology) -> dict[str, Any]:
    """What `worker.compile_step` answers; `error` says in one line why there is no answer."""
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
        return {"error": f"the compiler was ended by signal {-done.returncode}; does this machine lack memory?"}
    return {"error": f"the compiler failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}"}
