"""A study from its file to its table: strict keys, exact rungs, killed runs, and results that are refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_script

pytest.importorskip("scipy", reason="scipy is not installed: pip install -e '.[scaling]'")

from gptjax.apps.scaling.emit import gke, slurm
from gptjax.apps.scaling.ladder import Rung, describe_plan, groups, key_of, make_rungs, steps_to_take, warnings
from gptjax.apps.scaling.laws.table import read_table
from gptjax.apps.scaling.probe import seconds_per_step
from gptjax.apps.scaling.runner import collect, missing_forecasts, read_result, rung_dir, state_of
from gptjax.apps.scaling.study import load_study
from gptjax.errors import UserError
from gptjax.nn.transformer import flops_per_token

LADDER = [{"n_layers": 1, "d_model": 16 * n, "n_heads": 2} for n in (1, 2, 3)]


@pytest.fixture
def make_study(tmp_path, corpus_file, token_cache):
    """Write a study of tiny models, changed by keyword, and return its directory."""

    def make(name: str = "study", run: dict | None = None, **changes) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        config = {
            "data": {"path": str(corpus_file), "tokenizer": "byte", "cache_dir": str(token_cache)},
            "model": {**LADDER[0], "context_length": 32, "positions": "rope", "bias": False},
            "train": {"batch_sequences": 4, "eval_sequences": 8, "log_interval_steps": 1},
            "checkpoint": {"save_interval_steps": 20},
            "optim": {"peak_lr": 0.003},
            **(run or {}),
        }
        study = {"base": "base.yaml", "ladder": LADDER, "budgets": {"flops": [1e9, 1e10]}, "warmup_frac": 0.05}
        (directory / "base.yaml").write_text(yaml.safe_dump(config))
        (directory / "study.yaml").write_text(yaml.safe_dump(study | changes))
        return directory

    return make


def rungs_of(directory: Path) -> list[Rung]:
    return make_rungs(load_study(directory))


# ---- the file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"laddder": []}, "unknown key 'laddder'; did you mean 'ladder'"),
        ({"budgets": {"flop": [1e9]}}, "unknown key 'budgets.flop'; did you mean 'flops'"),
        ({"ladder": [{"n_layers": 1, "d_modle": 16, "n_heads": 2}]}, "unknown key 'ladder.d_modle'"),
        (
            {"budgets": {"flops": [1e9], "held_out": [{"flops": 1e9, "shape": {"n_layer": 1}}]}},
            "unknown key 'budgets.held_out.shape.n_layer'",
        ),
        ({"budgets": {}}, "budgets are empty"),
        ({"budgets": {"flops": [-1.0]}}, "budgets.flops -1.0 must be positive"),
        ({"budgets": {"flops": [float("inf")]}}, "budgets.flops inf must be positive and finite"),
        ({"flops_per_s": 0}, "flops_per_s 0.0 must be positive"),
        (
            {"budgets": {"flops": [1e9], "held_out": [{"flops": -1.0, "shape": LADDER[0]}]}},
            "budgets.held_out.flops -1.0 must be positive",
        ),
        ({"budgets": {"flops": ["many"]}}, "study.yaml"),
        ({"warmup_frac": 1.5}, "warmup_frac 1.5"),
        ({"ladder": []}, "ladder is empty"),
        ({"base": "none.yaml"}, "cannot read config file"),
        ({"ladder": [LADDER[0], LADDER[0]]}, "two rungs are the same"),
        ({"ladder": [{"n_layers": 1, "d_model": 16, "n_heads": 3}]}, "does not divide model.d_model 16"),
    ],
)
def test_a_study_file_that_cannot_be_is_refused(make_study, changes, said):
    with pytest.raises(UserError) as error:
        rungs_of(make_study(**changes))
    assert said in str(error.value)


def test_rungs_spend_their_budgets_in_whole_steps(make_study):
    rungs = rungs_of(make_study(sweeps={"peak_lr": [0.001, 0.01], "seeds": [1, 2]}))
    assert len(rungs) == 3 * 2 * 2 * 2
    assert [rung.flops for rung in rungs] == sorted(rung.flops for rung in rungs)
    assert len({rung.id for rung in rungs}) == len(rungs)
    for rung in rungs:
        step = flops_per_token(rung.config.model) * 4 * 32
        assert rung.flops == rung.config.train.total_steps * step
        assert abs(rung.flops - rung.budget_flops) <= step / 2
        assert rung.tokens == rung.config.train.total_steps * 4 * 32
        assert rung.config.optim.warmup_steps == round(0.05 * rung.config.train.total_steps)
        m = rung.config.model
        by_hand = 12 * m.d_model**2 + 2 * m.d_model  # attention 4 D^2, MLP 8 D^2, two norms; 256 bytes and an end
        assert rung.params == {
            "blocks": by_hand,
            "matmul": by_hand + 257 * m.d_model,
            "total": by_hand + 257 * m.d_model + m.d_model,  # the tied embedding once, and the last norm
        }


def test_budgets_by_ratio_and_by_tokens(make_study):
    by_ratio = rungs_of(make_study(budgets={"tokens_per_param": [20]}))
    assert all(rung.tokens / rung.params["matmul"] == pytest.approx(20, rel=0.01) for rung in by_ratio)
    by_tokens = rungs_of(make_study(budgets={"tokens": [64000]}))
    assert all(rung.tokens == 64000 for rung in by_tokens)


def test_an_id_follows_what_decides_the_result_and_nothing_else(make_study, corpus_file, tmp_path):
    ids = {rung.id for rung in rungs_of(make_study())}
    moved = tmp_path / "moved" / corpus_file.name
    moved.parent.mkdir()
    moved.write_bytes(corpus_file.read_bytes())
    data = {"path": str(moved), "tokenizer": "byte", "cache_dir": str(tmp_path / "elsewhere")}
    carried_out_otherwise = {"data": data, "checkpoint": {"save_interval_steps": 7}, "mesh": {"data": 1}}
    assert {rung.id for rung in rungs_of(make_study("a", carried_out_otherwise))} == ids
    moved.write_bytes(corpus_file.read_bytes() + b"one more line")
    for base in ({"data": data}, {"optim": {"peak_lr": 0.004}}, {"seed": 3}):
        assert not ids & {rung.id for rung in rungs_of(make_study("b", base))}


def test_what_would_spoil_the_law_is_said_beforehand(make_study):
    directory = make_study(budgets={"flops": [1e9, 2e9]}, warmup_frac=0.3, limits={"epochs": 0.1})
    said = "\n".join(warnings(load_study(directory), rungs_of(directory)))
    for piece in ("steps are few", "warm-up takes 30% of", "epochs; repeated data", "less than a decade"):
        assert piece in said
    assert "do not straddle the usual 20; add smaller shapes" in said


def test_a_study_beyond_its_limit_is_refused(make_study):
    directory = make_study(limits={"total_flops": 2e10}, flops_per_s=1e9, usd_per_hour=3600)
    with pytest.raises(UserError, match=r"over limits\.total_flops"):
        describe_plan(load_study(directory), rungs_of(directory))
    allowed = make_study(limits={"total_flops": 4e10}, flops_per_s=1e9, usd_per_hour=3600)
    values, _ = describe_plan(load_study(allowed), rungs_of(allowed))
    assert values["usd"] == pytest.approx(33, rel=0.05)  # 33e9 FLOPs at one USD for 1e9


# ---- results


def finish(directory: Path, rungs: list[Rung], **changes) -> None:
    """Write results as a run leaves them."""
    for number, rung in enumerate(rungs):
        result = {
            "id": rung.id,
            "status": "done",
            "reason": "",
            "loss": 3.0 + 0.01 * number,
            "params": rung.params["matmul"],
            "tokens": rung.tokens,
            "flops": rung.flops,
            "held_out": int(rung.held_out),
            "n_layers": 1,
            "d_model": rung.config.model.d_model,
            "fingerprint": rung.fingerprint,
        }
        path = rung_dir(directory, rung.id)
        path.mkdir(parents=True, exist_ok=True)
        (path / "result.json").write_text(json.dumps(result | changes))


def test_no_fit_reads_held_out_or_diverged_rungs(make_study):
    held = {"flops": 1e11, "shape": {"n_layers": 1, "d_model": 64, "n_heads": 2}}
    directory = make_study(budgets={"flops": [1e9, 1e10], "held_out": [held]})
    rungs = rungs_of(directory)
    assert [rung.held_out for rung in rungs] == [False] * 6 + [True]
    finish(directory, rungs)
    finish(directory, rungs[:1], status="diverged", loss=None)
    assert len(collect(directory, rungs)) == 7
    table = read_table(directory / "table.csv")
    assert list(table.flops) == [rung.flops for rung in rungs[1:6]]
    assert len((directory / "table.csv").read_text().splitlines()) == 8  # recorded all the same


def test_results_that_do_not_belong_together_are_refused(make_study):
    directory = make_study()
    rungs = rungs_of(directory)
    with pytest.raises(UserError, match="no finished rung yet"):
        collect(directory, rungs)

    finish(directory, rungs)
    finish(directory, rungs[:1], fingerprint="other")
    with pytest.raises(UserError, match="trained on different data"):
        collect(directory, rungs)

    finish(directory, rungs)
    finish(directory, rungs[:1], loss=float("nan"))
    with pytest.raises(UserError, match="has loss nan"):
        collect(directory, rungs)

    finish(directory, rungs)
    with pytest.raises(UserError, match=r"changed under finished rung .*; change it back"):
        collect(directory, rungs_of(make_study(warmup_frac=0.1)))

    copied = rung_dir(directory, "copied")
    copied.mkdir()
    (copied / "result.json").write_bytes((rung_dir(directory, rungs[0].id) / "result.json").read_bytes())
    with pytest.raises(UserError, match=f"copy of rung {rungs[0].id}"):
        collect(directory, rungs)


def test_what_a_finished_rung_is_for_is_the_present_studys_to_say(make_study):
    """Held out after its run: the id is the same, and no fit may read it any more."""
    directory = make_study(budgets={"flops": [1e9, 1e10]})
    rungs = rungs_of(directory)
    finish(directory, rungs)
    held = [{"flops": flops, "shape": LADDER[2]} for flops in (1e9, 1e10)]
    later = rungs_of(make_study(ladder=LADDER[:2], budgets={"flops": [1e9, 1e10], "held_out": held}))
    assert {rung.id for rung in later} == {rung.id for rung in rungs}
    collect(directory, later)
    assert len(read_table(directory / "table.csv")) == 4


def test_a_result_that_was_cut_short_is_named(make_study):
    directory = make_study()
    rungs = rungs_of(directory)
    finish(directory, rungs)
    path = rung_dir(directory, rungs[0].id) / "result.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(UserError, match=r"cannot read .*result.json"):
        collect(directory, rungs)


def test_a_fit_refuses_a_table_that_lacks_results(make_study):
    directory = make_study()
    finish(directory, rungs_of(directory))
    result = run_script("-m", "gptjax", "scaling", "fit", "--study", directory)
    assert result.returncode == 2
    assert "lacks the newest results; gptjax scaling collect" in result.stderr


# ---- whole studies


@pytest.mark.slow
def test_a_study_killed_and_started_again_gives_the_same_results(make_study):
    """Two rungs, one of which diverges; one study straight through, the other stopped in the midst."""
    changes = {"ladder": LADDER[:1], "budgets": {"tokens": [12800]}, "sweeps": {"peak_lr": [0.003, 1e30]}}
    straight, killed = make_study("straight", **changes), make_study("killed", **changes)
    done = run_script("-m", "gptjax", "scaling", "run", straight)
    assert done.returncode == 0, done.stdout + done.stderr

    rungs = rungs_of(killed)
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gptjax", "scaling", "run", str(killed)]
    running = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not any(begun(killed, rung) for rung in rungs):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)  # handed on to the rung, which saves
    assert running.wait(timeout=200) == 75
    assert not all(read_result(killed, rung.id) for rung in rungs)

    again = run_script("-m", "gptjax", "scaling", "run", killed)
    assert again.returncode == 0, again.stdout + again.stderr
    assert any("resuming after step" in (rung_dir(killed, rung.id) / "log.txt").read_text() for rung in rungs)
    states = {rung.config.optim.peak_lr: state_of(killed, rung) for rung in rungs}
    assert states == {0.003: "done", 1e30: "diverged"}
    for rung in rungs:
        one, other = read_result(straight, rung.id), read_result(killed, rung.id)
        timed = {"wall_s": 0, "began_at": ""}
        assert {**one, **timed} == {**other, **timed}
    assert len(read_table(killed / "table.csv")) == 1


def test_a_rung_that_failed_for_another_reason_than_its_loss_has_no_result(make_study):
    directory = make_study(ladder=LADDER[:1], budgets={"tokens": [12800]})
    [rung] = rungs_of(directory)
    spoilt = rung_dir(directory, rung.id)
    (spoilt / "checkpoints" / "5").mkdir(parents=True)
    (spoilt / "metrics.jsonl").write_text('{"step": 0, "val/loss": 5.5}\n{"step": 5, "train/loss": 5.0}\n')
    result = run_script("-m", "gptjax", "scaling", "run", directory)
    assert result.returncode == 1
    assert "failed (2): error: all checkpoints in" in result.stdout
    assert read_result(directory, rung.id) is None


def begun(directory: Path, rung: Rung) -> bool:
    state = state_of(directory, rung)
    return state.startswith("step") and int(state.split()[1]) >= 5


# ---- branches, forecasts before runs, and batch systems


def test_branches_spare_the_flat_part_and_have_the_ids_of_whole_runs(make_study):
    base = {"optim": {"peak_lr": 0.003, "schedule": "wsd", "decay_frac": 0.25}}
    changes = {"ladder": LADDER[:1], "budgets": {"tokens": [12800, 25600, 51200]}, "warmup_frac": None}
    whole, branched = make_study("whole", base, **changes), make_study("branched", base, branches=True, **changes)
    rungs, study = rungs_of(branched), load_study(branched)
    assert [r.id for r in rungs] == [r.id for r in rungs_of(whole)]
    assert [r.cooldown_step for r in rungs] == [75, 150, 300]
    assert [steps_to_take(study, r, rungs) for r in rungs] == [100, 200 - 75, 400 - 150]
    assert "branches spare 32% of these FLOPs" in describe_plan(study, rungs)[1]


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        ({"optim": {"schedule": "wsd"}}, {}, "drop warmup_frac"),
        ({}, {"warmup_frac": None}, "branches need optim.schedule wsd"),
    ],
)
def test_branches_that_cannot_be_are_refused(make_study, base, changes, said):
    with pytest.raises(UserError, match=said):
        rungs_of(make_study(run=base, branches=True, **changes))


HELD = {"flops": 1e11, "shape": {"n_layers": 1, "d_model": 64, "n_heads": 2}}


def test_a_held_out_rung_waits_for_its_forecast(make_study):
    directory = make_study(budgets={"flops": [1e9, 1e10], "held_out": [HELD]})
    *_, held = rungs_of(directory)
    assert missing_forecasts(directory, rungs_of(directory)) == [held]
    refused = run_script("-m", "gptjax", "scaling", "run", directory, "--rung", held.id)
    assert refused.returncode == 2
    assert "is held out: gptjax scaling forecast" in refused.stderr
    (directory / "forecasts").mkdir()
    (directory / "forecasts" / f"{held.id}.json").write_text("{}")
    assert missing_forecasts(directory, rungs_of(directory)) == []


def test_a_job_array_runs_every_rung_once(make_study, tmp_path):
    """Each task of either batch system, by a shell, with a stand-in for the command."""
    study = make_study()
    ids = [rung.id for rung in rungs_of(study)]
    # A rung has no peers: of those in its environment it must not know.
    (tmp_path / "gptjax").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n[ -z "$JOB_COMPLETION_INDEX" ] && exit 75\n'
    )
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    for name in ("gptjax", "scontrol"):
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7"}
    job = yaml.safe_load(gke(str(study), ids))
    assert job["spec"]["completions"] == len(ids) and job["spec"]["completionMode"] == "Indexed"
    [container] = job["spec"]["template"]["spec"]["containers"]
    base = Path(load_study(study).base).resolve()
    assert base.is_relative_to(container["volumeMounts"][0]["mountPath"])
    for number in range(len(ids)):
        task = env | {"SLURM_ARRAY_TASK_ID": str(number)}
        assert subprocess.run(["bash", "-c", slurm("study", ids)], env=task, check=False).returncode == 75
        command, pod = container["command"], env | {"JOB_COMPLETION_INDEX": str(number)}
        assert subprocess.run(command, env=pod, check=False).returncode == 75
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split()[-1] for line in said] == [i for i in ids for _ in range(2)]
    assert (tmp_path / "requeued").read_text().split()[1::2] == [f"7_{n}" for n in range(len(ids))]


@pytest.mark.slow
def test_the_probe_measures_each_shape(make_study):
    directory = make_study(run={"train": {"batch_sequences": 8}})
    rungs = rungs_of(directory)
    seconds = seconds_per_step(rungs)
    assert set(seconds) == {key_of(rung.config) for rung in rungs}
    values, lines = describe_plan(load_study(directory), rungs, dict.fromkeys(seconds, 2.0))
    assert values["hours"] == sum(rung.config.train.total_steps for rung in rungs) * 2 / 3600
    assert any("by the probe" in line for line in lines)


def test_weights_by_group_add_up(make_study):
    model = {**LADDER[0], "context_length": 32, "positions": "learned", "tie_embeddings": False}
    rung = rungs_of(make_study(run={"model": model}))[0]
    assert sum(groups(rung.config.model).values()) == rung.params["total"]
    assert groups(rung.config.model)["position"] == 32 * 16


@pytest.mark.slow
def test_a_branch_ends_in_the_bits_of_a_whole_run(make_study):
    base = {"optim": {"peak_lr": 0.003, "schedule": "wsd", "decay_frac": 0.25}}
    changes = {"ladder": LADDER[:1], "budgets": {"tokens": [12800, 25600]}, "warmup_frac": None}
    whole, branched = make_study("whole", base, **changes), make_study("branched", base, branches=True, **changes)
    for directory in (whole, branched):
        assert run_script("-m", "gptjax", "scaling", "run", directory).returncode == 0
    rungs = rungs_of(branched)
    assert "resuming after step 75" in (rung_dir(branched, rungs[1].id) / "log.txt").read_text()
    losses = [[read_result(d, rung.id)["loss"] for rung in rungs] for d in (whole, branched)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["isoflop", "branches", "batch"])
def test_a_study_of_an_earlier_version_keeps_its_rungs(name):
    """Their results were written at format 1 of the config and before CACHE_FORMAT 3 of the corpus."""
    with (ROOT / "studies" / name / "table.csv").open() as table:
        finished = {row["id"] for row in csv.DictReader(table)}
    assert finished and finished <= {rung.id for rung in make_rungs(load_study(ROOT / "studies" / name))}
