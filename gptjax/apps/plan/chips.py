"""Hardware data of the planner: one row per chip, with its source, and topologies such as `v5e:16x16`."""

import math
import re
from typing import NamedTuple

from gptjax.errors import UserError, nearest
from gptjax.presets import PEAK_FLOPS


class Chip(NamedTuple):
    """Peak figures of one chip (of one GPU). Bandwidths count one direction.

    Attributes:
        kind: tpu or gpu.
        device_kind: as in `presets.PEAK_FLOPS`.
        hbm_bytes: memory that a program may use. On TPUs it is the compiler's limit, less than the nominal size.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s that leave the chip, over all of its links (TPU: torus links; GPU: NVLink).
        dcn_bandwidth: bytes/s between slices, or between hosts of GPUs, a chip's share.
        torus: number of dimensions of a slice; 0 for GPUs, whose topologies are HOSTSxGPUS.
        source: where the figures are published.
    """

    kind: str
    device_kind: str
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    torus: int
    source: str

    @property
    def flops(self) -> float:
        """Return the peak FLOP/s in bfloat16, dense."""
        return PEAK_FLOPS[self.device_kind]


GIB = 2**30

# TPU bandwidths between chips are published for both directions together; here they are halved. DCN figures are
# published per pod (v5e 6.4, v6e 25.6 Tbit/s over 256 chips), per chip (v5p 50 Gbit/s; v4 from the Scaling Book), or
# per GPU.
CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", "TPU v4", 30.75 * GIB, 1200e9, 270e9, 6.25e9, 3, "cloud.google.com/tpu/docs/v4; Scaling Book"),
    "v5e": Chip("tpu", "TPU v5 lite", 15.75 * GIB, 819e9, 200e9, 3.125e9, 2, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("tpu", "TPU v5", 95.74 * GIB, 2765e9, 600e9, 6.25e9, 3, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip("tpu", "TPU v6 lite", 31.25 * GIB, 1638e9, 400e9, 12.5e9, 2, "cloud.google.com/tpu/docs/v6e"),
    "a100": Chip("gpu", "NVIDIA A100", 80e9, 2039e9, 300e9, 25e9, 0, "NVIDIA A100 SXM 80GB data sheet; 200 Gbit/s"),
    "h100": Chip("gpu", "NVIDIA H100", 80e9, 3350e9, 450e9, 50e9, 0, "NVIDIA H100 SXM data sheet; 400 Gbit/s"),
    "h200": Chip("gpu", "NVIDIA H200", 141e9, 4800e9, 450e9, 50e9, 0, "NVIDIA H200 SXM data sheet; 400 Gbit/s"),
}


class Topology(NamedTuple):
    """The chips of a run: one or several slices of TPUs, or hosts of GPUs.

    Attributes:
        name: as given on the command line, such as v5e:16x16.
        chip_name: a key of CHIPS.
        shape: sizes of one slice's torus; for GPUs, the number of hosts and of GPUs per host.
        num_slices: number of slices, joined by the data-centre network.
    """

    name: str
    chip_name: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        """Return the figures of one chip."""
        return CHIPS[self.chip_name]

    @property
    def n_chips(self) -> int:
        """Return the number of chips in all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def chips_per_island(self) -> int:
        """Return the number of chips that are joined without the data-centre network: a slice, or a host of GPUs."""
        return self.shape[-1] if self.chip.kind == "gpu" else math.prod(self.shape)


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """Return the topology that a text names: `v5e:16x16`, `v5p:8x8x8`, or `h100:16x8` (16 hosts of 8 GPUs).

    Raises:
        UserError: an unknown chip, or a shape with another number of dimensions.
    """
    chip_name, _, shape = name.partition(":")
    if chip_name not in CHIPS:
        raise UserError(
            f"unknown chip in topology {name!r}{nearest(chip_name, CHIPS)}; there are: {', '.join(CHIPS)}"
        )
    wanted = CHIPS[chip_name].torus or 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != wanted:
        example = "HOSTSxGPUS, such as 8x8" if CHIPS[chip_name].kind == "gpu" else "x".join(["4"] * wanted)
        raise UserError(f"topology {name!r}: {chip_name} needs {wanted} sizes after the colon: {example}")
    if num_slices < 1:
        raise UserError(f"num_slices {num_slices} must be at least 1")
    return Topology(name, chip_name, tuple(int(size) for size in shape.split("x")), num_slices)
