"""Turn costs into time: which resource bounds a step, the highest possible MFU, and what a run costs."""

from typing import Any, NamedTuple

from gptjax.apps.plan.chips import Topology


class Roofline(NamedTuple):
    """A step's least time on each resource, in seconds, and what follows if all of them overlap perfectly.

    Attributes:
        times_s: by resource: compute, hbm, ici, dcn.
        bound: the resource that takes longest.
        step_s: its time.
        mfu: ceiling of model FLOPs utilisation, attention counted in full.
        tokens_per_s: ceiling, all chips.
    """

    times_s: dict[str, float]
    bound: str
    step_s: float
    mfu: float
    tokens_per_s: float


def roofline(
    topology: Topology,
    *,
    tokens: int,
    model_flops: float,
    executed_flops: float,
    hbm_bytes: float,
    ici_bytes: float,
    dcn_bytes: float,
) -> Roofline:
    """Return the roofline (Williams et al. 2009) of a step.

    Args:
        tokens, model_flops: of one step, summed over all devices.
        executed_flops, hbm_bytes, ici_bytes, dcn_bytes: of one step, for one device.
    """
    chip = topology.chip
    times = {
        "compute": executed_flops / chip.flops,
        "hbm": hbm_bytes / chip.hbm_bandwidth,
        "ici": ici_bytes / chip.ici_bandwidth,
        "dcn": dcn_bytes / chip.dcn_bandwidth,
    }
    bound = max(times, key=lambda name: times[name])
    step = times[bound]
    peak = chip.flops * topology.n_chips
    return Roofline(times, bound, step, model_flops / (peak * step), tokens / step)


def run_costs(rate: float, n_chips: int, tokens: float | None, price_per_chip_hour: float | None) -> dict[str, Any]:
    """Return the days, chip-hours and cost of `tokens` at `rate` tokens/s; empty if `tokens` is None."""
    if tokens is None:
        return {}
    hours = tokens / rate / 3600
    costs = {"tokens": tokens, "days": hours / 24, "chip_hours": hours * n_chips}
    if price_per_chip_hour is not None:
        costs["cost"] = hours * n_chips * price_per_chip_hour
    return costs
