"""What a process must settle before JAX looks for devices: their number, its peers, and the compilation cache."""

import ctypes
import os
import sys
from pathlib import Path

from gptjax.config import DistributedConfig
from gptjax.errors import UserError


def prepare_process(cpu_devices: int | None = None, distributed: DistributedConfig | None = None) -> None:
    """Call it before anything imports JAX.

    Args:
        cpu_devices: how many virtual devices a CPU shall show; None for one.
        distributed: how to find the other processes; None, or empty, for a single one.

    Raises:
        UserError: the other processes could not be reached.
    """
    set_cpu_devices(cpu_devices, os.environ)
    keep_freed_memory()
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/gptjax/xla").expanduser()))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    if distributed is None or distributed.coordinator is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(distributed.coordinator, distributed.num_processes, distributed.process_id)
    except Exception as error:
        raise UserError(f"cannot join distributed.coordinator {distributed.coordinator}: {error}") from None


# What glibc's malloc.h calls them, and their values in bytes (but for the last, a count).
MALLOC_OPTIONS = {
    "M_MMAP_THRESHOLD": (-3, 2**30),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
    "M_ARENA_MAX": (-8, 1),  # any other than the first arena holds 64 MiB at most, and XLA allocates in threads
}


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one; elsewhere do nothing.

    XLA's CPU buffers are large enough for malloc to take each from the kernel anew, page by page: that was a quarter
    of a small model's step, and two fifths of a larger one's (docs/performance.md).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    for option, value in MALLOC_OPTIONS.values() if mallopt else ():
        mallopt(option, value)


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
