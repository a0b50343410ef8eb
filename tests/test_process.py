"""What is settled before JAX starts."""

import os
import re
import sys

import pytest
from conftest import run_script

from gptjax import cpu


def test_virtual_devices_get_a_pool_of_twice_as_many_threads():
    environment = {"XLA_FLAGS": "--xla_cpu_foo=1"}
    cpu.set_virtual_devices(8, environment)
    assert environment["XLA_FLAGS"] == "--xla_cpu_foo=1 --xla_force_host_platform_device_count=8"
    assert int(environment["NPROC"]) >= 16


def test_flags_that_set_devices_win():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    cpu.set_virtual_devices(8, environment)
    assert environment == {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    cpu.set_virtual_devices(None, empty := {})
    assert not empty


@pytest.mark.parametrize(
    ("environment", "tpus", "gpus", "expected"),
    [
        ({}, False, False, True),
        ({}, True, False, False),
        ({}, False, True, False),
        ({"JAX_PLATFORMS": "cpu"}, True, True, True),
        ({"JAX_PLATFORMS": "tpu,cpu"}, False, False, False),
    ],
)
def test_what_is_for_cpus_is_left_out_where_accelerators_compute(monkeypatch, environment, tpus, gpus, expected):
    monkeypatch.setattr(cpu, "has_tpus", lambda: tpus)
    monkeypatch.setattr(cpu, "has_gpus", lambda: gpus)
    assert cpu.runs_on_cpu(environment) is expected


# The program's temporary [4096, 4096] is beyond the 64 MiB that a thread's own arena can hold.
FAULTS = """
import resource, sys
from gptjax.cpu import keep_freed_memory
if {keep}: keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x / 4096)
x = jnp.ones((4096, 16))
for _ in range(30): x = step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30): x = step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc's malloc"
)


@pytest.mark.whole
@needs_glibc
def test_a_step_does_not_take_its_memory_from_the_kernel_again():
    faults = {}
    for keep in (False, True):
        result = run_script("-c", FAULTS.format(keep=keep), JAX_PLATFORMS="cpu")
        faults[keep] = int(result.stdout)
    assert faults[True] < faults[False] / 5


MALLINFO = """
import ctypes
libc = ctypes.CDLL(None)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure): _fields_ = [(name, ctypes.c_size_t) for name in names]
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
"""
# hblks counts the blocks that malloc mapped by themselves; the kernel gives their pages anew each time.
MAPPED = """
from gptjax.cpu import keep_freed_memory
if {keep}: keep_freed_memory()
before = libc.mallinfo2().hblks
assert libc.malloc(ctypes.c_size_t(3 << 30))
print(libc.mallinfo2().hblks - before)
"""


@needs_glibc
def test_the_temporaries_of_a_large_step_are_kept_too():
    mapped = [int(run_script("-c", MALLINFO + MAPPED.format(keep=keep)).stdout) for keep in (False, True)]
    assert mapped == [1, 0]


# The program's temporary has 256 MiB, and nobody waits for its result.
IN_USE = """
from gptjax.cpu import keep_freed_memory
from gptjax.process import prepare_process
prepare_process() if {prepare} else keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x / 8192)
x = jnp.ones((8192, 16))
x = step(x).block_until_ready()
x, highest = step(x), 0
while not x.is_ready():
    highest = max(highest, libc.mallinfo2().uordblks)
print(max(highest, libc.mallinfo2().uordblks) >> 20)
"""


@needs_glibc
def test_a_step_has_freed_its_temporaries_when_the_next_begins():
    """Else the next takes as much again, and what has been taken is kept: 8 GiB instead of 4 for GPT-2 124M."""
    in_use = {}
    for prepare in (False, True):
        result = run_script("-c", MALLINFO + IN_USE.format(prepare=prepare), JAX_PLATFORMS="cpu")
        in_use[prepare] = int(result.stdout)
    assert in_use[True] < 256 < in_use[False]


# Resident memory after the first step of a model, in MiB.
RESIDENT = """
from gptjax.process import prepare_process
prepare_process()
import jax, numpy as np
from gptjax import cpu, step
from gptjax.configfile import load_config
from gptjax.sharding import make_mesh
if not {give_back}: cpu.return_freed_memory = lambda: None
cfg = load_config(["configs/debug.yaml", "--model.vocab_size=65"])
t = step.make_trainable(cfg, make_mesh(cfg.mesh.axes))
ids = np.zeros((cfg.train.batch_sequences, cfg.model.context_length), np.int32)
batch = jax.device_put({{"tokens": ids, "targets": ids, "weights": ids.astype(np.float32)}}, t.batch_sharding)
jax.block_until_ready(step.make_train_step(t)(step.init_state(t), batch))
print(int(open("/proc/self/statm").read().split()[1]) * 4 // 1024)
"""


@needs_glibc
@pytest.mark.slow
def test_what_the_compiler_leaves_behind_is_given_back(tmp_path):
    resident = {}
    for give_back in (False, True):
        cache = str(tmp_path / str(give_back))
        result = run_script("-c", RESIDENT.format(give_back=give_back), JAX_COMPILATION_CACHE_DIR=cache)
        resident[give_back] = int(result.stdout)
    assert resident[True] < 0.85 * resident[False], resident


# Whether XLA cut an operation for threads, in a process that may use so many cores.
CUT = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}])
from gptjax.process import prepare_process
prepare_process()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
compiled = jax.jit(jnp.tanh).lower(jnp.ones((4096, 512))).compile()
print('"outer_dimension_partitions":["' in compiled.as_text())
"""


KILLED_AS_IT_WRITES = """
import os, sys
from gptjax.process import prepare_process
prepare_process()
import jax, jax.numpy as jnp
if sys.argv[1] == "killed":
    os.replace = os.fsync = lambda *_: os._exit(9)
jax.jit(lambda x: jnp.linalg.inv(x @ x))(jnp.ones((8, 8))).block_until_ready()
"""


def test_a_killed_process_leaves_no_part_of_a_program_in_the_cache(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run_script("-c", KILLED_AS_IT_WRITES, "killed", **cache).returncode == 9
    assert not list(tmp_path.glob("*-cache"))
    for _ in range(2):
        done = run_script("-c", KILLED_AS_IT_WRITES, "whole", **cache)
        assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.glob("*-cache"))


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() == 1, reason="a process's cores can be chosen")
def test_a_program_compiled_for_one_core_is_not_found_again_by_two(tmp_path):
    cut = [run_script("-c", CUT.format(cores=cores), HOME=str(tmp_path)).stdout for cores in (1, 2)]
    assert cut == ["False\n", "True\n"]


LOCKED = """
import os, resource
from gptjax.process import allow_locked_memory
resource.setrlimit(resource.RLIMIT_MEMLOCK, ({soft}, {hard}))
if {drop}:
    os.setuid(65534)
allow_locked_memory()
print(*resource.getrlimit(resource.RLIMIT_MEMLOCK))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities of Linux")
def test_the_limit_of_locked_memory_is_raised_as_far_as_it_may_be():
    """A process that may not raise the hard limit uses all of it."""
    drop = os.geteuid() == 0
    done = run_script("-c", LOCKED.format(soft=4096, hard=65536, drop=drop))
    assert done.stdout == "65536 65536\n", done.stderr


USES_DEVICES = """
import jax.numpy as jnp
from gptjax.shell.console import report_user_errors
report_user_errors(lambda: jnp.zeros(2))()
"""


@pytest.mark.parametrize("platforms", ["cuda", "cpuu", "tpu,cpu"])
def test_a_platform_that_jax_lacks_is_the_users_error(platforms):
    """JAX raises RuntimeError, or an AssertionError without a word."""
    done = run_script("-c", USES_DEVICES, JAX_PLATFORMS=platforms)
    assert done.returncode == 2, done.stderr
    assert re.search(f"JAX_PLATFORMS={platforms} .*unset it, set it to cpu, or pip install", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_plan_leaves_the_platform_of_the_machine_alone():
    """Also where that platform is not there, or another process has it."""
    plan = ("plan", "configs/gpt2_124m.yaml", "--topology", "v5e:4x4", "--analytic")
    done = run_script("-m", "gptjax", *plan, JAX_PLATFORMS="cuda")
    assert done.returncode == 0, done.stderr
