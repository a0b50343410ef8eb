"""The compiled step: the same on every mesh, accumulated or not, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, trainable_on
from mesh_losses import CONFIGS

from gptjax.errors import UserError
from gptjax.sharding import make_mesh
from gptjax.spikes import SKIPS
from gptjax.step import init_state, make_eval_step, make_train_step


def some_batch(t, seed: int, B: int = 8, T: int = 32) -> dict:
    ids = np.random.default_rng(seed).integers(0, GPT2_LIKE["vocab_size"], (B, T + 1), dtype=np.int32)
    weights = np.random.default_rng(seed).integers(0, 2, (B, T)).astype(np.float32)
    return jax.device_put({"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}, t.batch_sharding)


def run_steps(t, steps: int, same_batch: bool = False, state=None):
    state, step, losses = state or init_state(t), make_train_step(t), []
    for number in range(steps):
        state, metrics = step(state, some_batch(t, 0 if same_batch else number))
        losses.append(float(metrics["train/loss"]))
    return np.array(losses), state, step


MESHES = [
    pytest.param("adamw", {"data": 8}, marks=pytest.mark.slow),  # pytest -m slow -n 0 tests/test_step.py
    pytest.param("adamw", {"tensor": 4, "data": 2}, marks=pytest.mark.whole),
    pytest.param("adamw", {"context": 2, "fsdp": 4}, marks=pytest.mark.whole),
    pytest.param("muon", {"fsdp": 8}, marks=pytest.mark.slow),
    ("muon", {"data": 2, "fsdp": 2, "tensor": 2}),
    pytest.param("muon", {"context": 4, "tensor": 2}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def one_device():
    """By the config's name: first weights, and the losses of 20 steps."""

    def run(cfg):
        t = trainable_on(cfg)
        state = init_state(t)
        return jax.tree.map(np.array, state.params), run_steps(t, 20, state=state)[0]

    return {name: run(cfg) for name, cfg in CONFIGS.items()}


@pytest.mark.parametrize(("name", "axes"), MESHES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(one_device, name, axes):
    first, expected = one_device[name]
    t = trainable_on(CONFIGS[name], 8, **axes)
    state = init_state(t)
    jax.tree.map(np.testing.assert_array_equal, state.params, first)
    losses, state, step = run_steps(t, 20, state=state)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert step.compiled._cache_size() == 1
    wanted = jax.tree.map(lambda leaf: leaf.sharding, t.state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted


@pytest.mark.whole
@pytest.mark.parametrize("model", [GPT2_LIKE, pytest.param(MODERN, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_steps_in_bfloat16_come_near_those_in_float32(model):
    configs = [make_config({**model, "dtype": dtype}) for dtype in ("float32", "bfloat16")]
    losses, low = (run_steps(trainable_on(cfg), 10)[0] for cfg in configs)
    assert np.any(low != losses)
    np.testing.assert_allclose(low, losses, atol=0.02)


def test_fsdp_holds_an_eighth_of_weights_and_moments_on_each_device():
    cfg = make_config(GPT2_LIKE)
    t = trainable_on(cfg, 8, fsdp=8)
    _, state, _ = run_steps(t, 1)
    held = dict.fromkeys(jax.devices(), 0)
    whole = 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        whole += leaf.nbytes
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    spared = 0.05 * whole  # norms and biases, which every device holds in full
    assert all(size <= whole / 8 + spared for size in held.values())


@pytest.mark.whole
def test_accumulating_four_microbatches_on_four_devices_changes_nothing():
    """Masked tokens make the microbatches unequal, so a mean of means would show."""
    results = []
    for parts, devices, axes in ((1, 1, {}), (4, 4, {"data": 2, "fsdp": 2})):
        cfg = make_config(MODERN, train={"batch_sequences": 16, "microbatches": parts}, optim={"clip_norm": None})
        t = trainable_on(cfg, devices, **axes)
        state, step = init_state(t), make_train_step(t)
        for number in range(2):
            state, metrics = step(state, some_batch(t, number, B=16))
        results.append((state.params, metrics["train/loss"], metrics["grad_norm"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *results)


@pytest.mark.whole
def test_one_batch_can_be_learnt_by_heart():
    cfg = make_config(GPT2_LIKE, optim={"peak_lr": 0.01, "schedule": "constant"})
    losses, state, _ = run_steps(trainable_on(cfg), 150, same_batch=True)
    assert losses[-1] < 0.1
    t = trainable_on(cfg)
    loss, weight = make_eval_step(t)(state.params, some_batch(t, 0))["loss"]
    assert float(loss / weight) == pytest.approx(losses[-1], abs=0.05)


def test_a_step_without_a_finite_gradient_leaves_the_state_alone():
    t = trainable_on(make_config(GPT2_LIKE, optim={"ema_decay": 0.9}))
    state, step = init_state(t), make_train_step(t)
    before = jax.tree.map(np.asarray, state)
    bad = some_batch(t, 0)
    bad["weights"] = bad["weights"] * jnp.nan
    after, metrics = step(state, bad)
    assert metrics["skipped"] == 1
    assert after.step == 1
    counted = before.statistics.copy()
    counted[SKIPS] = 1
    jax.tree.map(np.testing.assert_array_equal, before._replace(step=0, statistics=counted), after._replace(step=0))
    after, metrics = step(after, some_batch(t, 1))
    assert metrics["skipped"] == 0
    assert np.abs(after.params["embed"] - before.params["embed"]).max() > 0


def test_the_ema_follows_the_weights():
    t = trainable_on(make_config(GPT2_LIKE, optim={"ema_decay": 0.5}))
    state, step = init_state(t), make_train_step(t)
    expected = np.asarray(state.params["embed"])
    for number in range(4):
        state, _ = step(state, some_batch(t, number))
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["embed"])
    np.testing.assert_allclose(state.ema["embed"], expected, rtol=1e-5, atol=1e-7)


def test_another_total_does_not_compile_again():
    t = trainable_on(make_config(GPT2_LIKE))
    state, step = init_state(t), make_train_step(t)
    state, first = step(state, some_batch(t, 0))
    state = state._replace(total_steps=jnp.asarray(5, jnp.int32, device=state.total_steps.sharding))
    _, second = step(state, some_batch(t, 1))
    assert step.compiled._cache_size() == 1
    assert second["lr"] < first["lr"]


def test_slices_lie_along_data_and_hold_neighbours_on_the_other_axes():
    axes = {"data": -1, "fsdp": 1, "tensor": 2, "context": 1}
    mesh = make_mesh(axes, jax.devices()[::-1], slices=2)  # virtual devices have no slice: their order counts
    ids = [[d.id for d in row.ravel()] for row in mesh.devices]
    assert [{i < 4 for i in row} for row in ids] == [{False}, {False}, {True}, {True}]
    with pytest.raises(UserError, match=r"mesh.slices 3 must divide mesh.data 4"):
        make_mesh(axes, slices=3)


@pytest.mark.parametrize(
    ("axes", "named"),
    [({"tensor": 8}, "model.n_heads 4"), ({"data": 3}, "train.batch_sequences"), ({"context": 3}, "context_length")],
)
def test_a_mesh_that_does_not_divide_is_refused(axes, named):
    devices = int(np.prod(list(axes.values())))
    with pytest.raises(UserError, match=named):
        trainable_on(make_config(GPT2_LIKE), devices, **axes)


def test_a_filter_longer_than_a_chunk_of_the_ring_is_refused():
    trainable_on(make_config({**MODERN, "conv_width": 5}), 4, context=4)
    with pytest.raises(UserError, match=r"make it at most 5, or model.context_length at least 40"):
        trainable_on(make_config({**MODERN, "conv_width": 6}), 4, context=4)


@pytest.mark.whole
def test_loss_chunks_share_the_logits_among_the_devices_of_the_context_axis():
    """Each chunk has an equal part on every device: none computes the logits of positions that another holds."""
    cfg = make_config(MODERN, train={"batch_sequences": 8, "loss_chunks": 4})
    t = trainable_on(cfg, 8, data=2, context=4)
    step = make_train_step(t).compiled
    with jax.set_mesh(t.mesh):
        program = step.lower(t.state, some_batch(t, 0)).compile().as_text()
    chunk, vocab = 8 * 32 // 4, cfg.model.padded_vocab
    assert f"f32[1,{chunk // 8},{vocab}]" in program
    assert f"[1,{chunk},{vocab}]" not in program


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_roles_stay_and_have_no_moments(optimizer):
    """Eight devices, two microbatches and an average, so that every tree of weights is split and joined."""
    optim = {"name": optimizer, "freeze": ["embed", "position", "matrix", "head"], "ema_decay": 0.9}
    cfg = make_config(GPT2_LIKE, optim=optim, train={"batch_sequences": 16, "microbatches": 2})
    t = trainable_on(cfg, 8, fsdp=4, data=2)
    frozen = {"/".join(path) for path in t.frozen}
    assert {"embed", "positions", "blocks/mlp/up", "blocks/attention/out"} <= frozen
    assert not any("norm" in path or "bias" in path for path in frozen)
    sizes = {leaf.shape for leaf in jax.tree.leaves(t.state.opt_state)}
    assert sizes.isdisjoint({t.state.params["embed"].shape, t.state.params["blocks"]["mlp"]["up"].shape})
    state, step = init_state(t), make_train_step(t)
    before = jax.tree.map(np.array, state.params)
    for number in range(2):
        state, metrics = step(state, some_batch(t, number, B=16))
    assert metrics["skipped"] == 0
    for keys, leaf in jax.tree.leaves_with_path(state.params):
        path = "/".join(key.key for key in keys)
        same = np.array_equal(leaf, _leaf(before, keys))
        assert same == (path in frozen), path
        assert np.array_equal(_leaf(state.ema, keys), _leaf(before, keys)) == same, path


def _leaf(tree, keys):
    for key in keys:
        tree = tree[key.key]
    return tree


def test_a_role_to_freeze_must_be_known_and_leave_something_to_train():
    with pytest.raises(UserError, match=r"optim.freeze 'matrx' .*did you mean 'matrix'"):
        trainable_on(make_config(GPT2_LIKE, optim={"freeze": ["matrx"]}))
    with pytest.raises(UserError, match=r"leaves no weight to train"):
        trainable_on(make_config(GPT2_LIKE, optim={"freeze": ["embed", "position", "matrix", "norm", "bias"]}))
