"""Data about clusters: compiler flags by platform, and the types of Google's TPUs."""

import math
from typing import NamedTuple

from gptjax.checks import filled_axes
from gptjax.config import Config
from gptjax.errors import UserError, nearest

# Environment variable and flags, by kind of device. They let collectives overlap with computation. On GPUs,
# asynchronous collectives are the default.
#   cuda: "Optimization level" in JAX-Toolbox's docs/GPU_performance.md, and openxla.org/xla/gpu_optimization_levels:
#       the latency-hiding scheduler, collectives pipelined over the layers' loop, and the loop unrolled twice.
#   tpu: openxla.org/xla/flags_guidance, and MaxText's benchmarks/xla_flags_library.py (CF_FOR_ALL_GATHER and
#       DATA_PARALLEL_OVERLAP): all-gathers of FSDP inside the matmuls, and all-reduces between slices overlapped.
#   cpu: nothing to hide.
XLA_FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cuda": (
        "XLA_FLAGS",
        (
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "--xla_gpu_enable_pipelined_all_gather=true",
            "--xla_gpu_enable_pipelined_all_reduce=true",
            "--xla_gpu_enable_pipelined_reduce_scatter=true",
            "--xla_gpu_enable_while_loop_double_buffering=true",
        ),
    ),
    "tpu": (
        "LIBTPU_INIT_ARGS",
        (
            "--xla_enable_async_all_gather=true",
            "--xla_tpu_enable_async_collective_fusion=true",
            "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
            "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
            "--xla_tpu_overlap_compute_collective_tc=true",
            "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
            "--xla_tpu_data_parallel_opt_different_sized_ops=true",
        ),
    ),
    "cpu": ("XLA_FLAGS", ()),
}


class Tpu(NamedTuple):
    """A type of TPU.

    Attributes:
        gke: value of the node label cloud.google.com/gke-tpu-accelerator.
        type_prefix: prefix of gcloud's --accelerator-type, before the number of cores.
        cores_per_chip: cores that this number counts for each chip.
        runtime: value of gcloud's --runtime-version.
        dimensions: number of dimensions of a topology.
    """

    gke: str
    type_prefix: str
    cores_per_chip: int
    runtime: str
    dimensions: int


# Sources: cloud.google.com/kubernetes-engine/docs/how-to/tpus (labels), cloud.google.com/tpu/docs/runtimes
# (versions), and the pages v4, v5e, v5p and v6e beside it (types: v4 and v5p count TensorCores, two a chip).
TPUS = {
    "v4": Tpu("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base", 3),
    "v5e": Tpu("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", 2),
    "v5p": Tpu("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", 3),
    "v6e": Tpu("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", 2),
}
CHIPS_PER_HOST = 4  # of every slice with more than one host


class Slice(NamedTuple):
    """A TPU slice, such as v5e:16x16."""

    tpu: Tpu
    shape: str
    chips: int

    @property
    def hosts(self) -> int:
        return max(1, self.chips // CHIPS_PER_HOST)


def parse_slice(topology: str) -> Slice:
    """Return the slice that a text such as `v5e:16x16` names, as in `gptjax plan`; raise UserError for any other."""
    kind, _, shape = topology.partition(":")
    if kind not in TPUS:
        raise UserError(f"topology {topology!r} names no known TPU{nearest(kind, TPUS)}; write it as v5e:16x16")
    tpu, sizes = TPUS[kind], shape.split("x")
    if len(sizes) != tpu.dimensions or not all(size.isdecimal() and int(size) for size in sizes):
        example = "x".join(["4"] * tpu.dimensions)
        raise UserError(f"topology {topology!r}: a {kind} has {tpu.dimensions} dimensions, such as {kind}:{example}")
    return Slice(tpu, shape, math.prod(map(int, sizes)))


def check_mesh(cfg: Config, devices: int) -> None:
    """Raise UserError if the config's mesh does not fit the number of devices, before the job waits in a queue."""
    if filled_axes(cfg.mesh.axes, devices) is None:
        sizes = (f"mesh.{name} {size}" for name, size in cfg.mesh.axes.items() if size != 1)
        mesh = ", ".join(sizes) or "a mesh of one device"
        raise UserError(f"{mesh} does not fit the {devices} devices of this job; change mesh.* or the job's size")
