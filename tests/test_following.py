"""A run that follows a folder: new data enter at an evaluation, with the batches of a mixture known in advance."""

import dataclasses
import json
import shutil

import pytest
from conftest import TINY_RUN
from test_train_data import prepared  # noqa: F401, a fixture

from gptjax.checkpoint import Checkpoints
from gptjax.config import MixtureSource
from gptjax.configfile import config_from_dict, load_config
from gptjax.errors import DONE, UserError
from gptjax.hooks import Hook
from gptjax.lifecycle.following import train_and_follow, with_arrivals
from gptjax.trainer import train


class Arrive(Hook):
    """Put a folder in its place before a step."""

    def __init__(self, step: int, source, place):
        self.step, self.source, self.place = step, source, place

    def before_step(self, step: int) -> None:
        if step == self.step and not self.place.exists():
            shutil.copytree(self.source, self.place)


class Killed(Exception):
    pass


class Kill(Hook):
    def __init__(self, step: int):
        self.step = step

    def before_step(self, step: int) -> None:
        if step == self.step:
            raise Killed


def rows_of(workdir) -> list[dict]:
    names = ("step", "train/loss", "val/loss", "val/loss/one", "val/loss/two", "grad_norm")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: row.get(name) for name in names} for row in map(json.loads, lines)]


@pytest.mark.whole
def test_new_folders_are_read_from_the_next_evaluation_on_and_a_killed_run_reads_the_same(
    prepared,  # noqa: F811
    tmp_path,
    no_closing_sample,
    capfd,
):
    def config(workdir: str, *flags: str):
        return load_config([*TINY_RUN, "--train.total_steps=15", f"--workdir={tmp_path / workdir}", *flags])

    stream = tmp_path / "stream"
    shutil.copytree(prepared["one"], stream / "one")
    (stream / "unfinished").mkdir()
    cfg = config("run", f"--follow={stream}", "--data.replay=0.25")
    with pytest.raises(Killed):
        train_and_follow(cfg, [Arrive(7, prepared["two"], stream / "two"), Kill(13)])
    said = capfd.readouterr()
    assert "all but" not in said.out and "training continues with the new two" in said.out
    assert "new data from step 10 on: two" in said.err
    assert train_and_follow(cfg) == DONE
    rows = rows_of(tmp_path / "run")
    assert [row["val/loss/two"] is not None for row in rows if row["val/loss"]] == [False, False, False, True]

    # The same as with a mixture that is known from the start.
    sources = [
        {"path": str(stream / "one"), "weight": 1, "weight_from": {"10": 0.25}},
        {"path": str(stream / "two"), "weight": 0, "weight_from": {"10": 0.75}},
    ]
    assert train(config("known", f"--data.mixture={json.dumps(sources)}")) == DONE
    for row, known in zip(rows, rows_of(tmp_path / "known"), strict=True):
        assert row["train/loss"] == known["train/loss"]
        assert row["val/loss"] == known["val/loss"]

    # Its own config resumes it, and what it was trained on must stay what it was.
    again = load_config([str(tmp_path / "run" / "config.yaml"), "--train.total_steps=16"])
    assert again.follow == str(stream) and len(again.data.mixture) == 2
    assert train_and_follow(again) == DONE
    shutil.rmtree(stream / "one")
    with pytest.raises(UserError, match="lacks one, on which the run was trained; put it back"):
        train_and_follow(again)
    shutil.copytree(prepared["two"], stream / "one")
    with pytest.raises(UserError, match="the corpus is not the one that this run was trained on"):
        train_and_follow(dataclasses.replace(again, train=dataclasses.replace(again.train, total_steps=17)))
    assert max(Checkpoints(str(tmp_path / "run")).steps()) == 16


def test_shares_of_folders_as_they_arrive():
    cfg = config_from_dict({"workdir": "w", "follow": "s", "data": {"replay": 0.4}})
    begun = with_arrivals((), ["a", "b"], 0, cfg)
    assert begun == (MixtureSource("s/a", 1.0), MixtureSource("s/b", 1.0))
    assert with_arrivals(begun, ["a", "b"], 7, cfg) == begun
    grown = with_arrivals(begun, ["a", "b", "c", "d"], 7, cfg)
    assert [source.weight_at(6) for source in grown] == [1, 1, 0, 0]
    assert [source.weight_at(7) for source in grown] == pytest.approx([0.2, 0.2, 0.3, 0.3])
    later = with_arrivals(grown, ["a", "b", "c", "d", "e"], 9, cfg)
    assert [source.weight_at(8) for source in later] == pytest.approx([0.2, 0.2, 0.3, 0.3, 0])
    assert [source.weight_at(9) for source in later] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])
    with pytest.raises(UserError, match="holds no folder of prepared data yet; write one: gptjax data prepare"):
        with_arrivals((), [], 0, cfg)
    mixed = config_from_dict({"follow": "s", "data": {"mixture": [{"path": "x", "weight": 1}]}})
    with pytest.raises(UserError, match=r"follow s and data.mixture \(x\) exclude each other"):
        with_arrivals((), ["a"], 0, mixed)
