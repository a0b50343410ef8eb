"""Compare runs: losses, differences of their configs, and final figures with seeds grouped."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.apps.report.runs import Run, recipe
from gptjax.figures.runs import Curve, draw_compare
from gptjax.pages.page import Cell, Paragraph, Picture, Section, Table, amount, number, render
from gptjax.shell import display

MOST_KEYS = 60  # of a config that the page's table shows
RECIPES = ("runs", "number", "seeds", "mean", "sd")  # columns
LOSSES = {"val/loss": "validation loss", "train/loss": "training loss"}


def loss_key(runs: Sequence[Run]) -> str:
    """Return the key of the loss that most runs have; the validation loss where as many have either."""
    return max(LOSSES, key=lambda key: sum(run.last(key) is not None for run in runs))


def flops_per_token(run: Run) -> float | None:
    """Return the training FLOPs per token from the run's config; None without a config. Imports JAX."""
    from gptjax.configfile import config_from_dict
    from gptjax.nn.transformer import flops_per_token

    nested: dict[str, Any] = {}
    for key, value in run.config.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    model = config_from_dict(nested).model if nested else None
    return None if model is None or model.vocab_size is None else float(flops_per_token(model))


def curves(runs: Sequence[Run], rates: Sequence[float | None]) -> list[Curve]:
    """Return every run's loss over steps, tokens, FLOPs and time."""
    key, made = loss_key(runs), []
    names = distinct_names(runs)
    for run, name, rate in zip(runs, names, rates, strict=True):
        kept = [i for i, row in enumerate(run.rows) if isinstance(row.get(key), int | float)]
        rows, seconds = [run.rows[i] for i in kept], run.seconds()[kept]
        against = {"steps": np.array([row["step"] for row in rows], float)}
        tokens = np.array([row.get("tokens", np.nan) for row in rows], float)
        flops = np.array([row.get("flops", np.nan) for row in rows], float)
        if rate is not None:
            flops = tokens * rate
        known = {"tokens": tokens, "flops": flops, "seconds": seconds}
        against |= {what: values for what, values in known.items() if np.isfinite(values).any()}
        made.append(Curve(name, np.array([row[key] for row in rows], float), against))
    return made


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, with their parent folders if two are equal."""
    names = [run.name for run in runs]
    return [
        f"{run.path.resolve().parent.name}/{name}" if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


def compare(runs: Sequence[Run], rates: Sequence[float | None]) -> dict[str, Any]:
    """Return the comparison as plain values: `loss`, `runs`, `groups` (a recipe's seeds), `differing`."""
    key, names = loss_key(runs), distinct_names(runs)
    rows = []
    for run, name, rate in zip(runs, names, rates, strict=True):
        best, tokens, seconds = run.best(key), run.last("tokens"), run.seconds()
        spent = seconds[np.isfinite(seconds)]
        row = {"run": name, "path": str(run.path), "seed": run.config.get("seed"), "final": run.last(key)}
        row |= {"best": best[0] if best else None, "best_step": best[1] if best else None}
        row |= {"steps": run.rows[-1]["step"] if run.rows else None, "tokens": tokens}
        row["total_steps"] = run.config.get("train.total_steps")
        row |= {"flops": tokens * rate if tokens and rate else run.last("flops")}
        row["seconds"] = float(spent[-1]) if len(spent) else None
        rows.append(row)
    return {"loss": key, "runs": rows, "groups": groups(runs, rows), "differing": differing(runs, names)}


def groups(runs: Sequence[Run], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs by recipe, best first, with the final loss' mean and standard deviation over seeds.

    A run without a config, and one that stopped at another step, is a group of its own.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for number_of, (run, row) in enumerate(zip(runs, rows, strict=True)):
        known = json.dumps([recipe(run), row["steps"]], sort_keys=True, default=str)
        found.setdefault(known if run.config else str(number_of), []).append(row)
    made = []
    for members in found.values():
        finals = [row["final"] for row in members if row["final"] is not None]
        made.append(
            {
                "runs": [row["run"] for row in members],
                "seeds": [row["seed"] for row in members],
                "mean": float(np.mean(finals)) if finals else None,
                "sd": float(np.std(finals, ddof=1)) if len(finals) > 1 else None,
            }
        )
    return sorted(made, key=lambda group: (group["mean"] is None, group["mean"] or 0.0))


def differing(runs: Sequence[Run], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the keys of the config in which the runs differ, each with every run's value."""
    known = [
        (name, recipe(run) | {"seed": run.config.get("seed")})
        for run, name in zip(runs, names, strict=True)
        if run.config
    ]
    keys = sorted({key for _, config in known for key in config})
    found = {key: {name: config.get(key) for name, config in known} for key in keys}
    return {
        key: values for key, values in found.items() if len({json.dumps(v, default=str) for v in values.values()}) > 1
    }


def compare_page(runs: Sequence[Run], rates: Sequence[float | None], values: dict[str, Any], command: str) -> str:
    """Return the comparison as an HTML page."""
    what = LOSSES[values["loss"]]
    made = curves(runs, rates)
    said = " ".join(finding(values))
    picture = Picture(lambda look: draw_compare(made, what, look=look), f"{what} of the runs over steps. {said}")
    group_rows = [
        [
            Cell(", ".join(group["runs"])),
            number(len(group["runs"])),
            number(_distinct(group["seeds"])),
            number(group["mean"], 5),
            number(group["sd"], 2),
        ]
        for group in values["groups"]
    ]
    sections = [
        Section("", [Paragraph(said, lead=True), picture]),
        Section("Recipes", [Table(f"Final {what} (nats per token) of each recipe", RECIPES, group_rows)]),
        Section("Runs", [_runs_table(values, what)]),
        Section("What differs", _differing_table(values)),
    ]
    return render("Comparison of runs", sections, command)


def finding(values: dict[str, Any]) -> list[str]:
    """Return sentences on the outcome: the best recipe, and the runs that cannot be compared by it."""
    what, recipes = LOSSES[values["loss"]], values["groups"]
    said = [f"{display.plural(len(values['runs']), 'run')} of {display.plural(len(recipes), 'recipe')}."]
    if recipes and recipes[0]["mean"] is not None:
        best, name = recipes[0], display.shorten(", ".join(recipes[0]["runs"]), 80)
        spread = f" (sd {best['sd']:.4f} over {len(best['runs'])} runs)" if best["sd"] is not None else ""
        several = len(recipes) < len(values["runs"])
        which = f"recipe of lowest mean {what}" if several else f"lowest {what}"
        said.append(f"The {which} is that of {name}: {best['mean']:.4f} nats per token{spread}.")
    without = [row["run"] for row in values["runs"] if row["final"] is None]
    if without:
        names = display.shorten(", ".join(without), 80)
        said.append(f"Without a finite {what}: {names}.")
    return said


def _distinct(seeds: Sequence[Any]) -> int:
    return len({json.dumps(seed, default=str) for seed in seeds})


def _steps(row: dict[str, Any]) -> str:
    """Return the steps of a run, with those of its config where it stopped before them."""
    if row["steps"] is None:
        return display.MISSING
    total = row["total_steps"]
    early = isinstance(total, int) and row["steps"] < total
    return f"{row['steps']:,.0f}" + (f" of {total:,}" if early else "")


def _runs_table(values: dict[str, Any], what: str) -> Table:
    rows = [
        [
            Cell(row["run"]),
            number(row["final"], 5),
            number(row["best"], 5),
            number(row["best_step"]),
            Cell(_steps(row), row["steps"]),
            amount(row["tokens"]),
            Cell(display.power(row["flops"], 3), row["flops"]) if row["flops"] else Cell(display.MISSING),
            Cell(display.duration(row["seconds"]), row["seconds"]) if row["seconds"] else Cell(display.MISSING),
        ]
        for row in sorted(values["runs"], key=lambda row: (row["final"] is None, row["final"] or 0.0))
    ]
    header = ["run", "final", "best", "at step", "steps", "tokens", "FLOPs", "training time"]
    return Table(f"Final and best {what} (nats per token), and what each run took", header, rows)


def _differing_table(values: dict[str, Any]) -> list[Any]:
    found = values["differing"]
    if not found:
        return [Paragraph("Nothing: the configs are equal, or only one run has a config.")]
    names = list(next(iter(found.values())))
    rows = [[Cell(name), *(Cell(_text(found[key][name])) for key in list(found)[:MOST_KEYS])] for name in names]
    return [Table("Keys of the config that differ", ["run", *list(found)[:MOST_KEYS]], rows)]


def _text(value: Any) -> str:
    return "null" if value is None else display.shorten(str(value), 60)


def lines(values: dict[str, Any]) -> list[str]:
    """Return the lines of the comparison for a terminal."""
    rows = [
        [
            display.shorten(row["run"], 40),
            display.MISSING if row["final"] is None else f"{row['final']:.4f}",
            display.MISSING if row["best"] is None else f"{row['best']:.4f}",
            _steps(row),
            display.MISSING if row["tokens"] is None else display.count(row["tokens"]),
            display.MISSING if not row["flops"] else display.power(row["flops"], 2),
            display.MISSING if not row["seconds"] else display.duration(row["seconds"]),
        ]
        for row in sorted(values["runs"], key=lambda row: (row["final"] is None, row["final"] or 0.0))
    ]
    header = ["run", "final", "best", "steps", "tokens", "FLOPs", "time"]
    first, *others = display.table(rows, header)
    said = [f"{LOSSES[values['loss']]}, nats per token", display.paint(first, "bold"), *others, ""]
    for group in values["groups"]:
        if group["sd"] is not None:
            names = display.shorten(", ".join(group["runs"]), 60)
            seeds = display.plural(_distinct(group["seeds"]), "seed")
            spread = f"mean {group['mean']:.4f}, sd {group['sd']:.4f}"
            said.append(f"{names}: {spread} over {len(group['runs'])} runs of {seeds}")
    return said + finding(values)
