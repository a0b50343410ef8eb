"""Format a plan for a terminal."""

from typing import Any

from gptjax.shell.display import count, duration, indent, paint, significant, size, table


def report(plan: dict[str, Any]) -> list[str]:
    """Return the lines that `gptjax plan` prints."""
    mesh = " x ".join(f"{name}={n}" for name, n in plan["mesh"].items() if n > 1) or "one chip"
    slices = f" x {plan['num_slices']} slices" if plan["num_slices"] > 1 else ""
    how = "the compiled program" if plan["method"] == "compiled" else f"an ANALYTIC ESTIMATE ({plan['note']})"
    sequences, parts, tokens = plan["batch_sequences"], plan["microbatches"], plan["tokens_per_step"]
    share = plan["total_bytes"] / plan["capacity_bytes"]
    total = [("total", size(plan["total_bytes"]), f"of {size(plan['capacity_bytes'])} ({share:.0%})")]
    memory = [(name, size(n_bytes)) for name, n_bytes in plan["memory"].items()]
    sections = [
        [
            f"{plan['config']} on {plan['topology']}{slices}: {plan['chips']:,} chips, mesh {mesh}",
            f"{sequences:,} sequences in {parts} microbatch{'es' * (parts > 1)}, {tokens:,} tokens a step, "
            f"remat {plan['remat']}; figures from {how}",
        ],
        ["memory of a chip", *indent(table(memory + total, left=(0, -1)))],
        [paint(verdict(plan), "green" if plan["fits"] else "red")],
        ["a step, on a chip", *indent(_time_table(plan))],
        *([indent(_collective_table(plan["collectives"]))] if plan["collectives"] else []),
        ["on the wire in theory", *indent(_theory_table(plan["communication_theory"]))],
        [
            *_speed_table(plan),
            "(ceiling: everything overlaps; expected: as published TPU runs fare; MFU counts attention in full)",
        ],
    ]
    return [line for number, section in enumerate(sections) for line in ([""] if number else []) + section]


def _time_table(plan: dict[str, Any]) -> list[str]:
    """Return what a step computes and moves on a chip, and how long each takes alone."""
    amounts = {
        "compute": f"{count(plan['executed_flops_per_chip'])}FLOP",
        "hbm": size(plan["hbm_bytes"]),
        "ici": size(plan["ici_bytes"]),
        "dcn": size(plan["dcn_bytes"]),
    }
    rows = [
        (name, amounts[name], duration(seconds), "<- bounds the step" if name == plan["bound"] else "")
        for name, seconds in plan["times_s"].items()
        if seconds
    ]
    return table(rows, left=(0, -1))


def _collective_table(collectives: list[dict[str, Any]]) -> list[str]:
    rows = [
        (
            c["kind"],
            c["dtype"],
            size(c["operand_bytes"]),
            size(c["wire_bytes"]),
            f"{c['times']:,}",
            "between slices" if c["crosses"] else "",
        )
        for c in collectives
    ]
    return table(rows, ("collective", "dtype", "operands", "on the wire", "times", ""), left=(0, 1, -1))


def _theory_table(theory: dict[str, float]) -> list[str]:
    rows = [(name, size(n_bytes)) for name, n_bytes in theory.items()]
    return table([*rows, ("total", size(sum(theory.values())))])


def _speed_table(plan: dict[str, Any]) -> list[str]:
    """Return the step, and the whole run where its length is known, at the ceiling and as expected."""
    rows = []
    for name in ("ceiling", "expected"):
        speed = plan[name]
        row = [name, duration(speed["step_s"]), f"{speed['mfu']:.1%}", count(speed["tokens_per_s"])]
        row += [significant(speed["days"])] if "days" in speed else []
        rows.append(row + ([f"{speed['cost']:,.0f}"] if "cost" in speed else []))
    return table(rows, ("", "step", "MFU", "tokens/s", "days", "cost")[: len(rows[0])])


def verdict(plan: dict[str, Any]) -> str:
    """Say whether the run fits; if not, by how much, and which change would fit."""
    if plan["fits"]:
        return "FITS"
    lacking = plan["total_bytes"] - plan["capacity_bytes"]
    by = f", by {size(lacking)}" if lacking > 0 else ", says the compiler"
    if plan.get("suggestion") is None:
        return f"DOES NOT FIT{by}: neither remat nor microbatches are enough; try --search, or use more chips"
    return f"DOES NOT FIT{by}. By arithmetic this fits: {flags(plan['suggestion'])}"


def flags(overrides: dict[str, Any]) -> str:
    """Return overrides as command-line flags."""
    return " ".join(f"--{name} {'null' if value is None else value}" for name, value in overrides.items())
