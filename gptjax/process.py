"""What a process sets before JAX looks for devices: their number, the other processes, and the compilation cache."""

import contextlib
import faulthandler
import os
import re
from collections.abc import Mapping
from typing import Any

from gptjax import cpu
from gptjax.config import DistributedConfig
from gptjax.errors import UserError
from gptjax.shell.files import write_atomically


def prepare_process(cpu_devices: int | None = None, distributed: DistributedConfig | None = None) -> None:
    """Prepare this process for JAX; call it before anything imports JAX.

    Args:
        cpu_devices: number of virtual devices of the CPU; None for one.
        distributed: how to find the other processes, where the environment does not say; None for a single one.

    Raises:
        UserError: the other processes could not be found or reached.
    """
    cpu.set_virtual_devices(cpu_devices, os.environ)
    if cpu.runs_on_cpu(os.environ):
        cpu.keep_freed_memory()
    if cpu.has_tpus():
        allow_locked_memory()
    import jax

    # On a CPU, run one step at a time, so that each reuses the memory that the previous one has freed.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # JAX's cache key omits the number of cores, and a program compiled for one core never uses a second.
    cache = os.path.expanduser(f"~/.cache/gptjax/xla-{cpu.count_cores()}-cores")
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    write_cache_entries_whole()
    found = None if distributed is None else find_processes(distributed, os.environ)
    if distributed is None or found is None:
        return
    faulthandler.enable()  # JAX aborts when a process is lost: print every thread's stack then
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    limits = {"heartbeat_timeout_seconds": distributed.heartbeat_timeout_s, "shutdown_timeout_seconds": 120}
    try:
        jax.distributed.initialize(**found, **limits)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot join the other processes ({reason}); check that process 0 runs and is reachable, or set "
            "distributed.coordinator, num_processes and process_id"
        ) from None


def write_cache_entries_whole() -> None:
    """Have JAX write each entry of its compilation cache at once.

    Of a process that is killed while it writes one, a part would stay, of which every later start warns.
    """
    from jax._src import compilation_cache, lru_cache  # the cache has no public name

    class WholeEntries(lru_cache.LRUCache):
        def put(self, key: str, value: bytes) -> None:
            if self.eviction_enabled:  # it measures what it writes
                super().put(key, value)
            elif not (path := self.path / f"{key}{lru_cache._CACHE_SUFFIX}").exists():
                write_atomically(path, value)

    compilation_cache.LRUCache = WholeEntries


def allow_locked_memory() -> None:
    """Raise this process's limit of locked memory as far as the system lets it; libtpu pins the buffers of transfers.

    Google's documentation asks for it in containers that are not privileged (cloud.google.com/kubernetes-engine/docs/
    how-to/tpus#privileged-mode), where the limit is often 64 KiB.
    """
    import resource  # Unix only, as TPUs are

    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    for limit in (resource.RLIM_INFINITY, hard):  # beyond the hard limit only with CAP_SYS_RESOURCE
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
            return


def find_processes(distributed: DistributedConfig, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`, which reads the rest from the cluster; None for one
    process.

    Flags take precedence. Otherwise the tasks of Slurm's srun, the pods of an indexed Kubernetes job, and TPU hosts
    are processes of one run.
    """
    if distributed.coordinator is not None:
        flags = {"coordinator_address": distributed.coordinator, "num_processes": distributed.num_processes}
        return {**flags, "process_id": distributed.process_id, "cluster_detection_method": "deactivate"}
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # JAX gives each Slurm task one GPU; [] gives all of them to the only task of a node.
        is_only_task = re.fullmatch(r"1(\(x\d+\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
        devices = [] if is_only_task else [int(environ["SLURM_LOCALID"])]
        return {"cluster_detection_method": "slurm", "local_device_ids": devices}
    return {} if cpu.has_tpus() or "JOB_COMPLETION_INDEX" in environ else None
