"""Published runs, and the factors between their MFU and this planner's ceilings.

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


# Their `custom` policies keep or offload the projections and compute the MLP again; ours that is nearest is `full`.
PUBLISHED = [
    Published("Llama-2-70B, 512 v5p", "v5p:8x8x8", "llama-2-70b", 4096, 4, 1, "full", 0.654),
    Published("Llama-2-70B, 256 v6e", "v6e:16x16", "llama-2-70b", 4096, 4, 1, "full", 0.438),
    Published("Llama-3.1-8B, 256 v6e", "v6e:16x16", "llama-3.1-8b", 8192, 4, 1, "full", 0.4546),
    Published("Llama-3.1-70B, 256 v6e", "v6e:16x16", "llama-3.1-70b", 8192, 5, 1, "full", 0.5033),
    Published("Llama-3.1-405B, 256 v6e", "v6e:16x16", "llama-3.1-405b", 8192, 1, 4, "full", 0.3855),
]


def config_of(row: Published) -> Config:
    """The published run as a config of this project."""
    n_chips = parse_topology(row.topology).n_chips
    model = {"preset": row.preset, "context_length": row.context_length, "dtype": "bfloat16"}
    mesh = {"data": 1, "fsdp": n_chips // row.tensor, "tensor": row.tensor}
    train = {"batch_sequences": row.sequences_per_chip * n_chips, "loss_chunks": 1}
    values = {"model": {**model, "positions": {"scaling": None}}, "run": {"remat": row.remat}}
    return config_from_dict({**values, "mesh": mesh, "train": train, "workdir": "-"})


def roofline_of(cfg: Config, topology: Topology, costs: Costs) -> Roofline:
    """The roofline of an estimate."""
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
    """The roofline of a published run; they ran fused attention."""
    cfg, topology = config_of(row), parse_topology(row.topology)
    return roofline_of(cfg, topology, estimate(cfg, topology, fused_attention=True))


@cache
def ceiling_of(row: Published) -> float:
    """Its ceiling, as its publisher counts."""
    return line_of(row).mfu * causal_share(config_of(row))


def causal_share(cfg: Config) -> float:
    """FLOPs with causal attention at half, as a share of those with attention in full."""
    m = cfg.model
    full = flops_per_token(m)
    return 1 - 6 * m.n_layers * m.n_heads * m.d_head * m.context_length / full


def calibrate(rows: list[Published]) -> np.ndarray:
    """How much longer than its roofline each of compute, HBM and ICI takes of a real step, from published runs.

    A step is modelled as the sum of the three, each times its factor: what does not overlap adds up. Least squares
    on the relative error; compute takes at least its roofline, the other two may hide behind it.
    """
    times, measured = [], []
    for row in rows:
        line = line_of(row)
        times.append([line.times_s[name] for name in RESOURCES])
        measured.append(line.step_s * ceiling_of(row) / row.mfu)
    relative = np.array(times) / np.array(measured)[:, None]
    least, best = np.array([1.0, 0.0, 0.0]), None
    for free in itertools.product((False, True), repeat=3):  # which factors lie above their least value
        chosen = np.array(free)
        factors = np.where(chosen, 0.0, least)
        if chosen.any():
            factors[chosen] = np.linalg.lstsq(relative[:, chosen], 1 - relative @ factors, rcond=None)[0]
        error = np.square(relative @ factors - 1).sum()
        if (factors >= least - 1e-9).all() and (best is None or error < best[0]):
            best = error, factors
    assert best is not None  # all at their least is always allowed
    return best[1]


def expected_step_s(line: Roofline, factors: Sequence[float]) -> float:
    """Seconds of a step that similar runs would take; never less than the roofline. DCN is added as it is."""
    added = sum(f * line.times_s[name] for f, name in zip(factors, RESOURCES, strict=True))
    return max(added + line.times_s["dcn"], line.step_s)


def compare() -> list[dict[str, float | str]]:
    """Each published run beside its ceiling, and beside what the other rows make expected (one left out)."""
    table = []
    for row in PUBLISHED:
        line, ceiling = line_of(row), ceiling_of(row)
        expected = ceiling * line.step_s / expected_step_s(line, calibrate([r for r in PUBLISHED if r != row]))
        table.append({"run": row.name, "published": row.mfu, "ceiling": ceiling, "expected": expected})
    return table


@lru_cache(maxsize=1)
def factors() -> tuple[float, ...]:
    """`calibrate` of all published runs."""
    return tuple(float(f) for f in calibrate(PUBLISHED))
