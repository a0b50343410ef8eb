"""Preparations that are killed at any point of their bookkeeping go on to the same bytes."""

import shutil

import pytest
from test_prepare import contents, made, some_texts, write_jsonl

from gptjax.apps.data_prep import prepare


class Killed(BaseException):
    """What no handler of errors catches, like SIGKILL."""


def test_a_preparation_that_is_killed_before_any_write_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """Before each file that is written whole (tokenizer, plan, markers, manifest), one kill after the other."""
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(60))
    made(tmp_path / "straight", source)

    write, left = prepare.write_atomically, [0]

    def counted(path, data):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        write(path, data)

    monkeypatch.setattr(prepare, "write_atomically", counted)
    for number in (1, 2, 3, 4):
        left[0] = number
        with pytest.raises(Killed):
            made(tmp_path / f"killed{number}", source)
        assert not (tmp_path / f"killed{number}" / "manifest.json").exists()
        made(tmp_path / f"killed{number}", source)
        assert contents(tmp_path / f"killed{number}") == contents(tmp_path / "straight")


def test_units_of_other_options_do_not_survive_a_kill_while_they_are_removed(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(60))
    made(tmp_path / "straight", source)

    def stop(*_):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(prepare, "commit", stop)
        made(tmp_path / "killed", source)
    for tokens in (tmp_path / "killed/work").glob("unit-*.tokens"):
        tokens.unlink()  # what the removal had come to
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(shutil, "rmtree", stop)
        made(tmp_path / "killed", source, val_frac=0.2)
    made(tmp_path / "killed", source)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
