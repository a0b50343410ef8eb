"""Pages in a real browser, at the width of a desk and of a phone, light and dark; their size; and what they escape.

The browser's tests are skipped where Chromium is absent: `apt-get install chromium chromium-driver`.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[report]'")
pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install -e '.[report]'")

from browsing import check_in_browser

from gptjax.apps.plan import planning
from gptjax.apps.plan.chips import parse_topology
from gptjax.apps.plan.page import plan_page
from gptjax.apps.plan.placement import place_chips
from gptjax.apps.report import commands
from gptjax.apps.report.compare import compare, compare_page, lines
from gptjax.apps.report.run import run_page, summary
from gptjax.apps.report.runs import Run, find_runs, read_run
from gptjax.configfile import config_from_dict
from gptjax.errors import UserError
from gptjax.figures.plan import Candidate
from gptjax.figures.series import Logged

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}"
LIMIT_BYTES = 2_000_000
NAN = float("nan")


def make_run(folder: Path, steps: int = 200, every: int = 1, **config) -> Path:
    """A run's directory as training leaves it, with hostile names and samples, and a spike in its loss."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(config.get("seed", 0))
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(0, steps + 1, every):
            loss = 1.5 + 3 * math.exp(-step / steps * 20) + 0.02 * float(rng.normal())
            row = {
                "step": step,
                "tokens": 1024 * step,
                "train/loss": 99.0 if step == steps // 2 else loss,
                "lr": 0.01,
            }
            row |= {"grad_norm": 1.0, "tokens_per_s": 5e4, "skipped": 0.0, "step_time_s": 0.02}
            if step % (steps // 10) == 0:
                row |= {"val/loss": loss, "val/bpb": loss / 0.69}
            stream.write(json.dumps(row) + "\n")
    values = {"seed": 1, "train": {"total_steps": steps}, "model": {"vocab_size": 61}} | config
    (folder / "config.yaml").write_text(json.dumps(values))
    (folder / "env.json").write_text(json.dumps({"versions": {"jax": HOSTILE}, "devices": ["cpu 0"]}))
    samples = [{"step": step, "text": f"{HOSTILE}\n" + "ab " * 100} for step in (0, steps)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "events.jsonl").write_text(json.dumps({"step": steps // 3, "event": "resume"}) + "\n")
    return folder


def test_a_run_of_a_hundred_thousand_logged_steps_is_a_small_page_with_its_extremes(tmp_path):
    page = run_page(read_run(make_run(tmp_path / "long", 100_000)))
    assert len(page.encode()) < LIMIT_BYTES
    assert "99" in page.split('"name":"training"')[1][:8000], "the spike is lost"
    assert max(text.count(",") for text in page.split('"y":[')[1:]) > 100
    longest = max((part.split("]")[0].count(",") for part in page.split('"x":[')[1:]), default=0)
    assert longest < 400


def test_text_from_outside_is_text(tmp_path):
    run = read_run(make_run(tmp_path / "<img src=x onerror=alert(1)>"))
    page = run_page(run)
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{ 7*7 }}" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_compare_groups_seeds_and_says_what_differs(tmp_path, capsys):
    for seed in (1, 2, 3):
        make_run(tmp_path / "runs" / f"low-{seed}", seed=seed, optim={"peak_lr": 0.001})
    make_run(tmp_path / "runs" / "high", optim={"peak_lr": 0.01})
    (tmp_path / "other.csv").write_text("iter,val_loss,tokens\n0,4.5,0\n100,2.5,1000\n200,nan,2000\n")
    commands.compare([str(tmp_path / "runs"), str(tmp_path / "other.csv")], json=True)
    values = json.loads(capsys.readouterr().out)
    assert values["loss"] == "val/loss" and len(values["runs"]) == 5
    assert set(values["differing"]) == {"optim.peak_lr", "seed"}
    [several] = [group for group in values["groups"] if len(group["runs"]) == 3]
    finals = [row["final"] for row in values["runs"] if row["run"].startswith("low")]
    assert several["mean"] == pytest.approx(np.mean(finals)) and several["sd"] == pytest.approx(
        np.std(finals, ddof=1)
    )
    [other] = [row for row in values["runs"] if row["run"] == "other"]
    assert (other["final"], other["flops"], other["steps"]) == (2.5, None, 200)
    assert all(row["flops"] > 0 for row in values["runs"] if row["run"] != "other")


def write_rows(folder: Path, rows: list[dict], **config) -> Path:
    """A run's directory with these rows of metrics.jsonl and a config."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(json.dumps({"model": {"vocab_size": 61}} | config))
    return folder


def test_compare_takes_the_loss_that_most_runs_have_and_names_those_without(tmp_path, capsys):
    """A folder with a run that has no validation loss, other trainers' CSV files, and a table of something else."""
    write_rows(tmp_path / "ours", [{"step": 5, "train/loss": 1.0, "val/loss": 2.0}], train={"total_steps": 9})
    write_rows(tmp_path / "early", [{"step": 1, "train/loss": 0.5}])
    (tmp_path / "theirs.csv").write_text("iter,val_loss\n0,4.5\n5,2.5\n")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    commands.compare([str(tmp_path)])
    said, noted = capsys.readouterr()
    assert "The lowest validation loss is that of ours: 2.0000 nats per token." in said
    assert "Without a finite validation loss: early." in said and "5 of 9" in said and "theirs" in said
    assert "table.csv has columns a, b" in noted


def test_runs_of_one_seed_are_not_counted_as_seeds(tmp_path):
    rows = [{"step": 5, "val/loss": 2.0}]
    runs = find_runs([str(write_rows(tmp_path / name, rows, seed=1)) for name in "ab"])
    said = "\n".join(lines(compare(runs, [None, None])))
    assert "a, b: mean 2.0000, sd 0.0000 over 2 runs of 1 seed" in said


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ([{"step": 1, "step_time_s": 1.5}], [1.5]),
        (
            [{"step": 0}, {"step": 10, "step_time_s": 2.0}, {"step": 20}, {"step": 30, "step_time_s": 1.0}],
            [0, 20, 30, 40],
        ),
        ([{"step": 0, "seconds": 7.0}, {"step": 10, "seconds": 9.0}], [7, 9]),
        ([{"step": 0}, {"step": 10}], [NAN, NAN]),
    ],
)
def test_training_time_counts_every_step_once(rows, seconds):
    found = Run(Path("run"), Logged(rows)).seconds()
    assert np.allclose(found, seconds, equal_nan=True)


ODD = {
    "one step": [{"step": 1, "tokens": 8, "train/loss": 4.1, "lr": 0.001, "tokens_per_s": 9.0, "step_time_s": 1.5}],
    "step 0 only": [{"step": 0, "tokens": 0, "val/loss": 4.1, "val/bpb": 5.9}],
    "NaN": [{"step": step, "train/loss": NAN, "val/loss": NAN} for step in range(3)],
    "mixed keys": [
        {"step": 1, "train/loss": "nan", "lr": None, "<b>": 3},
        {"step": 2},
        {"step": 3.0, "train/loss": 2.0, "skipped": None, "tokens": None, "val/loss/$web$": 2.0, "train/router": 0.1},
    ],
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_run_has_a_page(case, tmp_path):
    run = read_run(write_rows(tmp_path / case, ODD[case]))
    page = run_page(run)
    texts = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", page))
    assert "0.2" not in texts.split(), "a step is a whole number"
    assert case != "mixed keys" or ("val/loss/$web$" in texts and "train/router" in texts)
    assert summary(run).endswith(".") and "nan" not in page.split("<main>")[1].split("Config")[0]


def test_a_run_that_is_being_written_has_a_page(tmp_path):
    folder = make_run(tmp_path / "live")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 201, "tok')
    assert "200 steps" in run_page(read_run(folder))


def test_what_is_no_run_is_one_line(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    for paths, said in (([tmp_path], "is neither a run"), ([tmp_path / "bad.csv"], "step and val_loss")):
        with pytest.raises(UserError, match=said):
            find_runs(list(map(str, paths)))
    with pytest.raises(UserError, match="holds no metrics"):
        read_run(tmp_path / "absent")


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    run = read_run(tmp_path)
    assert summary(run) == "The run has logged nothing yet."
    assert "nothing yet" in run_page(run)


# ---- in a browser


def test_a_runs_page_in_a_browser(browser, tmp_path):
    path = tmp_path / "run.html"
    path.write_text(run_page(read_run(make_run(tmp_path / ("name-of-80-characters-" * 4)))))
    check_in_browser(browser, path)
    alerted = browser.execute_script("return document.querySelectorAll('.sample script, h1 script').length")
    assert alerted == 0
    tip = browser.execute_script(
        "const f = document.querySelector('figure[data-hover]'); f.focus();"
        "for (let i = 0; i < 9; i++) f.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
        "return f.querySelector('.tip').textContent"
    )
    assert "training" in tip and "at " in tip


def test_a_comparisons_page_in_a_browser(browser, tmp_path):
    for i in range(4):
        make_run(tmp_path / "runs" / f"run-with-a-long-name-{i}", optim={"peak_lr": 0.001 * (i + 1)})
    write_rows(tmp_path / "runs" / "begun", [{"step": 1, "lr": 0.1}])
    runs = find_runs([str(tmp_path / "runs")])
    rates = [1e6] * len(runs)
    path = tmp_path / "compare.html"
    path.write_text(compare_page(runs, rates, compare(runs, rates), "gptjax compare runs"))
    check_in_browser(browser, path)
    for descending in (False, True):
        *order, last = browser.execute_script(
            "const t = document.querySelectorAll('table')[1]; t.querySelectorAll('thead button')[1].click();"
            "return [...t.tBodies[0].rows].map(r => Number(r.cells[1].dataset.value))"
        )
        assert order == sorted(order, reverse=descending) and len(order) == 4
        assert last is None, "a run without the loss is last, whatever the order"


# ---- studies and plans


def make_table(path: Path, n_budgets: int, n_sizes: int) -> Path:
    """A table of runs that follow a law with a little noise, with a hostile reason for the one that diverged."""
    rng = np.random.default_rng(0)
    lines = ["id,status,reason,loss,params,tokens,flops,seed,peak_lr,held_out"]
    for flops in np.geomspace(1e12, 1e15, n_budgets):
        best = 2e5 * (flops / 1e12) ** 0.5
        for params in np.geomspace(best / 6, best * 6, n_sizes):
            tokens = flops / 6 / params
            loss = (1.2 + 12 / params**0.3 + 60 / tokens**0.34) * math.exp(0.002 * rng.normal())
            name = f"{len(lines):012d}"
            lines.append(f"{name},done,,{loss},{params},{tokens},{flops},1,0.01,0")
    lines.append(f'x,diverged,"{HOSTILE.replace(chr(34), "")}",,1e6,1e6,6e12,1,0.01,0')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def study_page_of(path: Path, resamples: int) -> str:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install -e '.[scaling]'")
    from gptjax.apps.scaling.predict.doctor import CHECKS, diagnose
    from gptjax.apps.scaling.predict.forecast import fit_table
    from gptjax.apps.scaling.predict.report import study_page

    scores = [
        {"rung": HOSTILE, "status": "done", "forecast": 1.5, "interval": [1.4, 1.6], "loss": 1.55, "error": -0.03}
        | {"held": True, "before_the_run": True},
        {"rung": "later", "status": "not finished", "forecast": 1.4, "interval": [1.3, 1.5]},
    ]
    fitted = fit_table(path, resamples=resamples)
    return study_page(str(path.parent), path, fitted, diagnose(path)[0], list(CHECKS), scores)


def test_a_study_of_500_runs_is_a_small_page(tmp_path):
    page = study_page_of(make_table(tmp_path / "big" / "table.csv", 25, 20), resamples=10)
    assert len(page.encode()) < LIMIT_BYTES
    assert page.count('<th scope="row"') > 500
    assert "<script>alert" not in page


def test_a_studys_page_in_a_browser(browser, tmp_path):
    path = tmp_path / "study.html"
    path.write_text(study_page_of(make_table(tmp_path / "study" / "table.csv", 3, 7), resamples=20))
    check_in_browser(browser, path)


@pytest.mark.parametrize(("topology", "axes"), [("v5e:8x8", {"fsdp": 64}), ("v5p:4x4x8", {"fsdp": 32, "tensor": 4})])
def test_a_plans_page_shows_every_chip_once(topology, axes, tmp_path):
    cfg, chips = plan_of(topology, axes)
    placed = place_chips(cfg, chips)
    assert len({(chip.x, chip.y) for chip in placed}) == chips.n_chips == len(placed)
    assert len({chip.host for chip in placed}) == chips.n_chips // 4
    assert {chip.rows for chip in placed} == set(range(axes["fsdp"]))
    assert {chip.weights for chip in placed} == set(range(axes["fsdp"] * axes.get("tensor", 1)))


def test_a_plans_page_in_a_browser(browser, tmp_path):
    cfg, chips = plan_of("v5e:4x4", {"fsdp": 16})
    plan = planning.make_plan(cfg, chips, analytic=True) | {"config": HOSTILE, "overrides": {"mesh.fsdp": 16}}
    plan["suggestion"] = None
    tried = [Candidate("--mesh.fsdp 16", 1e9 * i, 0.1 * i, i == 2) for i in range(1, 6)]
    path = tmp_path / "plan.html"
    path.write_text(plan_page(plan, chips, place_chips(cfg, chips), tried, f"gptjax plan {HOSTILE}"))
    check_in_browser(browser, path)


def plan_of(topology: str, axes: dict[str, int]):
    """A config of GPT-2's smallest model with these mesh axes, and the topology."""
    train = {"batch_sequences": 64}
    cfg = config_from_dict({"model": {"vocab_size": 50257}, "mesh": {"data": 1, **axes}, "train": train})
    return planning.config_on_accelerators(cfg), parse_topology(topology)
