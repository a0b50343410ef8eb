"""Optimizers against a few lines of numpy, schedules against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GPT2_LIKE, MODERN, make_config
from flax import traverse_util

from gptjax.apps.plan.hlo import Program
from gptjax.apps.plan.orthogonal import orthogonal_costs
from gptjax.config import OptimConfig
from gptjax.errors import UserError
from gptjax.muon import MuonState, orthogonalize, scale_by_muon
from gptjax.nn.transformer import abstract_model, init_params
from gptjax.optim import learning_rate, make_optimizer, treat
from gptjax.sharding import make_mesh, sharding


def setup(optim: dict, model: dict = GPT2_LIKE):
    cfg = make_config(model, optim=optim)
    params = init_params(cfg.model, jax.random.key(0))
    optimizer = make_optimizer(cfg.optim, abstract_model(cfg.model)[2])
    rng = np.random.default_rng(0)
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(3)]
    return cfg, params, optimizer, grads


def test_adamw_equals_numpy():
    _, params, optimizer, grads = setup({"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": None})
    state = optimizer.init(params)
    m = v = 0.0
    for t, grad in enumerate(grads, 1):
        found, state = optimizer.update(grad, state, params)
        g = grad["blocks"]["mlp"]["up"]
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        np.testing.assert_allclose(
            found["blocks"]["mlp"]["up"], adam + 0.1 * params["blocks"]["mlp"]["up"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bfloat16_moments_are_those_of_float32_rounded_after_every_step(name):
    model, rounded = (MODERN, {"name": name, "moments_dtype": "bfloat16"})
    _, params, optimizer, grads = setup({"name": name}, model)
    low = setup(rounded, model)[2]
    state, kept = optimizer.init(params), low.init(params)
    moments = [leaf for leaf in jax.tree.leaves(kept) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.bfloat16.dtype}
    assert sum(leaf.size for leaf in moments) == sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    for grad in grads:
        expected, state = optimizer.update(grad, state, params)
        found, kept = low.update(grad, kept, params)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        state = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) if x.ndim else x, state)


def test_norms_biases_and_positions_do_not_decay():
    _, params, optimizer, _ = setup({"weight_decay": 0.1})
    params = jax.tree.map(jnp.ones_like, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    found, _ = optimizer.update(zero, optimizer.init(params), params)
    decays = {"/".join(k.key for k in path) for path, leaf in jax.tree.leaves_with_path(found) if np.any(leaf)}
    inner = {f"blocks/attention/{n}" for n in ("query", "key", "value", "out")}
    assert decays == {"embed", "blocks/mlp/up", "blocks/mlp/down", *inner}


def test_clipping_bounds_the_global_norm():
    """Adam forgets the gradient's scale, so look at Muon's momentum, in which it stays."""
    _, params, optimizer, grads = setup({"name": "muon", "clip_norm": 1.0})
    _, state = optimizer.update(grads[0], optimizer.init(params), params)
    momenta = [leaf for path, leaf in jax.tree.leaves_with_path(state) if "momentum" in jax.tree_util.keystr(path)]
    matrices = grads[0]["blocks"]
    expected = 0.05 * np.asarray(matrices["mlp"]["up"]) / optax.tree.norm(grads[0])
    assert any(m.shape == expected.shape and np.allclose(m, expected, rtol=1e-4) for m in momenta)


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Jordan et al. 2024: five steps of x <- a x + b (x x') x + c (x x')^2 x, on the matrix's wide side."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / np.linalg.norm(x)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
    return x.T if g.shape[0] > g.shape[1] else x


def test_muon_equals_numpy_layer_by_layer():
    _, params, optimizer, grads = setup({"name": "muon", "weight_decay": 0.0, "clip_norm": None}, MODERN)
    state = optimizer.init(params)
    momentum = dict.fromkeys(("query", "out"), 0.0)
    for grad in grads[:2]:
        found, state = optimizer.update(grad, state, params)
        for name in momentum:
            g = np.asarray(grad["blocks"]["attention"][name], np.float64)
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            nesterov = 0.95 * momentum[name] + 0.05 * g
            for layer in range(2):
                matrix = nesterov[layer].reshape((32, -1) if name == "query" else (-1, 32))
                expected = newton_schulz(matrix) * max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
                np.testing.assert_allclose(
                    found["blocks"]["attention"][name][layer].reshape(matrix.shape), expected, atol=2e-4
                )


def test_orthogonalize_brings_singular_values_near_one():
    singular = np.linalg.svd(orthogonalize(jax.random.normal(jax.random.key(0), (3, 64, 48))), compute_uv=False)
    assert singular.min() > 0.4
    assert singular.max() < 1.3


def test_muon_leaves_embedding_head_and_norms_to_adam():
    _, params, optimizer, _ = setup({"name": "muon"}, MODERN)
    shapes = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(optimizer.init(params))]
    assert sum("momentum" in s for s in shapes) == 7  # query key value out up gate down
    assert any("mu" in s and "embed" in s for s in shapes)
    assert any("mu" in s and "head" in s for s in shapes)


def test_lr_scales_take_the_first_match():
    base = setup({"weight_decay": 0.0})
    scaled = setup({"weight_decay": 0.0, "lr_scales": {"embed": 0.5, "e": 3.0}})
    a, _ = base[2].update(base[3][0], base[2].init(base[1]), base[1])
    b, _ = scaled[2].update(scaled[3][0], scaled[2].init(scaled[1]), scaled[1])
    np.testing.assert_allclose(b["embed"], 0.5 * a["embed"])
    np.testing.assert_allclose(b["blocks"]["mlp"]["up"], a["blocks"]["mlp"]["up"])  # no "e" in its path
    np.testing.assert_allclose(b["blocks"]["attention"]["key"], 3 * a["blocks"]["attention"]["key"], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "reference"),
    [
        ({"schedule": "constant"}, optax.constant_schedule(1.0)),
        ({"schedule": "linear", "final_lr_frac": 0.1}, optax.linear_schedule(1.0, 0.1, 100)),
        ({"schedule": "cosine", "final_lr_frac": 0.1}, optax.cosine_decay_schedule(1.0, 100, alpha=0.1)),
        (
            {"schedule": "wsd", "decay_frac": 0.25, "final_lr_frac": 0.0},
            optax.join_schedules([optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, 25)], [75]),
        ),
    ],
    ids=lambda v: v["schedule"] if isinstance(v, dict) else "",
)
def test_schedules_equal_optax(values, reference):
    cfg = OptimConfig(peak_lr=1.0, **values)
    found = [learning_rate(cfg, jnp.asarray(s), jnp.asarray(100)) for s in range(100)]
    np.testing.assert_allclose(found, [reference(s) for s in range(100)], atol=1e-6)


def test_warmup_rises_in_equal_steps_and_then_decays():
    cfg = OptimConfig(peak_lr=1.0, schedule="cosine", warmup_steps=10, final_lr_frac=0.0)
    found = np.array([learning_rate(cfg, jnp.asarray(s), jnp.asarray(50)) for s in range(50)])
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10, rtol=1e-5)
    np.testing.assert_allclose(found[10:], [optax.cosine_decay_schedule(1.0, 40)(s) for s in range(40)], atol=1e-5)


def test_an_unknown_optimizer_or_schedule_is_refused_by_its_nearest_name():
    with pytest.raises(UserError, match=r"optim.name 'adamv' is not one of adamw, muon; did you mean 'adamw'\?"):
        setup({"name": "adamv"})
    with pytest.raises(UserError, match=r"optim.schedule 'cosin' .*did you mean 'cosine'\?"):
        learning_rate(OptimConfig(schedule="cosin"), jnp.asarray(0), jnp.asarray(1))


def test_muon_reads_a_stack_of_experts_as_matrices_of_their_own():
    """[L, E, D, F] is L x E matrices of D inputs, as the declaration says."""
    rng = np.random.default_rng(0)
    metadata = {("experts",): {"n_stacked": 2, "n_in": 1, "axes": ("layers", "expert", "embed", "mlp")}}
    grad = rng.normal(size=(2, 3, 8, 16)).astype(np.float32)
    rule = scale_by_muon(0.0, metadata)
    found, _ = rule.update({"experts": grad}, rule.init({"experts": grad}))
    for layer, expert in np.ndindex(2, 3):
        expected = newton_schulz(grad[layer, expert].astype(np.float64)) * 2**0.5
        np.testing.assert_allclose(found["experts"][layer, expert], expected, atol=2e-4)


@pytest.mark.parametrize("cut", [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "pipeline": 2}], ids=str)
def test_muon_deals_matrices_to_devices_and_gathers_none(cut):
    """The directions are those of one device, and the exchanges are as large as the planner says."""
    experts = {"mlp": {"kind": "moe", "moe": {"experts": 4, "top_k": 2}}, "n_layers": 4}
    cfg = make_config(MODERN | experts, optim={"name": "muon"})
    _, model, metadata = abstract_model(cfg.model)
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(model).items()}
    hidden = [path for path, weight in metadata.items() if treat(cfg.optim, path, weight).group.rule == "muon"]
    rule = scale_by_muon(0.95, {("/".join(path),): metadata[path] for path in hidden})
    rng = np.random.default_rng(0)
    grads = {"/".join(path): rng.normal(size=shapes[path]).astype(np.float32) for path in hidden}
    alone, _ = jax.jit(rule.update)(grads, rule.init(grads))

    axes = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert", "pipeline"), 1) | cut
    mesh = make_mesh(axes)
    places = {"/".join(path): sharding(mesh, metadata[path]["axes"]) for path in hidden}
    with jax.set_mesh(mesh):
        laid = jax.device_put(grads, places), jax.device_put(rule.init(grads), MuonState(places))
        step = jax.jit(rule.update, out_shardings=(places, MuonState(places))).lower(*laid).compile()
        dealt, _ = step(*laid)
    for name, direction in alone.items():
        np.testing.assert_allclose(dealt[name], direction, atol=1e-5)
    exchanges = Program(step.as_text()).collectives()
    assert {exchange.kind for exchange in exchanges} == {"all-to-all"}
    sent = sum(exchange.wire_bytes * exchange.times for exchange in exchanges)
    assert sent == orthogonal_costs(cfg.model, "muon", (), tuple(axes.items())).sent_bytes
