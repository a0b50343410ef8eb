"""Compare two recipes: how much compute one needs for the loss that the other reaches."""

import numpy as np
from scipy.optimize import brentq

from gptjax.apps.scaling.laws import uncertainty
from gptjax.apps.scaling.laws.parametric import Law
from gptjax.apps.scaling.predict.fit import Findings
from gptjax.apps.scaling.predict.forecast import Fitted
from gptjax.errors import UserError
from gptjax.shell.display import power


def least_loss(law: Law, flops: float, ratio: float) -> float:
    """Return the law's loss at the best size for a budget."""
    return float(law.loss(*law.optimum(flops, ratio)))


def multiplier(a: Law, b: Law, flops: float, ratios: tuple[float, float]) -> float:
    """Return the FLOPs that A needs over those that B needs, to reach A's loss at `flops`; 0 or inf out of reach."""
    target = least_loss(a, flops, ratios[0])
    low, high = (np.log(flops) + sign * np.log(1e6) for sign in (-1, 1))

    def excess(log_flops: float) -> float:
        return least_loss(b, float(np.exp(log_flops)), ratios[1]) - target

    if excess(high) > 0:
        return 0.0
    if excess(low) < 0:
        return np.inf
    return float(flops / np.exp(brentq(excess, low, high)))


def compare(a: Fitted, b: Fitted, flops: float) -> Findings:
    """Return B's compute multiplier over A at a budget, with its interval; or how many more FLOPs would resolve it.

    The interval narrows with the root of the number of runs, from which the FLOPs still missing follow.

    Raises:
        UserError: the two studies were fitted at budgets that have nothing to do with the target.
    """
    for fitted in (a, b):
        fitted.refuse_far(flops, force=False)
    ratios = (a.per_param_token, b.per_param_token)
    value = multiplier(a.law, b.law, flops, ratios)
    drawn = np.array([multiplier(x, y, flops, ratios) for x, y in zip(a.laws, b.laws, strict=True)])
    low, high = uncertainty.interval(np.clip(drawn, 1e-9, 1e9))
    spent = float(a.table.flops.sum() + b.table.flops.sum())
    values = {"flops": flops, "multiplier": float(np.clip(value, 1e-9, 1e9)), "interval": [low, high]}
    values |= {"resolved": not low <= 1 <= high, "spent_flops": spent}
    line = f"compute multiplier of B over A at {power(flops)} FLOPs: {value:.3g} ({low:.3g} to {high:.3g})"
    if values["resolved"]:
        return values, [f"{line}: {'B' if low > 1 else 'A'} is better"]
    apart, half = abs(np.log(max(value, 1e-9))), (np.log(high) - np.log(low)) / 2
    more = spent * ((half / max(apart, 0.01)) ** 2 - 1)
    values["more_flops"] = float(max(more, 0.0))
    remark = "" if apart > 0.01 else " to tell a difference of 1 %"
    return values, [
        line,
        f"unresolved: needs about {power(max(more, 0.0), 2)} more FLOPs in each recipe's rungs{remark}",
    ]


def refuse_other_data(a: list[dict[str, str]], b: list[dict[str, str]]) -> None:
    """Raise UserError where the rows of two studies say that their data, and so their losses, differ in kind."""
    prints = [{row["fingerprint"] for row in rows if "fingerprint" in row} for rows in (a, b)]
    if all(prints) and prints[0] != prints[1]:
        raise UserError("the two studies were trained on different data; their losses cannot be compared")
