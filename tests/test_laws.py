"""Laws and their fits: published tables, synthetic truth, intervals, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, run_script

pytest.importorskip("scipy", reason="scipy is not installed: pip install -e '.[scaling]'")

from scipy.optimize import minimize

from gptjax.apps.scaling.laws.isoflop import METHODS, disturbed_floors, find_floor, find_floors, frontier
from gptjax.apps.scaling.laws.parametric import (
    CONVERGED,
    HuberObjective,
    Law,
    fit_law,
    fit_overtraining,
    fit_power_law,
)
from gptjax.apps.scaling.laws.reweighted import fit_reweighted
from gptjax.apps.scaling.laws.table import Table, read_table
from gptjax.apps.scaling.laws.uncertainty import interval, resampled_laws
from gptjax.errors import UserError

TRUTH = Law(E=1.8172, A=482.0, B=2085.4, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024, table 1, rounded


def synthetic(law: Law, rows: int = 240, noise: float = 0.0, seed: int = 0) -> Table:
    """A table as large and as wide as Chinchilla's: 44M to 16B weights, 6e18 to 3e21 FLOPs."""
    rng = np.random.default_rng(seed)
    params = np.exp(rng.uniform(np.log(4.4e7), np.log(1.6e10), rows))
    flops = np.exp(rng.uniform(np.log(6e18), np.log(3e21), rows))
    tokens = flops / 6 / params
    return Table(params, tokens, law.loss(params, tokens) * np.exp(noise * rng.normal(size=rows)), flops)


def isoflop(law: Law, budgets: list[float], factor: float, sizes: int, noise: float = 0.0, seed: int = 0) -> Table:
    """For each budget, sizes spread evenly (in logarithms) over [N* / factor, N* factor]."""
    rng = np.random.default_rng(seed)
    flops = np.repeat(budgets, sizes)
    spread = np.exp(np.linspace(-np.log(factor), np.log(factor), sizes))
    params = law.optimum(flops)[0] * np.tile(spread, len(budgets))
    tokens = flops / 6 / params
    return Table(params, tokens, law.loss(params, tokens) * np.exp(noise * rng.normal(size=len(flops))), flops)


def published(name: str) -> list[dict[str, str]]:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here; GPTJAX_TEST_DATA names its folder")
    return list(csv.DictReader((DATA / name).open()))


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def fitted(table: Table, **options) -> Law:
    return fit_law(table.params, table.tokens, table.loss, **options)


# ---- the parametric law


def test_five_parameters_are_recovered():
    law = fitted(synthetic(TRUTH))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3)
    assert law.converged


def test_noise_of_the_published_size_moves_the_law_little():
    law = fitted(synthetic(TRUTH, noise=0.006))
    assert law.converged
    assert law.exponent == pytest.approx(TRUTH.exponent, abs=0.02)
    assert law.objective == pytest.approx(240 * 1e-3 * (0.006 * np.sqrt(2 / np.pi) - 0.0005), rel=0.15)


@pytest.mark.parametrize("noise", [0.0, 0.006])
def test_the_mean_with_default_tolerances_is_flagged(noise):
    """The mistake of the original fit: scipy ends on the mean of the terms before the minimum."""
    table = synthetic(TRUTH, noise=noise)
    starts = np.array(
        [[e, a, b, x, y] for e in (0, 1) for a in (0, 15) for b in (0, 15) for x in (0, 1) for y in (0, 1)]
    )
    total = HuberObjective(table.params, table.tokens, table.loss)

    def mean(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = total(theta)
        return value / len(table), gradient / len(table)

    ends = [minimize(mean, start, jac=True, method="L-BFGS-B") for start in total.centered(starts)]
    loose = min(ends, key=lambda end: end.fun)
    tight = fitted(table)
    assert total.newton_decrement(loose.x) > CONVERGED
    assert tight.newton_decrement < CONVERGED
    assert tight.converged
    assert tight.objective < total(loose.x)[0]


def test_the_objective_is_the_sum_of_huber_terms():
    table = synthetic(TRUTH, noise=0.006)
    law = fitted(table, delta=2e-3)
    residual = np.abs(np.log(law.loss(table.params, table.tokens)) - np.log(table.loss))
    huber = np.where(residual <= 2e-3, residual**2 / 2, 2e-3 * (residual - 1e-3))
    assert law.objective == pytest.approx(huber.sum(), rel=1e-9)


def test_a_row_of_weight_three_is_three_rows():
    table = synthetic(TRUTH, rows=60, noise=0.004)
    counts = np.arange(60) % 3 + 1
    weighted = fitted(table, weights=counts.astype(float))
    repeated = fitted(table.take(np.repeat(np.arange(60), counts)))
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-6)
    assert weighted.exponent == pytest.approx(repeated.exponent, abs=1e-4)


def test_rows_that_do_not_determine_E_are_flagged():
    below_zero = Law(-0.05, TRUTH.A, TRUTH.B, TRUTH.alpha, TRUTH.beta)
    assert not fitted(synthetic(below_zero, noise=0.006)).converged


def test_the_optimum_is_one():
    best, tokens = TRUTH.optimum(1e21)
    assert 6 * best * tokens == pytest.approx(1e21)
    nearby = best * np.array([0.97, 1.0, 1.03])
    assert TRUTH.loss(nearby, 1e21 / 6 / nearby).argmin() == 1


@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_fits_of_many_weightings_at_once_are_the_fits_of_each(noise):
    table = isoflop(Law(1.8, 400.0, 1500.0, 0.34, 0.30), [1e18, 1e19, 1e20], 8, 7, noise)
    weights = np.random.default_rng(0).exponential(size=(12, len(table)))
    weights[0, :3] = 0  # rows left out
    law, rows = fitted(table), (table.params, table.tokens, table.loss)
    start = [[*np.log([law.E, law.A, law.B]), law.alpha, law.beta]]
    for found, weight in zip(fit_reweighted(law, *rows, weights), weights, strict=True):
        alone = fit_law(*rows, weights=weight, starts=start)
        assert found.converged
        assert found.objective <= alone.objective * (1 + 1e-7) + 1e-18
        np.testing.assert_allclose([found.E, found.alpha, found.beta], [alone.E, alone.alpha, alone.beta], rtol=1e-3)


@pytest.mark.slow
def test_intervals_hold_the_truth():
    """Of 200 synthetic studies, each 4 budgets of 9 sizes with noise of .4 %."""
    truth = Law(1.8, 400.0, 1500.0, 0.34, 0.30)
    start = np.array([[np.log(1.8), np.log(400), np.log(1500), 0.34, 0.30]])
    held = {"exponent": 0, "E": 0, "alpha": 0}
    for seed in range(200):
        table = isoflop(truth, [1e18, 1e19, 1e20, 1e21], 8, 9, noise=0.004, seed=seed)
        laws = resampled_laws(fitted(table, starts=start), table, resamples=100, seed=seed)
        for name in held:
            low, high = interval([getattr(law, name) for law in laws])
            held[name] += low <= getattr(truth, name) <= high
    assert all(0.90 <= count / 200 <= 0.99 for count in held.values()), held


# ---- floors and the frontier


@pytest.mark.parametrize("method", METHODS)
def test_floors_of_many_losses_at_once_are_the_floors_of_each(method):
    table = isoflop(TRUTH, [1e18, 1e19, 1e20], 6, 6)
    table = table.take(np.array([*range(len(table)), 3, 9]))  # two sizes with a second seed
    losses = table.loss * np.exp(0.2 * np.random.default_rng(0).normal(size=(20, len(table))))
    refused = 0
    for found, loss in zip(disturbed_floors(table, losses, method), losses, strict=True):
        alone = find_floors(Table(table.params, table.tokens, loss, table.flops), method)
        assert [bool(floor.refused) for floor in found] == [bool(floor.refused) for floor in alone]
        refused += sum(bool(floor.refused) for floor in alone)
        values = [[(f.flops, f.params, f.tokens, f.loss) for f in floors] for floors in (found, alone)]
        np.testing.assert_allclose(*values, rtol=1e-9)
    assert refused


@pytest.mark.parametrize(("factor", "bias"), [(2, -0.33), (4, -1.30), (8, -2.90), (16, -5.10)])
def test_the_parabola_is_biased_where_alpha_is_not_beta(factor, bias):
    """In per cent of D*, from 15 sizes a budget; N* errs by as much the other way."""
    law = Law(1.69, 406.4, 410.7, 0.34, 0.28)
    floor = find_floor(1e20, isoflop(law, [1e20], factor, 15), "parabola")
    params, tokens = law.optimum(1e20)
    assert 100 * (floor.tokens / tokens - 1) == pytest.approx(bias, abs=0.01)
    assert floor.params * floor.tokens == pytest.approx(params * tokens)


def test_without_such_a_difference_both_methods_find_the_floor():
    law = Law(1.69, 400.0, 410.0, 0.3, 0.3)
    table = isoflop(law, [1e18, 1e19, 1e20], 4, 9)
    for method in ("akima", "parabola"):
        params, tokens = frontier(find_floors(table, method))
        assert params.exponent == pytest.approx(law.exponent, abs=1e-3)
        assert tokens.exponent == pytest.approx(1 - law.exponent, abs=1e-3)
        assert params(1e20) == pytest.approx(law.optimum(1e20)[0], rel=0.01)


def valley(*losses: float) -> Table:
    params = 1e6 * 2.0 ** np.arange(len(losses))
    tokens = 1e18 / 6 / params
    return Table(params, tokens, np.array(losses), np.full(len(losses), 1e18))


@pytest.mark.parametrize("method", ["akima", "parabola"])
@pytest.mark.parametrize(
    ("losses", "reason"),
    [((3.0, 2.9, 2.8, 2.7), "add larger"), ((2.6, 2.7, 2.8, 2.9), "add smaller"), ((3.0, 2.9, 3.0), "too few")],
)
def test_a_budget_that_nothing_straddles_is_refused(method, losses, reason):
    floor = find_floor(1e18, valley(*losses), method)
    assert reason in floor.refused
    assert np.isnan(floor.params)


@pytest.mark.parametrize(
    ("losses", "reason"), [((3.0, 2.9, 3.3, 3.2, 3.0), "concave"), ((3.0, 2.9, 2.7, 2.5, 2.501), "outside")]
)
def test_a_parabola_without_a_minimum_among_the_data_is_refused(losses, reason):
    assert reason in find_floor(1e18, valley(*losses), "parabola").refused


# ---- published tables

PORIAN = {
    "kaplan_count": 0.8353,
    "standard_count": 0.7065,
    "short_warmup": 0.6020,
    "matched_cosine": 0.5715,
    "tuned_constant_lr": 0.4969,
}


@pytest.mark.parametrize(("experiment", "exponent"), PORIAN.items())
def test_porians_exponents(experiment, exponent):
    rows = [row for row in published("porian_optima.csv") if row["experiment"] == experiment]
    law = fit_power_law(column(rows, "flops"), column(rows, "n_star"), column(rows, "log_n_star_std"))
    assert law.exponent == pytest.approx(exponent, abs=5e-4)


@pytest.mark.parametrize(("method", "neighbours"), [("akima", None), ("parabola", 2)])
@pytest.mark.parametrize(("experiment", "exponent"), PORIAN.items())
def test_porians_exponents_from_raw_points(experiment, exponent, method, neighbours):
    rows = [row for row in published("porian_isoflop_points.csv") if row["experiment"] == experiment]
    table = Table(*(column(rows, name) for name in ("n", "tokens", "loss", "flops")))
    params, _ = frontier(find_floors(table, method, neighbours))
    assert params.exponent == pytest.approx(exponent, abs=0.03)


def test_gadres_law_predicts_the_large_runs():
    rows = [row for row in published("gadre_overtraining.csv") if row["dataset"] == "rpj"]
    params, tokens, loss = (column(rows, name) for name in ("params", "tokens", "loss_c4_val"))
    flops, ratio = 6 * params * tokens, tokens / params
    fitted_on = (params < 5e8) & ((ratio.round() == 20) | ((ratio.round() == 320) & (params < 2e7)))
    assert fitted_on.sum() == 5
    law = fit_overtraining(flops[fitted_on], ratio[fitted_on], loss[fitted_on])
    assert pytest.approx(1.837, abs=1e-3) == law.E
    assert law.eta == pytest.approx(0.1364, abs=1e-4)
    for name, error in (("rpj-open_lm_1b-32.0", 0.0071), ("rpj-open_lm_7b-1.0", 0.0073)):
        at = next(i for i, row in enumerate(rows) if row["name"] == name)
        assert abs(law.loss(flops[at], ratio[at]) / loss[at] - 1) == pytest.approx(error, abs=1e-4)


def test_nanochats_optima():
    """Budgets and optima as its author published them (karpathy/nanochat, discussion of scaling laws, 2026)."""
    flops = np.array([1e18, 2.15e18, 4.64e18, 1e19])
    params = fit_power_law(flops, np.array([110.7e6, 167.8e6, 250.7e6, 381.8e6]))
    tokens = fit_power_law(flops, np.array([1.24e9, 1.79e9, 2.64e9, 3.81e9]))
    assert (round(params.exponent, 3), round(tokens.exponent, 3)) == (0.536, 0.489)


# ---- tables and the command


def write_csv(path: Path, table: Table, **columns) -> Path:
    values = {"params": table.params, "tokens": table.tokens, "loss": table.loss, "flops": table.flops, **columns}
    lines = [",".join(values), *(",".join(map(repr, map(float, row))) for row in zip(*values.values(), strict=True))]
    path.write_text("\n".join(lines))
    return path


def test_a_table_is_read_back(tmp_path):
    table = synthetic(TRUTH, rows=8)
    read = read_table(write_csv(tmp_path / "t.csv", table, params_total=2 * table.params), params="params_total")
    assert np.array_equal(read.params, 2 * table.params)
    assert np.array_equal(read.loss, table.loss)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params,tokens,los\n1,2,3", "no column 'loss'; did you mean 'los'"),
        ("params,tokens,loss\n1,2,nan", "row 1: loss 'nan' is not a positive number"),
        ("params,tokens,loss\n1,2,3\n1,2", "row 2: loss None"),
        ("params,tokens,loss\n5,6,7\n1,2,3\n5,6,7", "rows 1 and 3 are the same run"),
        ("params,tokens,loss\n", "has no rows to fit"),
        ("params,tokens,loss\n1e6,1e8,3\n2e6,1e8,2.9", "2 rows are too few"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, said):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        table = read_table(path)
        fitted(table)
    assert said in str(error.value)


def test_the_command_prints_the_law(tmp_path):
    path = write_csv(tmp_path / "t.csv", isoflop(TRUTH, [1e19, 1e20, 1e21], 4, 7, noise=1e-4))
    result = run_script("-m", "gptjax", "scaling", "fit", "--table", path, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert {"E", "A", "B", "alpha", "beta", "objective", "converged"} <= set(values)
    assert values["converged"]
    low, high = values["intervals"]["exponent"]
    assert low < TRUTH.exponent < high
    assert values["frontier"]["akima"]["params"]["exponent"] == pytest.approx(TRUTH.exponent, abs=0.01)
    assert values["optimum"]["params"] == pytest.approx(TRUTH.optimum(1e22)[0], rel=0.05)


def test_the_command_refuses_in_one_line(tmp_path):
    result = run_script("-m", "gptjax", "scaling", "fit", "--table", tmp_path / "none.csv")
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot read table")
    assert result.stderr.count("\n") == 1
