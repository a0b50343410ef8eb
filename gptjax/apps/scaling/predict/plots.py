"""A study's pictures: loss against compute, valleys with their floors, residuals, and rates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from gptjax.apps.scaling.laws.isoflop import find_floors, valleys
from gptjax.apps.scaling.laws.table import read_rows
from gptjax.apps.scaling.predict.fit import valleys_of_rate
from gptjax.apps.scaling.predict.forecast import Fitted
from gptjax.errors import UserError


def compute(axes: Any, fitted: Fitted, path: Path) -> None:
    """Every run's loss over its FLOPs, the law's frontier with its interval, and held-out runs with forecasts."""
    table = fitted.table
    held = [row for row in read_rows(path, held_out=True) if row.get("status") == "done"]
    farthest = max([float(table.flops.max()), *(float(row["flops"]) for row in held)])
    flops = np.geomspace(table.flops.min() / 1.5, 1.5 * farthest, 60)
    each = np.array([law.loss(*law.optimum(flops, fitted.per_param_token)) for law in fitted.laws])
    low, high = np.quantile(each, [0.025, 0.975], axis=0)
    axes.fill_between(flops, low, high, alpha=0.25, label="95 %")
    axes.plot(flops, fitted.law.loss(*fitted.law.optimum(flops, fitted.per_param_token)), label="best of the law")
    axes.scatter(table.flops, table.loss, s=12, c=np.log(table.params), cmap="viridis", zorder=3)
    for row in held:
        axes.scatter(
            float(row["flops"]), float(row["loss"]), marker="*", s=90, c="crimson", zorder=4, label="held out"
        )
    axes.set(xscale="log", xlabel="FLOPs", ylabel="loss (nats per token)", title="loss against compute")
    axes.legend(fontsize=7)


def isoflop(axes: Any, fitted: Fitted, path: Path) -> None:
    """Each budget's losses over N with the law, and Akima's floor where there is one."""
    floors = find_floors(fitted.table)
    for (budget, rows), floor in zip(valleys(fitted.table), floors, strict=True):
        [line] = axes.plot(rows.params, rows.loss, "o", ms=4, label=f"{budget:.2g} FLOPs")
        fine = np.geomspace(rows.params.min(), rows.params.max(), 100)
        tokens = np.exp(np.interp(np.log(fine), np.log(rows.params), np.log(rows.tokens)))
        axes.plot(fine, fitted.law.loss(fine, tokens), "-", lw=1, c=line.get_color())
        if not floor.refused:
            axes.plot(floor.params, floor.loss, "v", ms=8, mfc="none", c=line.get_color())
    axes.set(xscale="log", xlabel="N (weights that multiply)", ylabel="loss", title="isoFLOP valleys (v: floors)")
    axes.legend(fontsize=7)


def residuals(axes: Any, fitted: Fitted, path: Path) -> None:
    """What the law leaves of each run's log loss, in per cent."""
    table = fitted.table
    left = 100 * np.log(table.loss / fitted.law.loss(table.params, table.tokens))
    drawn = axes.scatter(table.params, left, s=16, c=np.log10(table.flops), cmap="plasma")
    axes.figure.colorbar(drawn, ax=axes, label="log10 FLOPs")
    axes.axhline(0, c="grey", lw=1)
    axes.set(xscale="log", xlabel="N", ylabel="% of the loss", title=f"residuals (noise {100 * fitted.noise:.2f} %)")


def rates(axes: Any, fitted: Fitted, path: Path) -> None:
    """Loss over the learning rate, a curve for each shape and budget."""
    for valley in valleys_of_rate(read_rows(path)):
        axes.plot(
            valley.rates, valley.losses, "o-", ms=3, label=f"{valley.params:.2g} params, {valley.flops:.2g} FLOPs"
        )
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="loss", title="transfer of the learning rate")
    axes.legend(fontsize=7)


PLOTS: dict[str, Callable[[Any, Fitted, Path], None]] = {
    "compute": compute,
    "isoflop": isoflop,
    "residuals": residuals,
    "rates": rates,
}


def draw(fitted: Fitted, path: Path, folder: Path, kind: str) -> list[Path]:
    """Write every picture for which the table has the runs, as FOLDER/NAME.png or .svg."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    several_rates = len({row.get("peak_lr") for row in read_rows(path)}) > 1
    made = []
    for name, plot in PLOTS.items():
        if name == "rates" and not several_rates:
            continue
        figure, axes = plt.subplots(figsize=(6, 4), dpi=110)
        plot(axes, fitted, path)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        made.append(folder / f"{name}.{kind}")
        figure.savefig(made[-1])
        plt.close(figure)
    return made
