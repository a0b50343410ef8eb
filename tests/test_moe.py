"""Mixtures of experts: the same as a loop over experts, dropless, balanced, on every mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, trainable_on
from flax import nnx
from mesh_losses import packed_batch
from test_generate import greedy_by_full_forward, model_parts

from gptjax.config import OptimConfig
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.nn.attention import reference_attention
from gptjax.nn.grouped import grouped_product
from gptjax.nn.layers import Context
from gptjax.nn.moe import MoE
from gptjax.nn.transformer import abstract_model, bind, count_params, flops_per_token, init_params, logits
from gptjax.nn.weights import Adapted, hold, merge
from gptjax.optim import treat
from gptjax.sampling import Sampling
from gptjax.step import count_trained, init_state, make_train_step

E, K = 8, 2
EXPERTS = {"experts": E, "top_k": K, "width": 16}


def mixture(model: dict, **moe) -> dict:
    """A model with experts in place of its MLP."""
    kept = {key: value for key, value in model.items() if key not in ("mlp", "conv_width")}
    return {**kept, "mlp": {"kind": "moe", "width": 48, "moe": {**EXPERTS, **moe}}, "scan_layers": True}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


ACTIVATIONS = {
    "gelu": lambda h, gate: 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3))),
    "swiglu": lambda h, gate: h * gate / (1 + np.exp(-gate)),
    "clamped_swiglu": lambda h, gate: (
        (np.clip(h, -7, 7) + 1) * np.minimum(gate, 7) / (1 + np.exp(-1.702 * np.minimum(gate, 7)))
    ),
    "relu2": lambda h, gate: np.maximum(h, 0) ** 2,
}


def by_numpy(x: np.ndarray, w: dict, moe) -> np.ndarray:
    """A loop over tokens and their experts, in float64."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), w)

    def one_mlp(token, w, e=...):
        def product(name, h):
            return h @ w[name][e] + w.get(f"{name}_bias", np.zeros((E, 1)))[e] if name in w else None

        return product("down", ACTIVATIONS[moe.activation](product("up", token), product("gate", token)))

    y = np.zeros_like(x)
    for index in np.ndindex(x.shape[:2]):
        logits = x[index] @ w["router"] + w.get("router_bias", 0)
        scores = softmax(logits) if moe.scores == "softmax" else 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(scores + w.get("balance", 0)))[: moe.top_k]
        gates = scores[chosen] / (scores[chosen].sum() if moe.normalize else 1) * moe.scale
        y[index] = sum(gate * one_mlp(x[index], w, e) for gate, e in zip(gates, chosen, strict=True))
        y[index] += one_mlp(x[index], w["shared"]) if "shared" in w else 0
    return y


FORMS = {
    "softmax": (MODERN, {"normalize": False}),
    "biased": (GPT2_LIKE, {"activation": "gelu", "shared_experts": 2}),
    "clamped": ({**MODERN, "bias": True}, {"activation": "clamped_swiglu", "router_bias": True}),
    "sigmoid": (MODERN, {"scores": "sigmoid", "scale": 2.5, "balance_rate": 1e-3, "top_k": 3}),
}


def layer_and_weights(model: dict):
    """A layer of experts, with every weight random and large enough to count."""
    cfg = make_config(model).model
    graph, state = nnx.split(MoE(cfg, nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(1), 20))
    weights = jax.tree.map(lambda a: 0.3 * jax.random.normal(next(keys), a.shape), nnx.to_pure_dict(state))
    ctx = Context(reference_attention, None, None, jnp.arange(32)[None])
    return cfg, weights, jax.jit(lambda w, x: nnx.merge(graph, nnx.State(w))(x, ctx))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_equals_a_loop_over_experts(form):
    model, moe = FORMS[form]
    cfg, weights, run = layer_and_weights(mixture(model, **moe))
    x = np.asarray(jax.random.normal(jax.random.key(2), (3, 32, cfg.d_model)))
    np.testing.assert_allclose(run(weights, x)[0], by_numpy(x, weights, cfg.mlp.moe), atol=1e-5, rtol=1e-5)


def test_no_token_is_dropped_where_all_choose_one_expert():
    cfg, weights, run = layer_and_weights(mixture(MODERN, top_k=1))
    x = np.abs(np.asarray(jax.random.normal(jax.random.key(2), (8, 32, cfg.d_model))))
    weights["router"] = weights["router"].at[:, 5].set(3.0)  # x is positive: its score is the highest
    y, aux = run(weights, x)
    np.testing.assert_allclose(y, by_numpy(x, weights, cfg.mlp.moe), atol=1e-5, rtol=1e-4)
    assert float(aux["load_max"][0] / aux["load_max"][1]) == E
    assert float(aux["load_cv"][0] / aux["load_cv"][1]) == pytest.approx((E - 1) ** 0.5)


def every_expert_for_every_token(x, w, gates):
    """The layer's output by products of all tokens with all experts; gates [B, T, E]."""
    h = jnp.einsum("BTD,EDF->BTEF", x, w["up"]) * jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, w["gate"]))
    return jnp.einsum("BTEF,EFD,BTE->BTD", h, w["down"], gates)


def test_gradients_equal_those_of_all_experts_with_gates_of_zero():
    cfg, weights, run = layer_and_weights(mixture(MODERN))
    x = jax.random.normal(jax.random.key(2), (3, 32, cfg.d_model))

    def dense(w, x):
        scores = jax.nn.softmax(x @ w["router"])
        chosen = jax.nn.one_hot(jax.lax.top_k(scores, K)[1], E).sum(-2)
        gates = scores * chosen / (scores * chosen).sum(-1, keepdims=True)
        return jnp.sin(every_expert_for_every_token(x, w, gates)).sum()

    found = jax.grad(lambda w, x: jnp.sin(run(w, x)[0]).sum(), (0, 1))(weights, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()),
        found,
        jax.grad(dense, (0, 1))(weights, x),
    )


def test_experts_in_8_bits_and_with_adapters_compute_what_their_matrices_do():
    cfg, weights, run = layer_and_weights(mixture(MODERN))
    x = jax.random.normal(jax.random.key(2), (2, 32, cfg.d_model))
    held, plain = dict(weights), dict(weights)
    for name in ("up", "gate", "down"):
        declared = {"role": "matrix", "axes": ("expert", "embed", "mlp"), "n_in": 1, "n_stacked": 1}
        n_in, n_out = weights[name].shape[1:]
        a, b = (jax.random.normal(jax.random.key(3), (E, *shape)) for shape in ((n_in, 2), (2, n_out)))
        held[name] = Adapted(hold(weights[name], declared, "int8"), 0.1 * a, b, 0.5)
        plain[name] = merge(held[name], 1)
    np.testing.assert_allclose(run(held, x)[0], run(plain, x)[0], atol=2e-5, rtol=1e-4)


def test_counts_and_flops_are_of_the_experts_that_a_token_passes():
    cfg = make_config(mixture(MODERN, first_dense_layers=1)).model
    one = 3 * cfg.d_model * 16
    whole, active = count_params(cfg), count_params(cfg, active=True)
    assert whole["total"] - active["total"] == whole["blocks"] - active["blocks"] == (E - K) * one
    more = make_config(mixture(MODERN, first_dense_layers=1, experts=2 * E)).model
    assert flops_per_token(more) - flops_per_token(cfg) == 6 * E * cfg.d_model  # the router's
    lora = make_config(mixture(MODERN), lora={"rank": 2})
    counts = count_trained(lora)
    assert counts.frozen_active < counts.products
    assert counts.active_adapters < counts.trained


@pytest.mark.parametrize("sizes", [[0, 130, 1, 0, 160], [300, 0, 0, 0, 0], [0, 0, 0, 0, 0]], ids=str)
def test_grouped_products_and_their_gradients_leave_out_rows_of_no_group(sizes):
    rng = np.random.default_rng(0)
    x, w, slope = (rng.normal(size=shape).astype(np.float32) for shape in ((300, 8), (5, 8, 6), (300, 6)))

    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(lambda x, w: grouped_product(x, w, jnp.array(sizes)), x, w)
        return y, *pull(jnp.asarray(slope))

    y, x_grad, w_grad = run(x, w)
    group = np.repeat(np.arange(6), [*sizes, 300 - sum(sizes)])
    padded = np.concatenate([w, np.zeros_like(w[:1])])
    np.testing.assert_allclose(y, np.einsum("rd,rdf->rf", x, padded[group]), atol=1e-5)
    np.testing.assert_allclose(x_grad, np.einsum("rf,rdf->rd", slope, padded[group]), atol=1e-5)
    expected = np.einsum("rd,rf,re->edf", x, slope, np.eye(6)[group])[:5]
    np.testing.assert_allclose(w_grad, expected, atol=2e-5)


def run_steps(cfg, devices: int = 1, steps: int = 1, **axes):
    """State and metrics after some steps."""
    t = trainable_on(cfg, devices, **axes)
    state, step = init_state(t), make_train_step(t)
    losses = []
    for number in range(steps):
        batch = jax.device_put(packed_batch(number), t.batch_sharding)
        state, metrics = step(state, batch)
        losses.append(float(metrics["train/loss"]))
    return state, metrics, losses


@pytest.mark.whole
def test_microbatches_add_up_and_the_balance_is_their_mean():
    """router_z is a mean over tokens, so that M = 4 is M = 1; load_balance is of each microbatch, as it says."""
    model = mixture(MODERN, balance_rate=1e-3)
    train = {"batch_sequences": 8, "aux_weights": {"router_z": 0.1}}
    whole, metrics, _ = run_steps(make_config(model, train=train))
    parts, others, _ = run_steps(make_config(model, train={**train, "microbatches": 4}))
    for name in ("train/loss", "train/router_z", "grad_norm"):
        np.testing.assert_allclose(others[name], metrics[name], rtol=2e-5, err_msg=name)
    bias, other = (state.params["blocks"]["mlp"]["balance"] for state in (whole, parts))
    np.testing.assert_allclose(other, bias, rtol=1e-5)  # of the loads of the whole batch, added up
    cfg = make_config(model).model
    aux_of = jax.jit(lambda p, b: bind(abstract_model(cfg)[0], p)(b["tokens"], b["positions"], b["segments"])[1])
    params, batch = init_params(cfg, jax.random.key(1337)), packed_batch(0)
    of_each = [aux_of(params, {name: x[i::4] for name, x in batch.items()})["load_balance"] for i in range(4)]
    expected = sum(total for total, _ in of_each) / sum(weight for _, weight in of_each)
    np.testing.assert_allclose(others["train/load_balance"], expected, rtol=1e-5)
    assert abs(float(metrics["train/load_balance"]) - float(expected)) > 1e-4


@pytest.mark.whole
def test_a_balancing_bias_moves_by_its_rate_against_the_load():
    model = mixture({**MODERN, "n_layers": 1}, balance_rate=0.01)
    cfg = make_config(model, optim={"peak_lr": 0.02, "warmup_steps": 2})
    t = trainable_on(cfg)
    step, batch = make_train_step(t), packed_batch(0)
    state, metrics = step(init_state(t), batch)
    bias = np.asarray(state.params["blocks"]["mlp"]["balance"])[0]
    np.testing.assert_allclose(np.abs(bias), 0.005, rtol=1e-5)  # half of the rate, in the first of two warm-up steps
    free = make_config({**model, "mlp": {**model["mlp"], "moe": EXPERTS}})
    np.testing.assert_allclose(metrics["grad_norm"], run_steps(free)[1]["grad_norm"], rtol=1e-6)
    forced = init_state(t)  # with a bias of one expert that wins every choice
    forced.params["blocks"]["mlp"]["balance"] = jnp.zeros((1, E)).at[0, 3].set(10.0)
    after, metrics = step(forced, batch)
    assert float(metrics["train/load_max"]) == pytest.approx(E / K)
    assert float(after.params["blocks"]["mlp"]["balance"][0, 3]) == pytest.approx(10 - 0.005)
    assert t.metadata["blocks", "mlp", "balance"]["factors"]["lr"] == 0.01
    treated = treat(OptimConfig(name="muon", peak_lr=0.02), ("balance",), t.metadata["blocks", "mlp", "balance"])
    assert (treated.group.rule, treated.lr, treated.decay) == ("sign", 0.5, 0.0)


@pytest.mark.whole
def test_dense_layers_come_first_and_decoding_equals_the_full_forward():
    moe = {"first_dense_layers": 1, "shared_experts": 1}
    cfg, params, tokenizer = model_parts(mixture({**MODERN, "n_layers": 3}, **moe))
    assert params["dense_blocks"]["mlp"]["up"].shape == (1, cfg.d_model, 48)
    assert params["blocks"]["mlp"]["up"].shape == (2, E, cfg.d_model, 16)
    lm = LanguageModel(cfg, params, tokenizer)
    found = lm.complete(["A", "BCDEF"], 6, Sampling(temperature=0))
    for completion in found:
        tokens, logprobs = greedy_by_full_forward(lm, completion.prompt, 6)
        assert completion.tokens == tokens
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=2e-5)
    run = make_config(MODERN, run={"scan_layers": True, "remat": "full"}).run
    model, ids = bind(abstract_model(cfg, run)[0], lm_params(lm)), np.arange(32, dtype=np.int32)[None]
    scanned = jax.jit(lambda ids: logits(model, model(ids)[0]))(ids)
    np.testing.assert_allclose(scanned, lm.logits(ids), atol=2e-4)


def lm_params(lm: LanguageModel) -> dict:
    """The weights of a loaded model, its layers stacked again."""
    rest, layers = lm.engine.params
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *layers[1:])
    return {**rest, "dense_blocks": jax.tree.map(lambda a: a[None], layers[0]), "blocks": stack}


def test_no_array_has_all_tokens_of_all_experts():
    cfg = make_config(mixture({**MODERN, "n_layers": 1}, experts=16), train={"batch_sequences": 8})
    t = trainable_on(cfg)
    program = make_train_step(t).compiled.lower(t.state, packed_batch(0)).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\d+\[([\d,]+)\]", program)]
    assert max(sizes) < 16 * 8 * 32 * 16  # experts x tokens x the smaller width


MESHES = [
    pytest.param("muon", {"expert": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.whole),
    pytest.param("adamw", {"expert": 2, "context": 2, "data": 2}, marks=pytest.mark.whole),
]
SLOW_MESHES = [  # pytest -m slow -n 0 tests/test_moe.py
    {"expert": 8},
    {"fsdp": 8},
    {"expert": 2, "data": 4},
    {"expert": 4, "fsdp": 2},
    {"expert": 4, "tensor": 2},
    {"expert": 4, "context": 2},
    {"data": 4, "tensor": 2},
    {"data": 4, "context": 2},
    {"fsdp": 4, "tensor": 2},
    {"tensor": 2, "context": 4},
    {"data": 2, "fsdp": 4},
    {"context": 2, "fsdp": 4},
]
ON_MESHES = {
    "adamw": make_config(
        mixture(GPT2_LIKE, activation="clamped_swiglu", router_bias=True, shared_experts=1, balance_rate=1e-3),
        train={"batch_sequences": 8, "aux_weights": {"load_balance": 0.01, "router_z": 0.001}},
    ),
    "muon": make_config(
        mixture(MODERN, first_dense_layers=1), optim={"name": "muon", "peak_lr": 0.02, "lr_scales": {"embed": 0.2}}
    ),
}


@pytest.fixture(scope="module")
def one_device():
    return {name: run_steps(cfg, steps=5)[2] for name, cfg in ON_MESHES.items()}


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        *MESHES,
        *(pytest.param(name, axes, marks=pytest.mark.slow) for axes in SLOW_MESHES for name in ON_MESHES),
    ],
    ids=str,
)
def test_every_mesh_gives_the_losses_of_one_device(one_device, name, axes):
    state, _, losses = run_steps(ON_MESHES[name], 8, steps=5, **axes)
    np.testing.assert_allclose(losses, one_device[name], atol=1e-5)
    up = state.params["blocks"]["mlp"]["up"]
    assert up.sharding.shard_shape(up.shape)[1] == E // axes.get("expert", 1)


@pytest.mark.parametrize(
    ("moe", "axes", "complaint"),
    [
        ({"top_k": 9}, {}, r"top_k 9 is more than model.mlp.moe.experts 8; make it at most that"),
        ({"first_dense_layers": 2}, {}, r"first_dense_layers 2 must be less than model.n_layers 2"),
        ({"experts": 6}, {"expert": 4}, r"experts 6 cannot be cut into 4 .* make it a multiple of 4"),
        ({"width": 15}, {"tensor": 2}, r"moe.width 15 cannot be cut into 2 equal parts"),
        (None, {"expert": 2}, r"mesh.expert 2 needs model.mlp.kind moe"),
    ],
    ids=str,
)
def test_a_wrong_combination_is_one_line(moe, axes, complaint):
    with pytest.raises(UserError, match=complaint):
        model = GPT2_LIKE if moe is None else mixture(GPT2_LIKE, **moe)
        trainable_on(make_config(model), max(1, *axes.values()) if axes else 1, **axes)
