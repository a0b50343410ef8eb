"""Write a plan as an HTML page: memory by part, roofline, the mesh on the topology, and the search's candidates."""

from collections.abc import Sequence
from typing import Any

from gptjax.apps.plan.chips import Topology
from gptjax.apps.plan.report import flags, verdict
from gptjax.figures.plan import Candidate, Chip, draw_candidates, draw_memory, draw_mesh, draw_roofline
from gptjax.pages.page import Cell, Facts, Paragraph, Picture, Section, Table, number, render
from gptjax.shell import display

MOST_HOSTS = 64  # rows of the table of hosts
RESOURCES = ("hbm", "ici", "dcn")


def plan_page(
    plan: dict[str, Any], topology: Topology, chips: Sequence[Chip], tried: Sequence[Candidate], command: str
) -> str:
    """Return a plan's HTML page.

    Args:
        plan: the result of `planning.make_plan`, with `config`.
        chips: the result of `placement.place_chips`.
        tried: the candidates of a search; empty without one.
        command: writes the page again.
    """
    sections = [
        Section("", [Paragraph(_finding(plan), lead=True), Facts(_figures(plan), large=True)]),
        Section("Memory of a chip", [_memory(plan), _memory_table(plan)]),
        Section("What bounds a step", [_roofline(plan, topology), _times_table(plan)]),
        Section("The mesh on the topology", [_mesh(plan, chips), _hosts_table(chips)]),
        Section("Layouts that were tried", [_candidates(plan, tried)] if tried else []),
    ]
    title = f"Plan: {plan['config']} on {plan['topology']}"
    return render(title, [section for section in sections if section.blocks], command)


def _finding(plan: dict[str, Any]) -> str:
    """Say whether the run fits, what bounds its step, and where the figures come from."""
    said = "The run fits" if plan["fits"] else verdict(plan).replace("DOES NOT FIT", "The run does not fit")
    how = "the compiled program" if plan["method"] == "compiled" else f"an analytic estimate ({plan['note']})"
    speed = f"its step is bound by {plan['bound']}, and takes about {display.duration(plan['expected']['step_s'])}"
    return f"{said}; {speed}. The figures are from {how}."


def _figures(plan: dict[str, Any]) -> list[tuple[str, str]]:
    expected = plan["expected"]
    shown = [
        ("chips", f"{plan['chips']:,}"),
        ("memory of a chip", f"{display.size(plan['total_bytes'])} of {display.size(plan['capacity_bytes'])}"),
        ("a step", display.duration(expected["step_s"])),
        ("MFU", f"{100 * expected['mfu']:.1f} %"),
        ("tokens/s", display.count(expected["tokens_per_s"])),
    ]
    shown += [("the run", display.duration(86400 * expected["days"]))] if "days" in expected else []
    return shown + ([("cost", f"{expected['cost']:,.0f}")] if "cost" in expected else [])


def _memory(plan: dict[str, Any]) -> Picture:
    share = plan["total_bytes"] / plan["capacity_bytes"]
    finding = f"A chip needs {display.size(plan['total_bytes'])}, {100 * share:.0f} % of what it has"
    return Picture(lambda look: draw_memory(plan["memory"], plan["capacity_bytes"], finding, look=look), finding)


def _memory_table(plan: dict[str, Any]) -> Table:
    rows = [[Cell(name), Cell(display.size(count), count)] for name, count in plan["memory"].items()]
    rows.append([Cell("total"), Cell(display.size(plan["total_bytes"]), plan["total_bytes"])])
    return Table("Memory by part", ["part", "memory"], rows)


def _roofline(plan: dict[str, Any], topology: Topology) -> Picture:
    chip, flops = topology.chip, plan["executed_flops_per_chip"]
    rates = (chip.hbm_bandwidth, chip.ici_bandwidth, chip.dcn_bandwidth)
    traffic = {name: (plan[f"{name}_bytes"], rate) for name, rate in zip(RESOURCES, rates, strict=True)}
    finding = f"A step is bound by {plan['bound']}; published runs suggest {100 * plan['expected']['mfu']:.0f} % MFU"
    reached = flops / plan["expected"]["step_s"]
    return Picture(lambda look: draw_roofline(flops, chip.flops, traffic, reached, finding, look=look), finding)


def _times_table(plan: dict[str, Any]) -> Table:
    amounts = {
        "compute": Cell(f"{display.power(plan['executed_flops_per_chip'])} FLOPs", plan["executed_flops_per_chip"])
    }
    amounts |= {name: Cell(display.size(plan[f"{name}_bytes"]), plan[f"{name}_bytes"]) for name in RESOURCES}
    rows = [[Cell(name), amounts[name], Cell(display.duration(s), s)] for name, s in plan["times_s"].items() if s]
    return Table("The least time on each resource", ["resource", "a step, on a chip", "time"], rows)


def _mesh(plan: dict[str, Any], chips: Sequence[Chip]) -> Picture:
    axes = " × ".join(f"{name} {n}" for name, n in plan["mesh"].items() if n > 1) or "one chip"
    rows, weights = (len({getattr(chip, name) for chip in chips}) for name in ("rows", "weights"))
    finding = f"{axes}: the batch in {display.plural(rows, 'part')}, the weights in {weights}"
    drawn = "a square for each chip, coloured by its part of the batch; a host is outlined"
    drawn += "; written on it: rows · weights" if len(chips) <= 64 else ""
    return Picture(lambda look: draw_mesh(chips, finding, drawn, look=look), f"The mesh: {finding}")


def _hosts_table(chips: Sequence[Chip]) -> Table:
    hosts: dict[int, list[Chip]] = {}
    for chip in chips:
        hosts.setdefault(chip.host, []).append(chip)
    rows = [
        [
            number(host),
            number(len(members)),
            Cell(_ranges({chip.rows for chip in members})),
            Cell(_ranges({chip.weights for chip in members})),
        ]
        for host, members in sorted(hosts.items())[:MOST_HOSTS]
    ]
    more = f" (the first {MOST_HOSTS} of {len(hosts):,})" if len(hosts) > MOST_HOSTS else ""
    header = ["host", "chips", "parts of the batch", "parts of the weights"]
    return Table(f"What each host reads and holds{more}", header, rows)


def _ranges(values: set[int]) -> str:
    """Return numbers as ranges: 0–3, 8."""
    found: list[list[int]] = []
    for value in sorted(values):
        if found and value == found[-1][1] + 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in found)


def _candidates(plan: dict[str, Any], tried: Sequence[Candidate]) -> Picture:
    finding = f"The best of {len(tried):,} layouts: {flags(plan['overrides'])}"
    return Picture(lambda look: draw_candidates(tried, plan["capacity_bytes"], finding, look=look), finding)
