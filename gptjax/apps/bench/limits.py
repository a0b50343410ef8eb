"""What this machine can do: products at a model's own shapes through each backend of XLA, and memory bandwidth."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gptjax import cpu

# jaxlib 0.10 aborts the process that frees a program with oneDNN's products, and cannot write one to its cache: the
# programs are kept, and the worker ends without freeing anything.
KEPT: list[Any] = []
REPEATS = 5  # of each measurement, of which the fastest counts: a limit is what can be reached
READ_BYTES = 2**28  # of an array that no cache holds
# Instruction sets that decide how fast products are, as /proc/cpuinfo names them (asimd and those after it: ARM).
INSTRUCTIONS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "sve", "sve2", "i8mm", "sme"),
)


def instructions() -> list[str]:
    """Return which of INSTRUCTIONS this processor has; an empty list where the system does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return []
    found = set(flags.partition(":")[2].split())
    return [name for name in INSTRUCTIONS if name in found]


def product_shapes(size: dict[str, int], rows: int) -> list[tuple[int, int, int]]:
    """Return (m, k, n) of the products of a GPT-2 block and head: each forward, and its two gradients.

    Args:
        size: d_model and vocab_size, as in the worker's SIZES.
        rows: tokens of a batch.
    """
    D, V = size["d_model"], size["vocab_size"]
    forward = [(rows, k, n) for k, n in ((D, 3 * D), (D, D), (D, 4 * D), (4 * D, D), (D, V))]
    return [shape for m, k, n in forward for shape in ((m, k, n), (m, n, k), (k, m, n))]


def measure_products(shapes: Sequence[tuple[int, int, int]], dtype: str) -> dict[str, float | None]:
    """Return the FLOP/s of these products by backend (cpu.PRODUCTS); None where this jaxlib lacks the backend."""
    import jax
    import jax.numpy as jnp

    operands = [
        (jnp.ones((m, k), dtype), jnp.ones((k, n), dtype) if number % 3 != 1 else jnp.ones((n, k), dtype))
        for number, (m, k, n) in enumerate(shapes)
    ]

    def products(pairs: list[tuple[Any, Any]]) -> list[Any]:
        # The gradient of the input multiplies by the transposed weight.
        return [x @ (w.T if number % 3 == 1 else w) for number, (x, w) in enumerate(pairs)]

    flops = sum(2.0 * m * k * n for m, k, n in shapes)
    rates: dict[str, float | None] = {}
    for backend in cpu.PRODUCTS:
        compiled = jax.jit(products, compiler_options=cpu.compiler_options(backend))
        KEPT.append(compiled)
        try:
            jax.block_until_ready(compiled(operands))
        except jax.errors.JaxRuntimeError:  # an option that this jaxlib lacks, or a product that the backend rejects
            rates[backend] = None
            continue
        rates[backend] = flops / fastest(lambda run=compiled: jax.block_until_ready(run(operands)))
    return rates


def measure_memory() -> dict[str, float]:
    """Return the bytes per second that all cores together read, and that they read and write in a copy."""
    cores = cpu.count_cores()
    source = np.ones(READ_BYTES // 4, np.float32)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, cores), np.array_split(target, cores), strict=True))
    with ThreadPoolExecutor(cores) as pool:
        read = fastest(lambda: list(pool.map(lambda part: np.dot(part[0], part[0]), parts)))
        copy = fastest(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)))
    return {"read": source.nbytes / read, "copy": 2 * source.nbytes / copy}


def fastest(work: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of REPEATS calls, after one that is not measured."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class Load:
    """Watches how much else the machine does during a measurement. Linux only; elsewhere it notices nothing."""

    def __init__(self):
        self.before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self.ticks = _cpu_ticks()

    def warnings(self, ratios: Sequence[float] = ()) -> list[str]:
        """Return what makes the figures since then doubtful: other programs, stolen time, a wide spread of ratios."""
        found = []
        if self.before > cpu.count_cores() / 4:
            found.append(f"a load of {self.before:.1f} on {cpu.count_cores()} cores before the start")
        total, stolen = (now - then for now, then in zip(_cpu_ticks(), self.ticks, strict=True))
        if stolen > 0.02 * total > 0:
            found.append(f"{stolen / total:.0%} of the time taken by other virtual machines")
        if ratios and max(ratios) > 1.5 * min(ratios):
            found.append(f"ratios {max(ratios) / min(ratios):.1f}x apart")
        return found


def _cpu_ticks() -> tuple[int, int]:
    """Return all of the processors' time since the start of the system and what of it was stolen, in ticks."""
    try:
        with open("/proc/stat") as lines:
            ticks = [int(word) for word in next(lines).split()[1:]]
    except (OSError, StopIteration, ValueError):
        return 0, 0
    return sum(ticks[:8]), ticks[7] if len(ticks) > 7 else 0
