"""Predict runs that have not been made from a law: recommendations, written forecasts, and their audit."""

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gptjax.apps.scaling.laws import uncertainty
from gptjax.apps.scaling.laws.parametric import Law, fit_law
from gptjax.apps.scaling.laws.table import Table, read_json, read_rows, read_table
from gptjax.apps.scaling.predict.fit import Findings, describe_batch, rate_interval, rate_law, refuse_unstraddled
from gptjax.config import ModelConfig
from gptjax.configfile import config_from_dict, read_yaml
from gptjax.errors import UserError
from gptjax.shell.display import count, power, significant

FARTHEST = 30  # times the largest fitted budget; a law fitted on a decade predicts little beyond


@dataclass(frozen=True)
class Fitted:
    """A table's law, with the bootstraps and the noise that give its predictions an interval.

    Attributes:
        laws: the law on reweighted rows.
        noise: standard deviation of log loss about the law.
    """

    table: Table
    law: Law
    laws: list[Law]
    noise: float

    def predict(self, params: float, tokens: float) -> tuple[float, uncertainty.Interval]:
        """Return the loss of one run, with an interval that includes the run's own noise."""
        rng = np.random.default_rng(0)
        values = [law.loss(params, tokens) * np.exp(self.noise * rng.normal()) for law in self.laws]
        return float(self.law.loss(params, tokens)), uncertainty.interval(values)

    @property
    def per_param_token(self) -> float:
        """Return C / (N D) of the largest runs, where attention weighs as in the runs to come."""
        large = self.table.take(self.table.flops >= 0.5 * self.table.flops.max())
        return float(np.median(large.flops / large.params / large.tokens))

    def refuse_far(self, flops: float, force: bool) -> None:
        """Raise UserError for a budget FARTHEST times above the largest fitted one, or below the smallest."""
        largest, smallest = float(self.table.flops.max()), float(self.table.flops.min())
        if flops * FARTHEST < smallest and not force:
            raise UserError(
                f"{power(flops)} FLOPs are less than a {FARTHEST}th of the smallest fitted budget, "
                f"{power(smallest)}; --force extrapolates anyway"
            )
        if flops > FARTHEST * largest and not force:
            raise UserError(
                f"{power(flops)} FLOPs are {significant(flops / largest)} times the largest fitted budget, "
                f"{power(largest)}; "
                f"beyond {FARTHEST} times it is a guess: train larger rungs, or --force"
            )


def fit_table(path: Path, params: str = "params", resamples: int = 400, seed: int = 0) -> Fitted:
    """Return the law of a table with its bootstraps; raise UserError as `read_table` and `fit_law`."""
    table = read_table(path, params)
    refuse_unstraddled(table)
    law = fit_law(table.params, table.tokens, table.loss)
    return Fitted(
        table, law, uncertainty.resampled_laws(law, table, resamples, seed=seed), uncertainty.noise(law, table)
    )


def budget_flops(study: str, flops: float | None, usd: float | None, hours: float | None) -> float:
    """Return a budget in FLOPs, from money or hours by the rates of study.yaml.

    Raises:
        UserError: none or two were given, a rate is missing, or the budget is not positive.
    """
    given = {name: value for name, value in {"flops": flops, "usd": usd, "hours": hours}.items() if value is not None}
    if len(given) != 1 or min(given.values()) <= 0:
        raise UserError("give one budget above 0: --flops C, --usd X, or --hours H")
    if flops is not None:
        return flops
    values = read_yaml(Path(study, "study.yaml"))
    rates = {name: values.get(name) for name in (("flops_per_s", "usd_per_hour") if usd else ("flops_per_s",))}
    for name, rate in rates.items():
        if rate is None:
            raise UserError(f"study.yaml states no {name}; give it, or --flops")
    return 3600 * float(rates["flops_per_s"]) * (usd / float(rates["usd_per_hour"]) if usd else hours)


def recommend(study: str, fitted: Fitted, flops: float) -> tuple[Findings, str]:
    """Return the best model for a budget, with intervals, and a config of it that train.py runs.

    Raises:
        UserError: no plan.json, or a base config that cannot be read.
    """
    ratio = fitted.per_param_token
    optima = np.array([law.optimum(flops, ratio) for law in fitted.laws])
    params, tokens = map(float, fitted.law.optimum(flops, ratio))
    intervals = {name: uncertainty.interval(optima[:, i]) for i, name in enumerate(("params", "tokens"))}
    rows = read_plan(study)
    base = read_yaml(Path(study, read_yaml(Path(study, "study.yaml"))["base"]))
    shape = choose_shape(rows, params)
    table = read_rows(Path(study, "table.csv"))
    rates = rate_law(table)
    rate = None if rates is None else float(rates(flops))
    values = _sized(study, base, shape, flops, rate, rows)
    loss, intervals["loss"] = fitted.predict(values["params"], values["tokens"])
    summary = {"flops": flops, "optimum": {"params": params, "tokens": tokens}, "intervals": intervals, "loss": loss}
    summary |= {"shape": shape, "steps": values["steps"], "params": values["params"], "tokens": values["tokens"]}
    summary["batch_sequences"] = values["batch_sequences"]
    summary["peak_lr"] = values["config"]["optim"].get("peak_lr")
    intervals["peak_lr"] = None if rate is None else rate_interval(table, flops, fitted.noise)
    low, high = intervals["params"]
    how = "the base config's: the study sweeps no rate at two budgets"
    if rate is not None:
        found = intervals["peak_lr"]
        how = f"{found[0]:.3g} to {found[1]:.3g}" if found else "the study's own law; its interval is unresolved"
    lines = [
        f"for {power(flops)} FLOPs: {count(params)} params ({count(low)} to {count(high)}), "
        f"{count(tokens)} tokens ({' to '.join(map(count, intervals['tokens']))})",
        f"shape {shape['n_layers']}x{shape['d_model']}, {shape['n_heads']} heads: {count(values['params'])} params, "
        f"{values['steps']:,} steps, {count(values['tokens'])} tokens",
        f"learning rate {summary['peak_lr']} ({how})",
        *_batch_lines(study, table, values["batch_sequences"]),
        f"expected loss {loss:.4f} ({intervals['loss'][0]:.4f} to {intervals['loss'][1]:.4f})",
    ]
    return (summary, lines), yaml.safe_dump(values["config"], sort_keys=False)


def _batch_lines(study: str, rows: list[dict[str, str]], sequences: int) -> list[str]:
    """Return lines about the base config's batch, and the critical batches of a study that sweeps it."""
    if len({row.get("batch_sequences") for row in rows}) < 2:
        return [f"batch {sequences} sequences (the base config's: the study sweeps none)"]
    try:
        critical = describe_batch(Path(study, "table.csv"))[1]
    except UserError as reason:
        critical = [str(reason)]
    return [f"batch {sequences} sequences (the base config's)", *(f"  {line}" for line in critical)]


def read_plan(study: str) -> list[dict[str, Any]]:
    """Return the rungs of a study's plan.json; raise UserError where it is missing."""
    path = Path(study, "plan.json")
    if not path.exists():
        raise UserError(f"{path} is missing; gptjax scaling plan {study} writes it")
    return read_json(path)


def choose_shape(rows: list[dict[str, Any]], params: float) -> dict[str, int]:
    """Return a shape of about this many weights, with the aspect ratio and head width of the ladder's largest.

    Args:
        rows: of plan.json; weights are counted as there, blocks by L D^2 and head by D.
    """
    largest = max(rows, key=lambda row: row["params"]["matmul"])
    L, D, counts = largest["n_layers"], largest["d_model"], largest["params"]
    blocks, head = counts["blocks"] / (L * D**2), (counts["matmul"] - counts["blocks"]) / D
    width = D // largest["n_heads"]

    def misfit(layers: int, heads: int) -> float:
        d = width * heads
        size = blocks * layers * d**2 + head * d
        return 4 * abs(np.log(size / params)) + abs(np.log(d / layers / (D / L)))

    best = min(((l, h) for l in range(1, 129) for h in range(1, 257)), key=lambda pair: misfit(*pair))
    return {"n_layers": best[0], "d_model": width * best[1], "n_heads": best[1]}


def _sized(study: str, base: dict, shape: dict, flops: float, rate: float | None, rows: list[dict]) -> dict[str, Any]:
    """Return the base config at a shape and budget: params, tokens, steps, and the config's values."""
    largest = rows[-1]
    vocab = largest["params"]["matmul"] - largest["params"]["blocks"]
    config = {**base, "model": {**base.get("model", {}), **shape}}
    from gptjax.nn.transformer import flops_per_token  # imports JAX, which fits and reports do without

    model = config_from_dict({"model": {**config["model"], "vocab_size": vocab // largest["d_model"]}}).model
    batch = config_from_dict({"train": base.get("train", {})}).train.batch_sequences * model.context_length
    steps = max(1, round(flops / flops_per_token(model) / batch))
    optim = dict(base.get("optim", {}))
    if rate is not None:
        optim["peak_lr"] = float(f"{rate:.3g}")
    share = read_yaml(Path(study, "study.yaml")).get("warmup_frac")
    if share is not None:
        optim["warmup_steps"] = round(share * steps)
    train = {**base.get("train", {}), "total_steps": steps}
    config |= {"optim": optim, "train": train}
    sizes = {"params": _matmul(model), "tokens": steps * batch, "batch_sequences": batch // model.context_length}
    return {**sizes, "steps": steps, "config": config}


def _matmul(model: ModelConfig) -> int:
    from gptjax.nn.transformer import count_params

    return count_params(model)["blocks"] + model.d_model * model.vocab_size


def write_forecasts(study: str, fitted: Fitted, table: Path, force: bool) -> list[dict[str, Any]]:
    """Write forecasts/ID.json for every held-out rung that has neither forecast nor result; return them.

    Each contains its own hash: the SHA-256 of the rest as JSON with sorted keys. To make later changes detectable,
    commit the file or publish the hash before the run.

    Raises:
        UserError: no rung is held out, every held-out rung is forecast or finished, or a budget is too far.
    """
    held = [row for row in read_plan(study) if row["held_out"]]
    if not held:
        raise UserError(f"{study}/study.yaml holds no run out; add budgets.held_out, then gptjax scaling plan")
    folder, made = Path(study, "forecasts"), []
    begun = {path.parent.name for path in Path(study, "rungs").glob("*/metrics.jsonl")}
    wanted = [row for row in held if row["id"] not in begun and not (folder / f"{row['id']}.json").exists()]
    for row in wanted:
        fitted.refuse_far(row["flops"], force)
    for row in wanted:
        path = folder / f"{row['id']}.json"
        loss, interval = fitted.predict(row["params"]["matmul"], row["tokens"])
        forecast = {"rung": row["id"], "loss": loss, "interval": interval, "made_at": _now(), "force": force}
        forecast |= {"params": row["params"]["matmul"], "tokens": row["tokens"], "flops": row["flops"]}
        forecast |= {"law": asdict(fitted.law), "rows": len(fitted.table), "noise": fitted.noise}
        forecast["largest_fitted_flops"] = float(fitted.table.flops.max())
        forecast["table_sha256"] = hashlib.sha256(table.read_bytes()).hexdigest()
        forecast["sha256"] = _hash(forecast)
        folder.mkdir(exist_ok=True)
        path.write_text(json.dumps(forecast, indent=1) + "\n")
        made.append(forecast)
    if not made:
        raise UserError("every held-out rung is forecast or begun; gptjax scaling run, then audit")
    return made


def audit(study: str, table: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Score every forecast against its run: the error, whether the interval contains it, and whether it came first.

    Raises:
        UserError: no forecast, or one that was changed after it was written.
    """
    paths = sorted(Path(study, "forecasts").glob("*.json"))
    if not paths:
        raise UserError(f"{study} has no forecast; gptjax scaling forecast {study} writes one before the run")
    results = {row["id"]: row for row in read_rows(table, held_out=True)}
    scores, lines = [], []
    for path in paths:
        forecast = read_json(path)
        if _hash(forecast) != forecast.get("sha256"):
            raise UserError(f"{path} was changed after it was written: its hash does not fit; restore it")
        score = {"rung": forecast["rung"], "forecast": forecast["loss"], "interval": forecast["interval"]}
        score |= {"made_at": forecast["made_at"], "sha256": forecast["sha256"]}
        result, (low, high) = results.get(forecast["rung"]), forecast["interval"]
        line = f"{forecast['rung']}: forecast {forecast['loss']:.4f} ({low:.4f} to {high:.4f}), {forecast['made_at']}"
        if result is None or result["status"] != "done":
            score["status"] = "not finished" if result is None else result["status"]
            lines.append(f"{line}; its run is {score['status']}")
        else:
            loss = float(result["loss"])
            score |= {
                "status": "done",
                "loss": loss,
                "error": forecast["loss"] / loss - 1,
                "held": low <= loss <= high,
            }
            score |= {"began_at": result["began_at"], "before_the_run": forecast["made_at"] <= result["began_at"]}
            order = "before" if score["before_the_run"] else "AFTER"
            held = "inside" if score["held"] else "OUTSIDE"
            lines.append(f"{line}, {order} its run began at {result['began_at']}")
            lines.append(f"  came to {loss:.4f}: forecast off by {100 * score['error']:+.2f} %, {held} the interval")
        scores.append(score)
    return scores, lines


def _hash(forecast: dict[str, Any]) -> str:
    plain = {key: value for key, value in forecast.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
