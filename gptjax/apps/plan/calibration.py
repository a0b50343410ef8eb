"""Fit the planner's ceilings to the MFU of published runs.

Source: MaxText, docs/reference/models/tiering.md, with its recipes in benchmarks/maxtext_trillium_model_configs.py
and maxtext_v5p_model_configs.py. They count causal attention at half (MaxText's docs/guides/performance_metrics.md).
"""

import itertools
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from gptjax.apps.plan.analytic import Costs, estimate
from gptjax.apps.plan.chips import Topology, parse_topology
from gptjax.apps.plan.roofline import Roofline, roofline
from gptjax.config import Config
from gptjax.configfile import config_from_dict
from gptjax.nn.transformer import flops_per_token

RESOURCES = ("compute", "hbm", "ici")


class Published(NamedTuple):
    """A published run: what was trained where, and the MFU that its publisher states."""

    name: str
    topology: str
    preset: str
    context_length: int
    sequences_per_chip: int
    tensor: int
    remat: str
    mfu: float


# Their `custom` remat policies keep or offload the projections and recompute the MLP; `full` is the closest of ours.
PUBLISHED = [
    Published("Llama-2-70B, 512 v5p", "v5p:8x8x8", "llama-2-70b", 4096, 4, 1, "full", 0.654),
    Published("Llama-2-70B, 256 v6e", "v6e:16x16", "llama-2-70b", 4096, 4, 1, "full", 0.438),
    Published("Llama-3.1-8B, 256 v6e", "v6e:16x16", "llama-3.1-8b", 8192, 4, 1, "full", 0.4546),
    Published("Llama-3.1-70B, 256 v6e", "v6e:16x16", "llama-3.1-70b", 8192, 5, 1, "full", 0.5033),
    Published("Llama-3.1-405B, 256 v6e", "v6e:16x16", "llama-3.1-405b", 8192, 1, 4, "full", 0.3855),
]


def config_of(row: Published) -> Config:
    """Return the published run as a config of this project."""
    n_chips = parse_topology(row.topology).n_chips
    model = {"preset": row.preset, "context_length": row.context_length, "dtype": "bfloat16"}
    mesh = {"data": 1, "fsdp": n_chips // row.tensor, "tensor": row.tensor}
    train = {"batch_sequences": row.sequences_per_chip * n_chips, "loss_chunks": 1}
    values = {"model": {**model, "positions": {"scaling": None}}, "run": {"remat": row.remat}}
    return config_from_dict({**values, "mesh": mesh, "train": train, "workdir": "-"})


def roofline_of(cfg: Config, topology: Topology, costs: Costs) -> Roofline:
    """Return the roofline of an estimate."""
    return roofline(
        topology,
        tokens=cfg.train.batch_sequences * cfg.model.context_length,
        model_flops=costs.model_flops,
        executed_flops=costs.executed_flops,
        hbm_bytes=costs.hbm_bytes,
        ici_bytes=costs.ici_bytes,
        dcn_bytes=costs.dcn_bytes,
    )


@cache
def line_of(row: Published) -> Roofline:
    """Return the roofline of a published run, with fused attention as it was run."""
    cfg, topology = config_of(row), parse_topology(row.topology)
    return roofline_of(cfg, topology, estimate(cfg, topology, fused_attention=True))


@cache
def ceiling_of(row: Published) -> float:
    """Return the highest possible MFU of a published run, with causal attention counted at half, as there."""
    return line_of(row).mfu * causal_share(config_of(row))


def causal_share(cfg: Config) -> float:
    """Return the FLOPs with causal attention counted at half, divided by those with attention counted in full."""
    m = cfg.model
    full = flops_per_token(m)
    return 1 - 6 * m.n_heads * m.d_head * m.attended_positions / full


def calibrate(rows: list[Published]) -> np.ndarray:
    """Return the factors by which compute, HBM and ICI exceed their roofline times in published runs, [3].

    The time of a step is modelled as the sum of the three times, each multiplied by its factor: what does not overlap
    adds up. The fit is least squares on the relative error, with a factor of at least 1 for compute and 0 for the
    other two, which may be hidden behind it.
    """
    times, measured = [], []
    for row in rows:
        line = line_of(row)
        times.append([line.times_s[name] for name in RESOURCES])
        measured.append(line.step_s * ceiling_of(row) / row.mfu)
    relative = np.array(times) / np.array(measured)[:, None]
    least, best = np.array([1.0, 0.0, 0.0]), None
    for free in itertools.product((False, True), repeat=3):  # which factors are above their lower bound
        chosen = np.array(free)
        factors = np.where(chosen, 0.0, least)
        if chosen.any():
            factors[chosen] = np.linalg.lstsq(relative[:, chosen], 1 - relative @ factors, rcond=None)[0]
        error = np.square(relative @ factors - 1).sum()
        if (factors >= least - 1e-9).all() and (best is None or error < best[0]):
            best = error, factors
    assert best is not None  # all factors at their lower bounds are always allowed
    return best[1]


def expected_step_s(line: Roofline, factors: Sequence[float]) -> float:
    """Return the expected seconds of a step, at least those of the roofline; the DCN's time is added unscaled."""
    added = sum(f * line.times_s[name] for f, name in zip(factors, RESOURCES, strict=True))
    return max(added + line.times_s["dcn"], line.step_s)


def compare() -> list[dict[str, float | str]]:
    """Return each published run's MFU with its ceiling and the value expected from the other runs (leave-one-out)."""
    table = []
    for row in PUBLISHED:
        line, ceiling = line_of(row), ceiling_of(row)
        expected = ceiling * line.step_s / expected_step_s(line, calibrate([r for r in PUBLISHED if r != row]))
        table.append({"run": row.name, "published": row.mfu, "ceiling": ceiling, "expected": expected})
    return table


@lru_cache(maxsize=1)
def factors() -> tuple[float, ...]:
    """Return the factors fitted to all published runs."""
    return tuple(float(f) for f in calibrate(PUBLISHED))
