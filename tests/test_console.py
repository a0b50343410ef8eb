"""Standard streams of any encoding whose reader may leave, the bounded report of an error, and the end of a run."""

import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_script

from gptjax.errors import UserError
from gptjax.lifecycle import closing
from gptjax.lifecycle.report import attempt
from gptjax.metrics import TensorBoard, plot_loss
from gptjax.shell.console import (
    LONGEST_REASON,
    Output,
    continue_without_output,
    describe_failure,
    one_line,
    report_user_errors,
    writes_unicode,
)

SPEAK = """
import sys
from gptjax.shell.console import continue_without_output, report_user_errors
@report_user_errors
def main(kind):
    if kind == "train":
        continue_without_output()
    for n in range(20000):
        print("line", n, "caf\\u00e9")
    print("done", file=sys.stderr)
    return 7 if kind == "train" else 0
sys.exit(main(sys.argv[1]))
"""


def speak(kind: str, **how) -> subprocess.CompletedProcess:
    """A command that prints 20,000 lines and ends."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **how.pop("env", {})}
    return subprocess.run([sys.executable, "-c", SPEAK, kind], env=env, stderr=subprocess.PIPE, check=False, **how)


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16"])
def test_any_encoding_of_the_terminal_will_do(encoding):
    done = speak("sample", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr.decode(encoding).split()) == (0, ["done"])
    assert done.stdout.decode(encoding).splitlines()[-1] == f"line 19999 caf{'?' if encoding == 'ascii' else 'é'}"


def test_a_reader_that_leaves_ends_a_command_quietly_and_a_training_not_at_all():
    done = speak("sample", stdout=closed_pipe())
    assert (done.returncode, done.stderr) == (0, b"")
    done = speak("train", stdout=closed_pipe())
    assert (done.returncode, done.stderr) == (7, b"done\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_output_is_one_line_and_ends_no_training():
    with open("/dev/full", "wb") as full:
        done = speak("sample", stdout=full)
        assert done.returncode == 2 and done.stderr.startswith(b"error: cannot write to standard output: No space")
        assert done.stderr.count(b"\n") == 1
        assert speak("train", stdout=full).returncode == 7


def test_closed_streams_are_no_error():
    for command in ("exec 1>&-", "exec 2>&-", "exec 0<&- 1>&- 2>&-"):
        script = f'{command}; exec "$0" -c "$1" train'
        done = subprocess.run(
            ["bash", "-c", script, sys.executable, SPEAK],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 7, command


def test_what_the_output_can_print_is_known(monkeypatch):
    for encoding, expected in (("ascii", False), ("cp1252", False), ("UTF-8", True), ("utf8", True)):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert writes_unicode() is expected


# ---------------------------------------------------------------------------------------------------------------
# Errors


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as found:
        return found


def test_a_full_disk_is_one_line_however_deep_it_lies():
    full = raised(OSError(errno.ENOSPC, "No space left on device", "/w/x"))
    wrapped = RuntimeError("5 of 9 tasks failed" + "\n  task" * 1000)
    wrapped.__cause__ = ExceptionGroup("saving", [full])
    context = RuntimeError("while saving")
    context.__context__ = full
    as_text = ValueError(
        "RESOURCE_EXHAUSTED: writing /w/y: No space left on device [source locations='a.cc:1']\n" * 50
    )
    for error in (full, wrapped, context, as_text):
        code, said = describe_failure(raised(error))
        assert code == 2 and "\n" not in said and "No space left on device; make room" in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOENT, errno.ENOTDIR])
def test_a_file_that_cannot_be_used_is_one_line(number):
    code, said = describe_failure(raised(OSError(number, os.strerror(number), "/w/x")))
    assert (code, said.count("\n")) == (2, 0) and "/w/x" in said and os.strerror(number) in said


def test_any_other_exception_is_its_first_cause_and_where_the_whole_trace_lies(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = raised(ValueError("the cause " + "x" * 10_000))
    outer = RuntimeError("what came of it")
    outer.__cause__ = first
    code, said = describe_failure(raised(outer))
    lines = said.splitlines()
    assert code == 1 and len(lines) < 12 and max(map(len, lines)) < LONGEST_REASON + 200
    assert lines[0].startswith("error: ValueError: the cause") and "test_console.py" in said
    trace = Path(lines[-1].rpartition(" ")[2]).read_text()
    assert "what came of it" in trace and "x" * 10_000 in trace


def test_a_thread_that_fails_is_one_line(capsys):
    @report_user_errors
    def main():
        def fail():
            raise ValueError("a reason\n" * 999)

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return 7

    assert main() == 7
    said = capsys.readouterr().err
    assert (
        said.startswith("note: a thread ended by ValueError: a reason") and said.count("\n") == 1 and len(said) < 400
    )


def test_work_that_a_failure_leaves_behind_says_nothing():
    """An event loop that ends with an error keeps coroutines, which Python complains of as it exits."""
    code = """
import sys
from gptjax.shell.console import report_user_errors
async def write(): pass
sys.kept = write()
@report_user_errors
def main(): raise OSError(28, "No space left on device")
main()
"""
    done = run_script("-c", code)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_an_interrupt_while_a_program_is_compiled_is_no_crash():
    """jaxlib 0.10 ended with a segmentation fault when it destroyed what it had compiled."""
    code = """
import os, signal, threading
import jax
from gptjax.shell.console import report_user_errors
def f(x):
    for _ in range(100):
        x = jax.nn.softmax(x @ x)
    return x.sum()
@report_user_errors
def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    lowered = jax.jit(jax.grad(f)).lower(jax.numpy.ones((32, 32)))
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    lowered.compile()
main()
"""
    done = run_script("-c", code)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_endless_recursion_is_bounded(capsys):
    @report_user_errors
    def main():
        return main.__wrapped__()

    with pytest.raises(SystemExit, match="1"):
        main()
    assert len(capsys.readouterr().err.splitlines()) < 12


def test_a_message_of_several_lines_becomes_one(capsys):
    @report_user_errors
    def main():
        raise UserError("one\n  two\r\n\u2028three " + "y" * 9000)

    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("error: one two three yy") and said.count("\n") == 1 and len(said) < 2100
    assert one_line("two  spaces  in a path") == "two  spaces  in a path"


# ---------------------------------------------------------------------------------------------------------------
# The end of a run


def test_a_closing_report_never_raises(tmp_path, capsys, monkeypatch):
    def sample(*_):
        raise IndexError("string index out of range")

    monkeypatch.setattr(closing, "_say_sample", sample)
    report = SimpleNamespace(speaks=True, say=print)
    for name, content in {
        "none": None,
        "damaged": '{"step": 1\n{}\n',
        "null": '{"step": 1, "train/loss": null}\n',
    }.items():
        workdir = tmp_path / f"{name} $x_$ 'a'"
        workdir.mkdir()
        if content is not None:
            (workdir / "metrics.jsonl").write_text(content)
        t = SimpleNamespace(cfg=SimpleNamespace(workdir=str(workdir), train=SimpleNamespace(total_steps=4)))
        closing.conclude(t, None, None, report)
        said = capsys.readouterr()
        assert "note: reading the final losses failed" in said.err and "note: sampling failed (IndexError" in said.err
        assert "python sample.py" in said.out


def test_what_a_run_can_do_without_is_attempted_once(capsys):
    attempt("closing a tracker", lambda: 1 / 0)
    assert capsys.readouterr().err.startswith("note: closing a tracker failed (ZeroDivisionError: division by zero);")


@pytest.mark.parametrize("name", ["$x_$", "a$b", "\\frac", "日本", "_", "100%"])
def test_the_loss_is_drawn_whatever_the_run_is_called(tmp_path, name):
    pytest.importorskip("matplotlib")
    workdir = tmp_path / name
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "train/loss": 2.0, "val/loss": NaN}\n')
    plot_loss(str(workdir))
    assert (workdir / "loss.png").stat().st_size > 1000


@pytest.mark.whole
def test_a_run_ends_with_0_in_a_strange_directory_on_an_ascii_terminal(whole_run, tmp_path):
    text = tmp_path / "café.txt"
    text.write_text("é è ê ü ß 日本 " * 2000, encoding="utf-8")
    workdir = tmp_path / "it's $x_$ é"
    (workdir / "loss.png").mkdir(parents=True)
    args = [
        *whole_run,
        f"--workdir={workdir}",
        "--train.total_steps=4",
        f"--data.path={text}",
        "--model.vocab_size=512",
    ]
    done = run_script(*args, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "note: drawing loss.png failed" in done.stderr and "Traceback" not in done.stderr
    assert "done: 4 steps" in done.stdout and "--prompt '...'" in done.stdout


LIMITED = """
import resource, sys
from gptjax.checkpoint import Checkpoints
from gptjax.cli import train

def save_on_a_full_disk(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    save(*args)

save, Checkpoints.save = Checkpoints.save, save_on_a_full_disk
sys.exit(train(sys.argv[2:]))
"""


@pytest.mark.whole
def test_a_workdir_without_room_is_a_few_lines(tiny_run, tmp_path):
    """A limit on the size of files gives the same failed write as a full disk."""
    args = [*tiny_run, f"--workdir={tmp_path / 'run'}", "--train.total_steps=4"]
    done = run_script("-c", LIMITED, *args)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "make room and run the same command again" in said[0]
    assert len(done.stderr.splitlines()) <= 2, done.stderr


# ---------------------------------------------------------------------------------------------------------------
# Trackers


def read_tensorboard(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard's own reader has them."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install -e '.[test]'"
    )
    found = reader.EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install -e '.[tensorboard]'")
    for first, last, restored, loss in ((0, 9, 0, 1.0), (5, 12, 4, 2.0), (13, 20, 12, 3.0)):
        tracker = TensorBoard(str(tmp_path), restored)
        for step in range(first, last + 1):
            tracker.write(step, {"train/loss": loss, "val/loss/a b": loss, "tokens": step * 10**9})
        tracker.close()
    shown = read_tensorboard(tmp_path)
    expected = [(step, 1.0 if step <= 4 else 2.0 if step <= 12 else 3.0) for step in range(21)]
    assert shown["train/loss"] == shown["val/loss/a_b"] == expected
    assert shown["tokens"] == [(step, float(np.float32(step * 10**9))) for step in range(21)]


def test_tensorboard_shows_only_the_new_run_where_one_begins_anew(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install -e '.[tensorboard]'")
    for loss, last in ((1.0, 9), (2.0, 3)):
        tracker = TensorBoard(str(tmp_path), 0)
        for step in range(last + 1):
            tracker.write(step, {"train/loss": loss})
        tracker.close()
    assert read_tensorboard(tmp_path)["train/loss"] == [(step, 2.0) for step in range(4)]


def test_tensorboard_shows_what_is_no_number(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install -e '.[tensorboard]'")
    tracker = TensorBoard(str(tmp_path), 0)
    for step, value in enumerate([float("nan"), float("inf"), 1e-40, -1.0]):
        tracker.write(step, {"train/loss": value})
    tracker.close()
    shown = [value for _, value in read_tensorboard(tmp_path)["train/loss"]]
    np.testing.assert_array_equal(shown, np.array([np.nan, np.inf, 1e-40, -1.0], np.float32))


def test_outputs_have_what_a_stream_has():
    stream = Output(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert stream.encoding == "ascii" and not stream.isatty() and stream.write("é") == 1
    continue_without_output()  # of a stream that is none of ours: nothing


def test_a_current_folder_that_was_removed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(SystemExit, match="2"):
        report_user_errors(lambda: 0)()
    assert capsys.readouterr().err.startswith("error: the current folder is not there any more; change to one")
