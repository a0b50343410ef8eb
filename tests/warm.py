"""Processes that run a script of this project without importing its libraries anew: 1.5 of a short run's 5 s.

`run_warm` starts this file once as a server, which imports the libraries, touches no device and starts no thread, and
forks for each script. gptjax itself is imported by the fork, after its environment is set, as in a new process.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ["jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "tokenizers", "jsonargparse"]
READ_EARLY = ("JAX_", "PYTHON", "LD_", "MALLOC_", "GLIBC_")  # variables that an import or the loader reads


def run_warm(script: str, arguments: list[str], environment: dict[str, str], cwd: Path, timeout: float):
    """Run a script to its end in a fork of the server; as subprocess.run with captured text.

    Raises:
        subprocess.TimeoutExpired: after so many seconds; the script has been killed.
    """
    command = [script, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, "stdout"), Path(folder, "stderr")]
        request = {"command": command, "environment": environment, "cwd": str(cwd), "outputs": [*map(str, outputs)]}
        server = start_server()
        server.stdin.write(json.dumps({**request, "timeout": timeout}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the server of warm processes has ended"
        texts = [path.read_text() for path in outputs]
    if answer.strip() == "timeout":
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, int(answer), *texts)


@functools.cache
def start_server() -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "NPROC")}
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, env=env, text=True)
    atexit.register(server.communicate)
    return server


def wait_for_fork() -> list[str]:
    """Answer requests until there are no more; return in a fork, which is ready to run the command returned."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            return request["command"]
        print(exit_code(child, request["timeout"]), flush=True)
    os._exit(0)


def become(request: dict) -> None:
    """Take the request's directory, environment and files for the standard streams."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in request["outputs"]]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)


def exit_code(child: int, timeout: float) -> int | str:
    """Return a child's exit code, or its signal as a negative number; kill it after so many seconds."""
    descriptor = os.pidfd_open(child)
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        ended = selector.select(timeout)
    os.close(descriptor)
    if not ended:
        os.kill(child, 9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if ended else "timeout"


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # a collection in a fork would copy the pages of all that was imported
    sys.argv = wait_for_fork()
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
