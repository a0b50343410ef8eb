"""The model against other people's numbers and code."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, without_zeros
from flax import nnx

from gptjax.configfile import config_from_dict
from gptjax.loss import LossSpec, next_token_loss
from gptjax.nn.attention import AttentionInput, attention, causal_mask
from gptjax.nn.convolution import causal_convolution
from gptjax.nn.layers import gelu, standard_normal
from gptjax.nn.products import add_bias
from gptjax.nn.transformer import Inputs, abstract_model, bind, count_params, init_params, logits, split_layers
from gptjax.nn.weights import project_heads
from gptjax.presets import PRESETS

KINDS = {"gpt2": GPT2_LIKE, "modern": MODERN}


def run(model: dict, tokens, params=None, **inputs):
    """Logits and hidden states of a model with these config values."""
    cfg = make_config(model)
    params = init_params(cfg.model, jax.random.key(0)) if params is None else params
    bound = bind(abstract_model(cfg.model, cfg.run)[0], params)
    hidden, kv = bound(jnp.asarray(tokens), **inputs)
    return logits(bound, hidden), kv


def some_params(model: dict):
    """First values, and something in place of zeros."""
    return without_zeros(init_params(make_config(model).model, jax.random.key(0)))


def some_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, GPT2_LIKE["vocab_size"], shape, dtype=np.int32)


# Radford et al. 2019 (as released), Touvron et al. 2023, Dubey et al. 2024, Allal et al. 2025, from the cards.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-2-70b": 68_976_648_192,
    "smollm2-135m": 134_515_008,
}


def test_every_preset_has_a_published_count():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameter_counts_are_the_published_ones(preset):
    assert count_params(config_from_dict({"model": {"preset": preset}}).model)["total"] == PUBLISHED[preset]


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_no_logit_depends_on_a_later_token(model):
    """By gradient: the derivative of position t by the embedding of token s is zero exactly where s > t."""
    cfg = make_config({**model, "init": "gpt2"}).model
    graphdef, params = abstract_model(cfg)[0], some_params(model)
    T = 8
    tokens = np.arange(T)[None]  # all different, so that each row of the embedding belongs to one position

    def hidden_sums(embed):
        hidden, _ = bind(graphdef, {**params, "embed": embed})(tokens)
        return hidden[0] @ jnp.arange(1.0, cfg.d_model + 1)

    slopes = jax.jit(jax.jacrev(hidden_sums))(params["embed"])[:, :T]
    np.testing.assert_array_equal(np.abs(slopes).sum(-1) > 0, np.tri(T, dtype=bool))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_equals_jax_nn(heads):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 9, 4 if i == 0 else heads, 8)) for i in range(3))
    positions = jnp.arange(9)[None]
    ours = attention(q, k, v, causal_mask(positions, positions), AttentionInput(positions))
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-6)


def test_a_convolution_equals_numpys_for_each_channel_and_document():
    x, taps = np.random.default_rng(0).normal(size=(2, 11, 3)), np.random.default_rng(1).normal(size=(4, 3))
    starts = np.array([0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5])  # of the document at each position
    y, recent = causal_convolution(jnp.asarray([np.arange(11) - starts]), jnp.asarray(x), jnp.asarray(taps))
    for row, document, channel in np.ndindex(2, 2, 3):
        inside = slice(0, 5) if document == 0 else slice(5, 11)
        given = x[row, inside, channel]
        expected = given + np.convolve(given, taps[:, channel])[: len(given)]
        np.testing.assert_allclose(y[row, inside, channel], expected, atol=1e-6)
    np.testing.assert_array_equal(recent, x[:, -3:].astype(np.float32))


def test_a_wider_convolution_keeps_no_more_for_the_backward_pass():
    def kept(width: int) -> int:
        model = {**MODERN, "conv_width": width, "scan_layers": True}

        def backward(params):
            return jax.vjp(lambda p: run(model, some_tokens(2, 16), p)[0], params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, some_params(model))))

    stream = MODERN["n_layers"] * 2 * 16 * MODERN["d_model"]
    assert kept(12) - kept(4) < stream


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("other", [{"scan_layers": True}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_scan_and_remat_change_nothing(model, other):
    tokens = some_tokens(2, 16)
    params = some_params(model)

    def gradient(extra):
        return jax.grad(lambda p: jnp.square(run({**model, **extra}, tokens, p)[0]).mean())(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
        gradient({"scan_layers": False}),
        gradient(other),
    )


class WithAux(nnx.Module):
    """Blocks that also return the mean square of what they put out, and its weight."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x, ctx, cache):
        x, cache, aux = self.block(x, ctx, cache)
        return x, cache, {**aux, "size": (jnp.square(x).mean(), jnp.float32(1))}


@pytest.mark.whole
@pytest.mark.parametrize("other", [{}, {"scan_layers": True}, {"scan_layers": True, "remat": "full"}], ids=str)
def test_what_blocks_return_besides_is_summed_over_the_layers(other):
    made, tokens = make_config(MODERN, run=other), some_tokens(2, 16)
    cfg = made.model
    params = some_params(MODERN)

    def size(params, cfg=cfg):
        model = bind(abstract_model(cfg, made.run)[0], params)
        assert model(tokens)[1] == {}
        model.blocks = WithAux(model.blocks)
        total, weight = model(tokens)[1]["size"]
        return total, weight

    first = {**params, "blocks": jax.tree.map(lambda w: w[:1], params["blocks"])}
    (total, weight), (of_first, one) = size(params), size(first, dataclasses.replace(cfg, n_layers=1))
    assert (weight, one) == (cfg.n_layers, 1)
    rest, layers = split_layers(params)
    model = bind(abstract_model(cfg, made.run)[0], {**rest, "blocks": layers[0]})
    model.blocks = WithAux(model.blocks)
    inputs = Inputs(tokens)
    apart = model.apply_blocks(model.embed_inputs(inputs), inputs, layers=layers)[2]["size"]
    np.testing.assert_allclose(apart, (total, weight), rtol=1e-5)
    assert total > of_first > 0
    slopes = jax.grad(lambda p: size(p)[0])(params)
    assert all(
        np.abs(slope).max(axis=tuple(range(1, slope.ndim))).min() > 0 for slope in jax.tree.leaves(slopes["blocks"])
    )


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_remat_computes_again_what_it_says(model):
    """`dots` keeps what the weights' products give, so attention's two alone are done again; `full`, none."""
    tokens = some_tokens(2, 16)
    params = init_params(make_config(model).model, jax.random.key(0))

    def products(remat):
        other = {**model, "remat": remat, "scan_layers": True}
        gradient = jax.grad(lambda p: jnp.square(run(other, tokens, p)[0]).mean())
        return str(jax.make_jaxpr(gradient)(params)).count("dot_general")

    none, dots, full = map(products, ("none", "dots", "full"))
    assert dots == none + 2
    assert full > dots


@pytest.mark.whole
def test_initial_loss_of_gpt2_is_that_of_its_initialisation():
    """ln V + d 0.02^2 / 2: the tied head's logits are normal with variance d 0.02^2."""
    model = {"n_layers": 2, "d_model": 768, "n_heads": 12, "context_length": 64, "vocab_size": 50257}
    tokens = np.random.default_rng(0).integers(0, 50257, (4, 65))
    found, _ = run(model, tokens[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:]).mean()
    assert abs(loss - (np.log(50257) + 768 * 0.02**2 / 2)) < 0.05


def test_first_values_have_the_quantiles_of_a_normal():
    values = np.asarray(standard_normal(jax.random.key(0), (1000, 1000)))
    shares = np.array([0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
    np.testing.assert_allclose(np.quantile(values, shares), jax.scipy.stats.norm.ppf(shares), atol=0.05)
    assert abs(values.mean()) < 0.005
    assert abs(values.std() - 1) < 0.005
    assert len(np.unique(values)) > 2**16 * 0.99


def test_a_packed_document_does_not_see_its_neighbour():
    a, b = some_tokens(1, 7, seed=1), some_tokens(1, 9, seed=2)
    packed = np.concatenate([a, b], axis=1)
    positions = np.concatenate([np.arange(7), np.arange(9)])[None]
    segments = np.array([[0] * 7 + [1] * 9])
    for model in KINDS.values():
        params = some_params(model)
        together, _ = run(model, packed, params, positions=positions, segments=segments)
        np.testing.assert_allclose(together[:, :7], run(model, a, params)[0], atol=1e-5)
        np.testing.assert_allclose(together[:, 7:], run(model, b, params)[0], atol=1e-5)


@pytest.mark.parametrize("n_chunks", [1, 4])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_chunked_loss_equals_optax_in_value_and_gradient(n_chunks, cap):
    B, T, D, V, vocab = 2, 8, 16, 24, 19
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, vocab, (B, T))
    weights = rng.integers(0, 2, (B, T)).astype(np.float32)

    def reference(hidden, head):
        raw = (hidden @ head)[..., :vocab]
        raw = raw if cap is None else cap * jnp.tanh(raw / cap)
        z = jax.nn.logsumexp(raw, axis=-1)
        per_token = optax.softmax_cross_entropy_with_integer_labels(raw, targets) + 0.1 * z**2
        return jnp.sum(weights * per_token)

    def ours(hidden, head):
        return next_token_loss(hidden, head, targets, weights, LossSpec(vocab, n_chunks, cap, z_loss=0.1))[0]

    expected, expected_grads = jax.value_and_grad(reference, argnums=(0, 1))(hidden, head)
    found, grads = jax.value_and_grad(ours, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(ours(hidden, head), expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, expected_grads)


def test_the_chunked_loss_never_holds_all_logits():
    """Read off the compiled program: no buffer of B x T x V floats, which the unchunked one has."""
    B, T, D, V = 16, 64, 8, 1000

    def program(n_chunks):
        def loss(h, w):
            return next_token_loss(h, w, jnp.zeros((B, T), int), jnp.ones((B, T)), LossSpec(V, n_chunks))[0]

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.zeros((B, T, D)), jnp.zeros((D, V)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert program(1) > B * T * V * 4
    assert program(8) < program(1) / 3


def test_dropout_keeps_the_mean_and_needs_a_key():
    tokens = some_tokens(2, 8)
    model = {**GPT2_LIKE, "dropout": 0.5}
    still, _ = run(model, tokens)
    np.testing.assert_array_equal(still, run(GPT2_LIKE, tokens)[0])
    moved, _ = run(model, tokens, dropout_key=jax.random.key(1))
    assert np.abs(moved - still).max() > 1e-3


def test_gelu_is_cut_for_a_cpus_threads_only_where_there_is_much_of_it():
    def is_cut(tokens: int) -> bool:
        compiled = jax.jit(lambda x, bias: gelu(x + bias)).lower(jnp.ones((tokens, 512)), jnp.ones(512)).compile()
        return '"outer_dimension_partitions":["' in compiled.as_text()

    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=True), atol=2e-6)
    if not is_cut(768):
        pytest.skip("one core, for which nothing is cut")
    assert not is_cut(8)


def test_bfloat16_matmuls_keep_float32_weights_and_logits():
    cfg = make_config({**MODERN, "dtype": "bfloat16", "init": "gpt2"}).model
    params = init_params(cfg, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    low, _ = run({**MODERN, "dtype": "bfloat16", "init": "gpt2"}, some_tokens(2, 16), params)
    high, _ = run({**MODERN, "init": "gpt2"}, some_tokens(2, 16), params)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, atol=0.05)
    assert np.abs(low - high).max() > 0


@pytest.mark.parametrize("joined", [True, False])
def test_products_with_gradients_of_their_own_are_plain_ones(joined):
    rng = np.random.default_rng(0)
    x, *rest = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(3, 5, 8), (8, 4, 2), (8, 2, 2), (2, 2), (5, 8)]
    )

    def ours(x, a, b, bias, rows):
        first, second = project_heads(add_bias(x, rows), [a, b], joined)
        return jnp.sin(first).sum() + jnp.cos(add_bias(second, bias)).sum()

    def plain(x, a, b, bias, rows):
        first, second = (jnp.einsum("BTD,DHK->BTHK", x + rows, w) for w in (a, b))
        return jnp.sin(first).sum() + jnp.cos(second + bias).sum()

    values, expected = (jax.value_and_grad(f, argnums=(0, 1, 2, 3, 4))(x, *rest) for f in (ours, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), values, expected)
