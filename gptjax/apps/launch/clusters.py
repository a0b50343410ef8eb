"""Facts about clusters: the compiler's flags, and the TPUs that one asks Google for."""

import math
from typing import NamedTuple

from gptjax.checks import filled_axes
from gptjax.config import Config
from gptjax.errors import UserError, nearest

# Environment variable and flags, by kind of device. They let collectives run beside the computation. On GPUs,
# asynchronous collectives are the default already.
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
    """A kind of TPU.

    Attributes:
        gke: the node label cloud.google.com/gke-tpu-accelerator.
        type_prefix: of gcloud's --accelerator-type, before the number.
        cores_per_chip: what that number counts for each chip.
        runtime: gcloud's --runtime-version.
        dimensions: of a topology.
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
    """The slice that `v5e:16x16` names, as in `gptjax plan`; raises UserError for another text."""
    kind, _, shape = topology.partition(":")
    if kind not in TPUS:
        raise UserError(f"topology {topology!r} is of no known TPU{nearest(kind, TPUS)}; give e.g. v5e:16x16")
    tpu, sizes = TPUS[kind], shape.split("x")
    if len(sizes) != tpu.dimensions or not all(size.isdecimal() and int(size) for size in sizes):
        example = "x".join(["4"] * tpu.dimensions)
        raise UserError(f"topology {topology!r}: a {kind} has {tpu.dimensions} dimensions, such as {kind}:{example}")
    return Slice(tpu, shape, math.prod(map(int, sizes)))


def check_mesh(cfg: Config, devices: int) -> None:
    """Raise UserError where the config's mesh does not fit so many devices; the cluster would say so hours later."""
    if filled_axes(cfg.mesh.axes, devices) is None:
        asked = ", ".join(f"mesh.{name} {size}" for name, size in cfg.mesh.axes.items() if size != 1)
        raise UserError(f"{asked or 'a mesh of one device'} does not fit the {devices} devices of this job")
