"""The step compiled for TPUs that are not there, and what its program holds: pip install -e '.[tpu]' and

JAX_PLATFORMS=cpu python -m pytest -n 0 -m tpu -s tests/test_tpu.py
"""

import math
import os
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from conftest import GPT2_LIKE, make_config
from jax.experimental import topologies

from gptjax.nn.attention import AttentionInput
from gptjax.nn.kernels import splash_attention
from gptjax.nn.transformer import flops_per_token
from gptjax.sharding import make_mesh
from gptjax.step import make_train_step, make_trainable

pytestmark = pytest.mark.tpu

# Not to look for a TPU, and to load beside other processes that compile.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

GPT2 = {"preset": "gpt2", "vocab_size": 50257, "dtype": "bfloat16"}
SMALL = {**GPT2_LIKE, "d_model": 256, "context_length": 512, "vocab_size": 500, "dtype": "bfloat16"}
COLLECTIVES = r"\b(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\("


@cache
def devices_of(topology: str) -> list:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_step(model: dict, train: dict, topology: str = "v5e:2x2", packed: bool = False, **axes: int):
    """The compiled training step, and its config; on one chip unless the axes say more."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | axes
    cfg = make_config(model, train={"loss_chunks": 8, **train})
    t = make_trainable(cfg, make_mesh(sizes, devices_of(topology)[: math.prod(sizes.values())]))
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    kinds |= {"positions": jnp.int32, "segments": jnp.int32} if packed else {}
    shape = (cfg.train.batch_sequences, cfg.model.context_length)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=t.batch_sharding) for name, kind in kinds.items()}
    with jax.set_mesh(t.mesh):
        return make_train_step(t).compiled.lower(t.state, batch).compile(), t.cfg


def shapes_in(program: str) -> dict[str, tuple[str, list[int]]]:
    """Type and dimensions of every instruction that is one array, by name."""
    found = re.findall(r"(%[\w.-]+) = (\w+)\[([\d,]*)\]", program)
    return {name: (kind, [int(n) for n in dims.split(",") if n]) for name, kind, dims in found}


def products_in(program: str) -> list[list[tuple[str, list[int]]]]:
    """Types and dimensions of the two operands of every matrix product."""
    shapes = shapes_in(program)
    operands = re.findall(r" (?:convolution|dot)\(([^)]*)\)", program)
    return [[shapes[name] for name in re.findall(r"%[\w.-]+", pair)] for pair in operands]


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_splash_and_its_gradient_compile_for_a_tpu(mesh):
    """Packed rows, grouped heads, 1,000 positions and heads of 64: nothing is a multiple of 128."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | mesh
    on = make_mesh(sizes, devices_of("v5e:2x2")[: math.prod(sizes.values())])
    replicated = jax.sharding.NamedSharding(on, jax.sharding.PartitionSpec())
    array = partial(jax.ShapeDtypeStruct, sharding=replicated)
    q, kv = array((2, 1000, 4, 64), jnp.bfloat16), array((2, 1000, 2, 64), jnp.bfloat16)

    def gradient(q, k, v, segments):
        inputs = AttentionInput(jnp.arange(1000)[None], segments)
        return jax.grad(lambda *x: splash_attention(*x, inputs)[0].sum().astype(jnp.float32), (0, 1, 2))(q, k, v)

    with jax.set_mesh(on):
        program = jax.jit(gradient).lower(q, kv, kv, array((2, 1000), jnp.int32)).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') >= 3  # forward, and backward for q and for k and v


@cache
def gpt2_on_a_chip(chunks: int):
    return compile_step({**GPT2, "remat": "full"}, {"batch_sequences": 16, "loss_chunks": chunks})[0]


def test_the_program_of_gpt2_on_one_chip_has_nothing_that_was_not_asked_for():
    program = gpt2_on_a_chip(8).as_text()
    products = products_in(program)
    assert len(products) > 12
    assert {kind for pair in products for kind, _ in pair} == {"bf16"}
    logits = 16 * 1024 * 50304
    assert max(math.prod(dims) for _, dims in shapes_in(program).values()) < logits
    assert not re.search(COLLECTIVES, program)
    assert 'custom_call_target="tpu_custom_call"' in program  # splash attention is what a TPU gets


def test_a_chunked_loss_spares_most_of_the_temporaries():
    whole, chunked = (gpt2_on_a_chip(n).memory_analysis().temp_size_in_bytes for n in (1, 16))
    print(
        f"\ntemporaries of GPT-2 124M, 16 x 1,024 tokens, one v5e chip, full remat, splash attention: "
        f"{whole / 2**30:.2f} GiB with whole logits, {chunked / 2**30:.2f} GiB with the loss in 16 chunks "
        f"({chunked / whole - 1:+.0%})"
    )
    assert chunked < 0.4 * whole


@pytest.mark.parametrize(("remat", "most"), [("none", 1.12), ("full", 1.38)])
def test_compiled_flops_are_the_models(remat, most):
    """Attention by the reference, whose products the compiler counts (of a kernel it sees only an estimate)."""
    model = {**GPT2, "remat": remat, "scan_layers": False, "attention": "reference"}
    step, cfg = compile_step(model, {"batch_sequences": 4, "loss_chunks": 1})  # XLA counts a loop's body once
    tokens = cfg.train.batch_sequences * cfg.model.context_length
    ratio = step.cost_analysis()["flops"] / (flops_per_token(cfg.model) * tokens)
    print(f"\ncompiled FLOPs over model FLOPs, GPT-2 124M on one v5e chip, remat {remat}: {ratio:.3f}")
    assert ratio <= most


def test_the_program_does_not_grow_with_depth():
    # Below eight layers the stacks of weights are so small that the compiler treats them otherwise.
    small, large = (compile_step({**SMALL, "n_layers": n}, {})[0] for n in (8, 24))
    assert large.as_text().count("\n") < 1.02 * small.as_text().count("\n")
    sizes = [step.memory_analysis().generated_code_size_in_bytes for step in (small, large)]
    assert sizes[1] < 1.05 * sizes[0]


def test_offloaded_tensors_lie_in_the_hosts_memory():
    model = {**SMALL, "n_layers": 4, "remat": "offload", "remat_names": ["block_input", "mlp"]}
    on_host = compile_step(model, {})[0].memory_analysis().host_temp_size_in_bytes
    tokens = 4 * 8 * 512
    assert on_host >= tokens * (256 + 4 * 256) * 2  # bf16, of every layer


def test_norms_work_on_a_part_of_the_positions_under_tensor_parallelism():
    """Megatron's sequence parallelism (Korthikanti et al. 2022): partial sums are scattered."""
    program = compile_step({**SMALL, "remat": "full"}, {}, tensor=4)[0].as_text()
    stream = [dims for kind, dims in shapes_in(program).values() if kind in ("f32", "bf16") and dims[-1:] == [256]]
    assert [8, 128, 256] in stream
    assert re.search(r"reduce-scatter", program)


def test_a_ring_passes_keys_and_values_on():
    program = compile_step({**SMALL, "remat": "full"}, {}, packed=True, context=4)[0].as_text()
    assert re.search(r"collective-permute", program)
    assert not any(dims[-2:] == [512, 512] for _, dims in shapes_in(program).values())  # no whole scores


def test_slices_are_joined_along_data():
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2)
    mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1, "context": 1}, list(found.devices), slices=2)
    slices = [[d.slice_index for d in row.ravel()] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_an_axis_may_take_a_part_of_a_torus_dimension():
    """32 of 4 x 4 x 4 chips are two dimensions and a half; `jax.make_mesh` refuses that on a v5p."""
    mesh = make_mesh({"data": 2, "fsdp": 32, "tensor": 1, "context": 1}, devices_of("v5p:4x4x4"))
    assert mesh.devices.shape == (2, 32, 1, 1)
    assert len({d.id for d in mesh.devices.ravel()}) == 64
