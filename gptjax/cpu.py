"""What is only about CPUs: virtual devices, thread pools, malloc, dispatch and compiler options.

Nothing here is applied where a run's devices are of another platform.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

# Device files of a host's TPU chips (up to v4; from v5e on) and of its GPUs (NVIDIA; AMD).
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd")
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")

# Names and values from glibc's malloc.h.
MALLOC_OPTIONS = {
    "M_MMAP_MAX": (-4, 0),  # never map a block by itself, however large
    "M_TRIM_THRESHOLD": (-1, -1),  # never return memory to the kernel
    "M_TOP_PAD": (-2, 2**26),  # bytes to ask for at a time
    "M_ARENA_MAX": (-8, 1),  # any arena but the first holds at most 64 MiB, and XLA allocates in threads
}

# XLA's ways to compute products, each by the options that select it. oneDNN is in the builds for x86-64 and ARM.
PRODUCTS: dict[str, dict[str, Any]] = {
    "xla": {"xla_cpu_experimental_ynn_fusion_type": ""},
    "ynnpack": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    "onednn": {
        "xla_cpu_experimental_ynn_fusion_type": "",
        "xla_cpu_use_onednn": True,
        "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
    },
}
# YNNPACK helps with single products in float32; in bfloat16 it rejects some of XLA's (the gradient of tied embeddings
# is one).
PRODUCTS_OF: dict[str, str] = {"float32": "ynnpack", "bfloat16": "xla"}


def compiler_options(products: str) -> dict[str, Any]:
    """Return XLA's options for a step on a CPU; `products` is a key of PRODUCTS.

    Operations in the program's order use caches and memory better than ones that compete for the cores.
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False, **PRODUCTS[products]}


def has_tpus() -> bool:
    """Return whether this host has TPU chips that JAX can use."""
    return importlib.util.find_spec("libtpu") is not None and any(map(os.path.exists, TPU_DEVICES))


def has_gpus() -> bool:
    """Return whether this host has GPUs that JAX can use."""
    return any(map(importlib.util.find_spec, GPU_PLUGINS)) and any(map(os.path.exists, GPU_DEVICES))


def runs_on_cpu(environ: Mapping[str, str]) -> bool:
    """Return whether JAX will compute on this host's CPU; asks neither JAX nor a device."""
    if asked := environ.get("JAX_PLATFORMS"):
        return asked.split(",")[0] == "cpu"
    return not (has_tpus() or has_gpus())


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def set_virtual_devices(count: int | None, environ: MutableMapping[str, str]) -> None:
    """Ask XLA for `count` CPU devices. An `XLA_FLAGS` that sets them already wins.

    XLA sizes its thread pool by NPROC. With no more threads than devices a collective can starve and abort the
    process, so the pool gets twice as many.
    """
    flag = "--xla_force_host_platform_device_count"
    if count is None or flag in environ.get("XLA_FLAGS", ""):
        return
    environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {flag}={count}".strip()
    environ.setdefault("NPROC", str(max(2 * count, os.cpu_count() or 1)))


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next step.

    XLA's CPU buffers are large enough for malloc to take each from the kernel anew, page by page: that was a quarter
    of a small model's step, and two fifths of a larger one's (docs/performance.md).
    """
    for option, value in MALLOC_OPTIONS.values():
        _call_glibc("mallopt", option, value)


def return_freed_memory() -> None:
    """Return to the kernel, once, what glibc keeps: no step can use what compiling leaves behind."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    """Call a function that only glibc has; elsewhere do nothing."""
    if sys.platform.startswith("linux") and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*arguments)
