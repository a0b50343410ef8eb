"""Programs that are absent, that fail or that hang; and a machine without git."""

import json
import os
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script

import gptjax.shell.environment
from gptjax.shell.environment import ProgramError, git_commit, run_program
from gptjax.shell.files import changed_at, size_of


def program(folder: Path, name: str, body: str) -> None:
    """Write a shell script as the program `name` into a folder for PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


# A child of the shell holds its pipes open, as credential helpers and hooks of git do.
HANGS = "/bin/sleep 3600 & /bin/sleep 3600"
STATES = {
    "absent": (None, "cannot run tool: No such file or directory"),
    "not executable": ("not a script", "cannot run tool: Permission denied"),
    "failing": ("echo 'fatal: no' >&2; exit 128", "tool failed with code 128: fatal: no"),
    "silent": ("exit 3", "tool failed with code 3: without a message"),
    "slow": (HANGS, r"tool did not end within 1 s and was killed"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_program_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, state):
    body, message = STATES[state]
    if body is not None:
        program(tmp_path / "bin", "tool", body)
    if state == "not executable":
        (tmp_path / "bin" / "tool").chmod(0o644)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ProgramError, match=message):
        run_program(["tool"], timeout_s=1 if state == "slow" else 60)


def test_a_killed_program_leaves_no_children(tmp_path, monkeypatch):
    program(tmp_path, "tool", f"echo $$ > {tmp_path}/group; {HANGS}")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ProgramError, match="killed"):
        run_program(["tool"], timeout_s=1)
    group = int((tmp_path / "group").read_text())
    deadline = time.monotonic() + 30
    while _alive(group) and time.monotonic() < deadline:  # the kernel reaps them a moment later
        time.sleep(0.01)
    assert not _alive(group)


def _alive(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, leader = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(leader) == group and state != "Z":
            return True
    return False


def test_a_program_gets_no_input_and_its_output_is_returned(tmp_path):
    assert run_program(["cat"], timeout_s=60) == ""
    assert run_program(["printf", r" caf\351 \n"], timeout_s=60) == "caf�"
    assert run_program(["pwd"], timeout_s=60, cwd=tmp_path) == str(tmp_path)


@pytest.mark.parametrize("body", [None, "exit 128", HANGS, "true"], ids=["absent", "failing", "slow", "silent"])
def test_the_commit_is_none_without_a_git_that_answers(tmp_path, monkeypatch, body):
    if body is not None:
        program(tmp_path / "bin", "git", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if body == HANGS:
        monkeypatch.setattr(gptjax.shell.environment, "GIT_TIMEOUT_S", 0.5)
    assert git_commit() is None


def test_a_machine_without_git_trains(tmp_path, tiny_run):
    (tmp_path / "empty").mkdir()
    flags = ["--train.total_steps=1", f"--workdir={tmp_path / 'run'}"]
    done = run_script(*tiny_run, *flags, PATH=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/env.json").read_text())["git_commit"] is None


def test_files_of_an_owner_without_a_name_have_sizes_and_times(tmp_path, monkeypatch):
    """In a container the user often has a number alone."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert size_of(path) == size_of(str(path)) == 5
    assert changed_at(path) == int(path.stat().st_mtime)
    found = [file for file in ROOT.glob("gptjax/**/*.py") if ".stat().length" in file.read_text()]
    assert found == [ROOT / "gptjax/shell/files.py"]
