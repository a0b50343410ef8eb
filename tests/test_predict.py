"""What follows from a study's table: forecasts that are kept, diagnoses, comparisons, pictures, laws of tuning."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("scipy", reason="scipy is not installed: pip install -e '.[scaling]'")

from gptjax.apps.scaling.laws.parametric import Law, OvertrainingLaw
from gptjax.apps.scaling.laws.table import Table, read_rows, read_table
from gptjax.apps.scaling.laws.tuning import RepetitionLaw, fit_batch, fit_rate, fit_repetition, rate_valleys
from gptjax.apps.scaling.predict import commands, fit
from gptjax.apps.scaling.predict.compare import compare, refuse_other_data
from gptjax.apps.scaling.predict.doctor import diagnose
from gptjax.apps.scaling.predict.forecast import (
    audit,
    budget_flops,
    choose_shape,
    fit_table,
    recommend,
    write_forecasts,
)
from gptjax.configfile import config_from_dict
from gptjax.errors import UserError

TRUTH = Law(E=1.2, A=12.0, B=60.0, alpha=0.30, beta=0.34)
SHAPES = [(2, 32, 2), (2, 48, 3), (3, 64, 4), (4, 80, 5), (4, 112, 7), (5, 128, 8)]
BUDGETS = [3e11, 1e12, 3e12]


def plan_row(shape: tuple[int, int, int], flops: float, held_out: bool = False) -> dict:
    """As plan.json has it, for a model of 257 ids without norms' weights."""
    L, D, H = shape
    N = {"blocks": 12 * L * D**2, "matmul": 12 * L * D**2 + 257 * D, "total": 12 * L * D**2 + 2 * 257 * D}
    tokens = flops / (6 * N["matmul"] + 12 * L * D * 64)
    row = {"id": f"{L}x{D}-{flops:.0e}", "n_layers": L, "d_model": D, "n_heads": H, "params": N}
    return row | {"tokens": tokens, "flops": flops, "held_out": held_out}


def table_row(planned: dict, loss: float) -> dict:
    counts = {f"params_{name}": count for name, count in planned["params"].items()}
    row = {"id": planned["id"], "status": "done", "loss": loss, "params": planned["params"]["matmul"], **counts}
    row |= {name: planned[name] for name in ("tokens", "flops")} | {"held_out": int(planned["held_out"])}
    row |= {
        "budget_flops": planned["flops"],
        "peak_lr": 0.01,
        "batch_sequences": 16,
        "steps": 1000,
        "warmup_steps": 20,
        "epochs": 0.5,
    }
    return row | {"fingerprint": "plays", "began_at": "2999-01-01T00:00:00+00:00"}


@pytest.fixture
def make_study(tmp_path):
    """A directory as `plan`, `run` and `collect` leave it, its losses those of a law with a little noise."""

    def make(name: str = "study", law: Law = TRUTH, noise: float = 1e-3, **columns) -> Path:
        directory = tmp_path / name
        (directory / "rungs" / "any").mkdir(parents=True)
        (directory / "rungs" / "any" / "result.json").write_text("{}")
        rng = np.random.default_rng(len(name))
        held = plan_row((6, 144, 9), 1e13, held_out=True)
        plan = [plan_row(shape, flops) for flops in BUDGETS for shape in SHAPES]
        rows = []
        for planned in plan:
            loss = law.loss(planned["params"]["matmul"], planned["tokens"]) * np.exp(noise * rng.normal())
            rows.append(table_row(planned, loss) | columns)
        (directory / "plan.json").write_text(json.dumps([*plan, held]))
        base = {"model": {"context_length": 64, "positions": "rope", "bias": False, "norm_weights": False}}
        (directory / "base.yaml").write_text(yaml.safe_dump(base | {"train": {"batch_sequences": 16}}))
        study = {"base": "base.yaml", "flops_per_s": 1e10, "usd_per_hour": 2.0, "warmup_frac": 0.02}
        (directory / "study.yaml").write_text(yaml.safe_dump(study))
        write_table(directory, rows)
        return directory

    return make


def write_table(directory: Path, rows: list[dict]) -> None:
    with (directory / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fitted(directory: Path, resamples: int = 100):
    return fit_table(directory / "table.csv", resamples=resamples)


# ---- forecasts


def test_a_forecast_is_kept_and_scored(make_study):
    directory = make_study()
    table = directory / "table.csv"
    [made] = write_forecasts(directory, fitted(directory), table, force=False)
    held = json.loads((directory / "plan.json").read_text())[-1]
    truth = float(TRUTH.loss(held["params"]["matmul"], held["tokens"]))
    assert made["loss"] == pytest.approx(truth, rel=0.01)
    with pytest.raises(UserError, match="is forecast or begun"):  # it is not written a second time
        write_forecasts(directory, fitted(directory), table, force=False)
    assert audit(directory, table)[0][0]["status"] == "not finished"

    write_table(directory, [*csv.DictReader(table.open()), table_row(held, truth)])
    [score], lines = audit(directory, table)
    assert score["error"] == pytest.approx(made["loss"] / truth - 1)
    assert score["before_the_run"] and score["held"]
    assert "before its run began" in lines[0]

    path = directory / "forecasts" / f"{held['id']}.json"
    path.write_text(json.dumps(made | {"loss": truth}))
    with pytest.raises(UserError, match="was changed after it was written"):
        audit(directory, table)


def test_forecasts_are_written_all_or_none(make_study):
    directory = make_study()
    plan = json.loads((directory / "plan.json").read_text())
    (directory / "plan.json").write_text(json.dumps([*plan, plan_row((6, 160, 10), 1e15, held_out=True)]))
    with pytest.raises(UserError, match="333 times the largest"):
        write_forecasts(directory, fitted(directory), directory / "table.csv", force=False)
    assert not (directory / "forecasts").exists()


def test_a_table_of_another_study_is_refused(make_study):
    """The base config was changed and planned anew: no law of the runs before holds for the runs to come."""
    directory = make_study()
    plan = json.loads((directory / "plan.json").read_text())
    (directory / "plan.json").write_text(json.dumps([row | {"id": f"new-{row['id']}"} for row in plan]))
    for verb in (commands.forecast, commands.fit, commands.doctor):
        with pytest.raises(UserError, match="its base config or the data changed"):
            verb(str(directory))


@pytest.mark.parametrize("name", ["plan.json", "forecasts/broken.json"])
def test_files_that_were_cut_short_are_named(make_study, name):
    directory = make_study()
    (directory / "forecasts").mkdir()
    (directory / name).write_text('[{"id": "2x')
    with pytest.raises(UserError, match=rf"cannot read .*{name}"):
        commands.audit(str(directory))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"resamples": 0}, "resamples 0 must be at least 2"),
        ({"delta": 0.0}, "delta 0 positive"),
        ({"law": "batch", "sensitivity": True}, "--sensitivity is of the law chinchilla"),
        ({"target": 2.0}, "--target of batch"),
        ({"law": "repetition", "params": "weights"}, "no column 'weights'"),
    ],
)
def test_options_that_a_fit_cannot_follow_are_refused(make_study, options, complaint):
    with pytest.raises(UserError, match=complaint):
        commands.fit(str(make_study()), **options)


def test_json_says_null_where_a_number_is_not_finite(capsys):
    commands._print_result(({"A": [1.0, float("nan")], "b": {"c": (float("inf"),)}}, []), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"A": [1.0, None], "b": {"c": [None]}}


def test_the_same_run_twice_is_known_by_its_id(make_study):
    directory = make_study()
    rows = list(csv.DictReader((directory / "table.csv").open()))
    write_table(directory, [*rows, rows[0] | {"loss": float(rows[0]["loss"]) * 1.001}])
    with pytest.raises(UserError, match="are the same run"):
        read_table(directory / "table.csv")
    write_table(directory, [*rows[1:], rows[0] | {"held_out": "True"}])
    assert len(read_table(directory / "table.csv")) == len(rows) - 1


def test_a_held_out_run_touches_no_fit(make_study):
    directory = make_study()
    before = fitted(directory, 1).law
    held = json.loads((directory / "plan.json").read_text())[-1]
    write_table(directory, [*csv.DictReader((directory / "table.csv").open()), table_row(held, 9.0)])
    assert fitted(directory, 1).law == before


def test_far_budgets_are_refused(make_study):
    one = fitted(make_study(), 2)
    with pytest.raises(UserError, match=r"40.0 times the largest fitted budget.*--force"):
        one.refuse_far(40 * BUDGETS[-1], force=False)
    one.refuse_far(40 * BUDGETS[-1], force=True)
    one.refuse_far(29 * BUDGETS[-1], force=False)
    with pytest.raises(UserError, match="less than a 30th of the smallest"):
        one.refuse_far(BUDGETS[0] / 31, force=False)


def test_a_study_that_straddles_no_optimum_is_refused(make_study):
    small = Law(E=1.2, A=12.0, B=6e4, alpha=0.30, beta=0.60)  # wants the smallest models
    with pytest.raises(UserError, match=r"no budget straddles its optimum: 3×10¹¹ FLOPs: the smallest model"):
        fitted(make_study(law=small, noise=0.0), 1)


# ---- recommendations


def test_a_recommendation_is_a_config_near_the_optimum(make_study):
    directory = make_study()
    one = fitted(directory)
    (values, _), text = recommend(directory, one, 1e13)
    best = TRUTH.optimum(1e13, one.per_param_token)
    low, high = values["intervals"]["params"]
    assert low < best[0] < high
    assert values["params"] == pytest.approx(values["optimum"]["params"], rel=0.1)
    cfg = config_from_dict(yaml.safe_load(text))
    assert (cfg.model.n_layers, cfg.model.d_model) == (values["shape"]["n_layers"], values["shape"]["d_model"])
    assert cfg.train.total_steps * 16 * 64 == values["tokens"]
    assert cfg.optim.warmup_steps == round(0.02 * cfg.train.total_steps)
    assert 6 * values["params"] * values["tokens"] < 1e13  # attention takes the rest


def test_a_shape_keeps_the_ladders_proportions():
    shape = choose_shape([plan_row(s, 1e12) for s in SHAPES], 12 * 10 * 256**2)
    assert shape["d_model"] == 16 * shape["n_heads"]
    assert 12 * shape["n_layers"] * shape["d_model"] ** 2 + 257 * shape["d_model"] == pytest.approx(
        12 * 10 * 256**2, rel=0.05
    )
    assert shape["d_model"] / shape["n_layers"] == pytest.approx(128 / 5, rel=0.35)


def test_budgets_in_money_and_hours(make_study):
    directory = make_study()
    assert budget_flops(directory, None, None, 2.0) == 7200 * 1e10
    assert budget_flops(directory, None, 3.0, None) == 1.5 * 3600 * 1e10
    assert budget_flops(directory, 5.0, None, None) == 5.0
    with pytest.raises(UserError, match="give one budget above 0"):
        budget_flops(directory, 1e12, 3.0, None)


# ---- the doctor


def findings(directory: Path) -> dict[str, str]:
    return {one["check"]: one["finding"] for one in diagnose(directory / "table.csv")[0]["findings"]}


def test_the_doctor_finds_what_was_done_wrong(make_study):
    said = findings(make_study(warmup_steps=300, epochs=9.0, noise=0.0))
    assert "18 runs of 18 warm up for up to 30 %" in said["warm-up"]
    assert "18 runs of 18 took more than 4 epochs, up to 9.0" in said["epochs"]
    assert "depth against noise" not in said
    assert "the valley is" in findings(make_study("noisy", noise=0.2))["depth against noise"]
    tilted = Law(E=1.2, A=225.0, B=60.0, alpha=0.45, beta=0.25)
    assert "a parabola errs by" in findings(make_study("tilted", tilted, noise=0.0))["bias of the parabola"]
    small = Law(E=1.2, A=12.0, B=6e4, alpha=0.30, beta=0.60)  # wants the smallest models
    assert "is the best: nothing straddles it" in findings(make_study("small", small, noise=0.0))["edge of the grid"]


def test_the_doctor_sees_that_the_count_of_weights_decides_the_exponent(make_study):
    """Blocks alone against all weights, where the vocabulary outweighs the blocks (Porian et al. 2024)."""
    assert "blocks" in findings(make_study(noise=0.0))["count of N"]


# ---- two recipes


def test_a_better_recipe_is_measured_in_compute(make_study):
    """B's law is A's with every token and weight worth as much as after twice the compute."""
    a = 2 ** (TRUTH.alpha * TRUTH.exponent)
    better = Law(TRUTH.E, TRUTH.A / a, TRUTH.B / 2 ** (TRUTH.beta * (1 - TRUTH.exponent)), TRUTH.alpha, TRUTH.beta)
    one, other = fitted(make_study("a", noise=2e-4)), fitted(make_study("better", better, noise=2e-4))
    values, _ = compare(one, other, 3e12)
    low, high = values["interval"]
    assert values["resolved"] and 1 < low < 2 < high
    assert values["multiplier"] == pytest.approx(2, rel=0.1)


def test_equal_recipes_are_unresolved(make_study):
    one, other = fitted(make_study("one", noise=0.01)), fitted(make_study("others", noise=0.01))
    values, lines = compare(one, other, 3e12)
    assert not values["resolved"] and values["more_flops"] > 0
    assert "unresolved: needs about" in lines[1]


def test_recipes_on_other_data_are_not_compared(make_study):
    rows = [read_rows(make_study(name, fingerprint=name) / "table.csv") for name in ("plays", "novels")]
    with pytest.raises(UserError, match="different data"):
        refuse_other_data(*rows)


def test_a_table_of_mixed_data_is_refused(make_study):
    directory = make_study()
    rows = list(csv.DictReader((directory / "table.csv").open()))
    rows[3]["fingerprint"] = "novels"
    write_table(directory, rows)
    with pytest.raises(UserError, match="mixes data novels and plays"):
        read_table(directory / "table.csv")


# ---- laws of tuning, from their own truth


def test_the_law_of_repetition_is_recovered():
    """Scales as Muennighoff et al. (2023) found them."""
    truth = RepetitionLaw(Law(1.87, 521.0, 1488.0, 0.35, 0.35), R_D=15.39, R_N=5.31)
    params, unique, epochs = (
        x.ravel() for x in np.meshgrid([3e7, 1e8, 3e8, 1e9], [1e8, 4e8, 2e9, 1e10], [0.5, 1, 4, 16, 60])
    )
    unique = np.where(epochs < 1, unique * epochs, unique)
    tokens = unique * np.maximum(1, epochs)
    # Its law of one epoch is fitted to models that one epoch suffices for: those have no excess weights.
    loss = truth.loss(params, tokens, unique)
    enough = (truth.law.A / truth.law.B * unique**0.35) ** (1 / 0.35) >= params
    kept = enough | (epochs > 1)
    found = fit_repetition(params[kept], tokens[kept], loss[kept], epochs[kept])
    assert pytest.approx(15.39, rel=0.01) == found.R_D
    assert pytest.approx(5.31, rel=0.01) == found.R_N


def test_the_critical_batch_is_recovered():
    """Loss falls with effective tokens D / (1 + B / critical), as McCandlish et al. (2018) have it."""
    batch, tokens = (x.ravel() for x in np.meshgrid([1e3, 4e3, 1.6e4, 6.4e4], np.geomspace(1e6, 1.6e8, 9)))
    loss = 1.5 + 40 * (tokens / (1 + batch / 2e4)) ** -0.3
    law = fit_batch(batch, tokens, loss)
    assert law.critical == pytest.approx(2e4, rel=0.03)
    low, high = law.critical_interval
    assert low <= law.critical <= high
    with pytest.raises(UserError, match=r"reach a loss of 0\.1"):
        fit_batch(batch, tokens, loss, target=0.1)


def test_the_best_rate_and_its_sensitivity():
    rates = np.geomspace(1e-3, 1e-1, 33)
    flops, rate = (x.ravel() for x in np.meshgrid([1e12, 1e13, 1e14], rates))
    best = 1e-2 * (flops / 1e13) ** -0.125
    loss = 2 + 0.05 * np.log(rate / best) ** 2
    valleys = list(rate_valleys(flops / 1e6, flops, rate, loss))
    assert fit_rate(valleys).exponent == pytest.approx(-0.125, abs=1e-6)
    assert fit_rate(valleys)(1e13) == pytest.approx(1e-2)
    # The mean of a square over a range of half-width h about its vertex is h^2 / 3; the middle budget is centred.
    assert valleys[1].sensitivity == pytest.approx(0.05 * np.log(10) ** 2 / 3, rel=0.03)
    assert list(rate_valleys(flops[:3], flops[:3], rate[:3], loss[:3])) == []
    edge = next(rate_valleys(np.ones(4), np.ones(4), rates[:4], np.array([4.0, 3.0, 2.0, 1.0])))
    assert "largest rate" in edge.refused


# ---- the verbs


def test_the_verbs_print_and_write(make_study, capsys):
    directory = make_study()
    study = str(directory)
    commands.fit(study=study, sensitivity=True, json=True)
    values = json.loads(capsys.readouterr().out)
    low, high = values["one row left out"]["exponent"]
    assert low <= values["as it is"]["exponent"] <= high
    assert {"delta 0.01", "without 1e+12 FLOPs", "N is params_total"} <= set(values)
    commands.recommend(study, flops=6e12, out=str(directory / "best.yaml"))
    assert "trains it" in capsys.readouterr().out
    commands.forecast(study)
    commands.audit(study)
    commands.doctor(study)
    capsys.readouterr()
    assert json.loads((directory / "audit.json").read_text())[0]["status"] == "not finished"
    commands.report(study)
    page = (directory / "report.html").read_text()
    assert page.count('<figure role="img"') == 4
    for piece in (
        "N* grows as C^",
        "What not to conclude",
        "The law",
        "Forecasts",
        "Checks",
        "Methods and provenance",
    ):
        assert piece in page
    assert page.count("<td") > 100 and "aria-sort" in page  # tables that sort


def test_rates_are_drawn_where_they_were_swept(make_study, capsys):
    directory = make_study()
    rows = list(csv.DictReader((directory / "table.csv").open()))
    swept = [row | {"peak_lr": lr, "loss": float(row["loss"]) * f} for row in rows for lr, f in LR_FACTORS.items()]
    write_table(directory, swept)
    commands.plot(str(directory), "svg")
    assert sorted(path.name for path in (directory / "plots").iterdir()) == [
        "compute.svg",
        "isoflop.svg",
        "rates.svg",
        "residuals.svg",
    ]
    assert fit.rate_law(read_rows(directory / "table.csv"))(1e12) == pytest.approx(0.01, rel=0.05)
    assert len(read_table(directory / "table.csv")) == len(rows)  # a law sees the best rate alone


def test_a_recommended_rate_has_an_interval(make_study):
    directory = make_study()
    rows = list(csv.DictReader((directory / "table.csv").open()))
    swept = [row | {"peak_lr": lr, "loss": float(row["loss"]) * f} for row in rows for lr, f in LR_FACTORS.items()]
    write_table(directory, swept)
    (values, lines), _ = recommend(directory, fitted(directory), 1e13)
    low, high = values["intervals"]["peak_lr"]
    assert low < values["peak_lr"] < high and low < 0.01 < high
    assert any(line.startswith("batch 16 sequences") for line in lines)


def test_the_other_laws_have_intervals_that_hold_the_truth(tmp_path):
    rng = np.random.default_rng(0)
    law = OvertrainingLaw(E=1.84, a=150.0, b=130.0, eta=0.136)
    params, ratio = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 5), [5.0, 20.0, 80.0, 320.0]))
    tokens = ratio * params
    loss = law.loss(6 * params * tokens, ratio) * np.exp(0.002 * rng.normal(size=len(params)))
    values, lines = fit.describe_overtraining(Table(params, tokens, loss, 6 * params * tokens))
    for name, (low, high) in values["intervals"].items():
        assert low < getattr(law, name) < high, name
    assert len(lines) == 5 and all(" to " in line for line in lines[1:])

    repeated = RepetitionLaw(Law(1.87, 521.0, 1488.0, 0.35, 0.35), R_D=15.39, R_N=5.31)
    grid = np.meshgrid([3e7, 1e8, 3e8], [2e9, 1e10], [0.5, 1, 4, 16, 60])
    params, unique, epochs = (x.ravel() for x in grid)
    tokens = unique * epochs
    loss = repeated.loss(params, tokens, np.minimum(unique, tokens)) * np.exp(1e-3 * rng.normal(size=len(params)))
    columns = {"params": params, "tokens": tokens, "loss": loss, "epochs": epochs}
    write_table(tmp_path, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    values, lines = fit.describe_repetition(tmp_path / "table.csv")
    low, high = values["intervals"]["R_D"]
    assert low < values["R_D"] < high and high < 3 * low
    assert " to " in lines[1]


LR_FACTORS = {0.0025: 1.04, 0.005: 1.01, 0.01: 1.0, 0.02: 1.01, 0.04: 1.04}
