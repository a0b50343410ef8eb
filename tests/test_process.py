"""What is settled before JAX starts."""

import os
import sys

import pytest
from conftest import run_script

from gptjax.process import set_cpu_devices


def test_virtual_devices_get_a_pool_of_twice_as_many_threads():
    environment = {"XLA_FLAGS": "--xla_cpu_foo=1"}
    set_cpu_devices(8, environment)
    assert environment["XLA_FLAGS"] == "--xla_cpu_foo=1 --xla_force_host_platform_device_count=8"
    assert int(environment["NPROC"]) >= 16


def test_flags_that_set_devices_win():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    set_cpu_devices(8, environment)
    assert environment == {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    set_cpu_devices(None, empty := {})
    assert not empty


# The program's temporary [4096, 4096] is beyond the 64 MiB that a thread's own arena can hold.
FAULTS = """
import resource, sys
from gptjax.process import keep_freed_memory
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


@needs_glibc
def test_a_step_does_not_take_its_memory_from_the_kernel_again():
    faults = {}
    for keep in (False, True):
        result = run_script("-c", FAULTS.format(keep=keep), JAX_PLATFORMS="cpu")
        faults[keep] = int(result.stdout)
    assert faults[True] < faults[False] / 5


# mallinfo2 counts the blocks that malloc mapped by themselves; the kernel gives their pages anew each time.
MAPPED = """
import ctypes
from gptjax.process import keep_freed_memory
if {keep}: keep_freed_memory()
libc = ctypes.CDLL(None)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure): _fields_ = [(name, ctypes.c_size_t) for name in names]
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
before = libc.mallinfo2().hblks
assert libc.malloc(ctypes.c_size_t(3 << 30))
print(libc.mallinfo2().hblks - before)
"""


@needs_glibc
def test_the_temporaries_of_a_large_step_are_kept_too():
    mapped = [int(run_script("-c", MAPPED.format(keep=keep)).stdout) for keep in (False, True)]
    assert mapped == [1, 0]
