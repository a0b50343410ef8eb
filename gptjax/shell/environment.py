"""Other programs of the machine, and the record of where a run ran (env.json).

Every program that is not Python runs through `run_program`: one that is absent, that fails or that hangs is an
ordinary error, and never the end of a run that could do without it.
"""

import os
import platform
import signal
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gptjax.errors import UserError

GIT_TIMEOUT_S = 10
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class ProgramError(UserError):
    """A program could not be started, returned a code other than 0, or did not end in time."""


def run_program(command: Sequence[str], timeout_s: float, cwd: str | Path | None = None) -> str:
    """Run a program without input and return its stdout, without whitespace at its ends.

    Raises:
        ProgramError: it is not there, it failed, or it ran for `timeout_s`; it and its children are then killed.
    """
    name = command[0]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        process = subprocess.Popen(command, cwd=cwd, **pipes, text=True, errors="replace", start_new_session=True)
    except OSError as error:
        raise ProgramError(f"cannot run {name}: {error.strerror or error}") from None
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise ProgramError(f"{name} did not end within {timeout_s:g} s and was killed") from None
        finally:
            if process.poll() is None:  # also after Ctrl-C, which reaches no session but the own one
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        reason = " ".join(stderr.split()) or "without a message"
        raise ProgramError(f"{name} failed with code {process.returncode}: {reason}")
    return stdout.strip()


def git_commit() -> str | None:
    """Return the commit of the checkout that this package lies in; None outside a checkout, or where git fails."""
    try:
        return run_program(["git", "rev-parse", "HEAD"], GIT_TIMEOUT_S, cwd=Path(__file__).parent) or None
    except ProgramError:
        return None


def describe_environment() -> dict[str, Any]:
    """Return versions, devices, the number of processes and the git commit, as plain values. JAX must be ready."""
    import jax

    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": [f"{d.device_kind} {d.id}" for d in jax.devices()],
        "processes": jax.process_count(),
        "git_commit": git_commit(),
    }


def describe_versions() -> str:
    """Return one line: the versions of gptjax, of Python and of the packages that decide a run's numbers."""
    found = {"gptjax": _version("gptjax"), "Python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    return ", ".join(f"{name} {version or '(not installed)'}" for name, version in found.items())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # installed without its metadata
        return None
