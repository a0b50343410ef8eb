"""What a process must settle before JAX looks for devices: their number, its peers, and the compilation cache."""

import ctypes
import faulthandler
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from gptjax.config import DistributedConfig
from gptjax.errors import UserError


def prepare_process(cpu_devices: int | None = None, distributed: DistributedConfig | None = None) -> None:
    """Call it before anything imports JAX.

    Args:
        cpu_devices: how many virtual devices a CPU shall show; None for one.
        distributed: how to find the other processes, where the environment does not say; None for a single one.

    Raises:
        UserError: the other processes could not be found or reached.
    """
    set_cpu_devices(cpu_devices, os.environ)
    keep_freed_memory()
    import jax

    # Then a step's temporaries are free when it returns, and the next step, which needs as many, finds them.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # JAX's key for a program leaves the cores out, and what was compiled for one core never uses a second.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    cache = os.path.expanduser(f"~/.cache/gptjax/xla-{cores}-cores")
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    found = None if distributed is None else find_processes(distributed, os.environ)
    if distributed is None or found is None:
        return
    faulthandler.enable()  # JAX aborts where a peer is lost: then every thread's stack goes to the log
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    limits = {"heartbeat_timeout_seconds": distributed.heartbeat_timeout_s, "shutdown_timeout_seconds": 120}
    try:
        jax.distributed.initialize(**found, **limits)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot join the other processes ({reason}); see that process 0 runs and can be reached, or say where "
            "it is by distributed.coordinator, num_processes and process_id"
        ) from None


# Of a host's TPU chips, up to v4 and from v5e on.
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def find_processes(distributed: DistributedConfig, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What to tell `jax.distributed.initialize`, which asks the cluster for the rest; None for a process on its own.

    Flags win. Else the tasks of Slurm's srun, the pods of an indexed Kubernetes job, and TPU hosts have peers.
    """
    if distributed.coordinator is not None:
        told = {"coordinator_address": distributed.coordinator, "num_processes": distributed.num_processes}
        return {**told, "process_id": distributed.process_id, "cluster_detection_method": "deactivate"}
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # JAX shows each task of Slurm one GPU; to a node's only task show all of them, which [] does.
        alone = re.fullmatch(r"1(\(x\d+\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
        devices = [] if alone else [int(environ["SLURM_LOCALID"])]
        return {"cluster_detection_method": "slurm", "local_device_ids": devices}
    has_tpus = importlib.util.find_spec("libtpu") is not None and any(map(os.path.exists, TPU_DEVICES))
    return {} if has_tpus or "JOB_COMPLETION_INDEX" in environ else None


# What glibc's malloc.h calls them, and their values.
MALLOC_OPTIONS = {
    "M_MMAP_MAX": (-4, 0),  # nothing by itself, however large
    "M_TRIM_THRESHOLD": (-1, -1),  # never
    "M_TOP_PAD": (-2, 2**26),  # bytes
    "M_ARENA_MAX": (-8, 1),  # any other than the first arena holds 64 MiB at most, and XLA allocates in threads
}


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one.

    XLA's CPU buffers are large enough for malloc to take each from the kernel anew, page by page: that was a quarter
    of a small model's step, and two fifths of a larger one's (docs/performance.md).
    """
    for option, value in MALLOC_OPTIONS.values():
        _glibc("mallopt", option, value)


def return_freed_memory() -> None:
    """Give the kernel back what was kept, for once: what compiling leaves behind, no step can use."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function that glibc alone has; elsewhere do nothing."""
    if sys.platform.startswith("linux") and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*arguments)


def set_cpu_devices(count: int | None, environ: "os._Environ[str] | dict[str, str]") -> None:
    """Ask for `count` virtual CPU devices. An `XLA_FLAGS` that sets them wins.

    XLA sizes its thread pool by NPROC. With no more threads than devices, a collective can starve and abort
    the process, so the pool gets twice as many.
    """
    flag = "--xla_force_host_platform_device_count"
    if count is None or flag in environ.get("XLA_FLAGS", ""):
        return
    environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {flag}={count}".strip()
    environ.setdefault("NPROC", str(max(2 * count, os.cpu_count() or 1)))
