"""Format a plan for a terminal."""

from typing import Any

from gptjax.display import paint

GIB = 2**30


def size(count: float) -> str:
    """Return a number of bytes with its unit: 787.00 MiB, 1.46 GiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def report(plan: dict[str, Any]) -> list[str]:
    """Return the lines that `gptjax plan` prints."""
    mesh = " x ".join(f"{name}={n}" for name, n in plan["mesh"].items() if n > 1) or "one chip"
    slices = f" x {plan['num_slices']} slices" if plan["num_slices"] > 1 else ""
    how = "the compiled program" if plan["method"] == "compiled" else f"an ANALYTIC ESTIMATE ({plan['note']})"
    sequences, parts = plan["batch_sequences"], plan["microbatches"]
    lines = [
        f"{plan['config']} on {plan['topology']}{slices}: {plan['chips']:,} chips, mesh {mesh}",
        f"{sequences:,} sequences in {parts} microbatch{'es' * (parts > 1)}, {plan['tokens_per_step']:,} tokens a "
        f"step, remat {plan['remat']}; figures from {how}",
        "",
        "memory of a chip",
    ]
    for name, count in plan["memory"].items():
        lines.append(f"  {name:14}{size(count):>14}")
    share = plan["total_bytes"] / plan["capacity_bytes"]
    lines.append(f"  {'total':14}{size(plan['total_bytes']):>14}  of {size(plan['capacity_bytes'])} ({share:.0%})")
    lines += ["", paint(verdict(plan), "green" if plan["fits"] else "red"), "", "a step, on a chip"]
    amounts = {
        "compute": f"{plan['executed_flops_per_chip']:.3e} FLOPs",
        "hbm": size(plan["hbm_bytes"]),
        "ici": size(plan["ici_bytes"]),
        "dcn": size(plan["dcn_bytes"]),
    }
    for name, seconds in plan["times_s"].items():
        bound = "  <- bounds the step" if name == plan["bound"] else ""
        if seconds:
            lines.append(f"  {name:14}{amounts[name]:>20}{seconds:>12.4f} s{bound}")
    if plan["collectives"]:
        lines += ["", f"  {'collective':20}{'dtype':8}{'operands':>14}{'on the wire':>14}{'times':>8}"]
    for c in plan["collectives"]:
        over = "  between slices" if c["crosses"] else ""
        amounts = f"{size(c['operand_bytes']):>14}{size(c['wire_bytes']):>14}{c['times']:>8}"
        lines.append(f"  {c['kind']:20}{c['dtype']:8}{amounts}{over}")
    lines += ["", f"  {'theory, on the wire':34}{size(sum(plan['communication_theory'].values())):>22}"]
    lines += [f"    {name:32}{size(count):>22}" for name, count in plan["communication_theory"].items()]
    lines += ["", f"{'':12}{'step':>10}{'MFU':>8}{'tokens/s':>14}{'days':>9}{'cost':>14}"]
    for name in ("ceiling", "expected"):
        speed = plan[name]
        run = f"{speed['days']:>9.2f}" if "days" in speed else ""
        run += f"{speed['cost']:>14,.0f}" if "cost" in speed else ""
        lines.append(f"{name:12}{speed['step_s']:>9.4f}s{speed['mfu']:>8.1%}{speed['tokens_per_s']:>14,.0f}{run}")
    lines.append("(ceiling: everything overlaps; expected: as published TPU runs fare; MFU counts attention in full)")
    return lines


def verdict(plan: dict[str, Any]) -> str:
    """Say whether the run fits; if not, by how much, and which change would fit."""
    if plan["fits"]:
        return "FITS"
    lacking = size(plan["total_bytes"] - plan["capacity_bytes"])
    if plan.get("suggestion") is None:
        return (
            f"DOES NOT FIT, by {lacking}: neither remat nor microbatches are enough; try --search, or use more chips"
        )
    return f"DOES NOT FIT, by {lacking}. By arithmetic this fits: {flags(plan['suggestion'])}"


def flags(overrides: dict[str, Any]) -> str:
    """Return overrides as command-line flags."""
    return " ".join(f"--{name} {value}" for name, value in overrides.items())
