"""Every way to compute attention against the plain one, in values and gradients, and which one is chosen where."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, trainable_on, without_zeros
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from gptjax.errors import UserError
from gptjax.nn.attention import AttentionCache, AttentionInput, CacheSlots, reference_attention
from gptjax.nn.backends import ATTENTIONS, BACKENDS, for_mesh
from gptjax.nn.blocked import blocked_attention
from gptjax.nn.kernels import splash_attention
from gptjax.nn.ring import ring_attention, zigzag
from gptjax.nn.transformer import abstract_model, bind, init_params
from gptjax.sharding import make_mesh

B, T, H, G, K = 2, 136, 4, 2, 16  # neither T nor K is a multiple of the TPU's 128 lanes
POSITIONS = jnp.arange(T)[None]
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (B, T)), axis=1)


def run(kernel, segments, order=None, sinks=None, **features):
    """Attention of the same random q, k, v, and the gradients of a weighted sum of it, in the row's own order."""
    order = np.arange(T) if order is None else order
    q, k, v, weights = (jax.random.normal(jax.random.key(i), (B, T, n, K)) for i, n in enumerate((H, G, G, H)))
    segments = None if segments is None else segments[:, order]

    def weighted(q, k, v, sinks):
        inputs = AttentionInput(POSITIONS[:, order], segments, sinks=sinks, **features)
        y, kv = kernel(q[:, order], k[:, order], v[:, order], inputs)
        for new, given in zip(kv, (k, v), strict=True):
            assert new.shape == (B, G, T, K) and new.dtype == given.dtype
        y = y[:, np.argsort(order)]
        return jnp.sum(y * weights), y

    wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    gradients, y = jax.jit(jax.grad(weighted, argnums=wanted, has_aux=True))(q, k, v, sinks)
    return y, *gradients


@pytest.fixture(scope="module", params=[None, SEGMENTS], ids=["whole", "packed"])
def case(request):
    return request.param, run(reference_attention, request.param)


def assert_same(found, expected):
    for name, a, b in zip(("y", "q", "k", "v", "sinks")[: len(expected)], found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


def test_xla_equals_the_reference(case):
    assert_same(run(ATTENTIONS["xla"], case[0]), case[1])


def test_blocks_of_queries_equal_the_reference(case):
    assert_same(run(blocked_attention, case[0]), case[1])


def test_splash_interpreted_equals_the_reference(case):
    assert_same(run(partial(splash_attention, interpret=True), case[0]), case[1])


def test_splash_on_parts_of_batch_and_heads_equals_the_reference(case):
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "context": 1}, jax.devices()[:4])):
        assert_same(run(partial(splash_attention, interpret=True), case[0]), case[1])


@pytest.mark.parametrize("axes", [{"context": 4}, {"data": 2, "tensor": 2, "context": 2}], ids=str)
def test_ring_equals_the_reference(case, axes):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | axes
    with jax.set_mesh(make_mesh(sizes, jax.devices()[: int(np.prod(list(axes.values())))])):
        assert_same(run(ring_attention, case[0], zigzag(T, axes["context"])), case[1])


LOCAL = {"window": 37, "cap": 2.0}
SINKS = jnp.linspace(-1.0, 2.0, H)


def test_windows_caps_and_sinks_are_the_same_in_every_kernel():
    expected = run(reference_attention, SEGMENTS, sinks=SINKS, **LOCAL)
    assert_same(run(blocked_attention, SEGMENTS, sinks=SINKS, **LOCAL), expected)
    assert_same(run(partial(splash_attention, interpret=True), SEGMENTS, sinks=SINKS, **LOCAL), expected)
    assert np.abs(expected[-1]).min() > 1e-2
    assert_same(run(ATTENTIONS["xla"], None, window=37), run(reference_attention, None, window=37))
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 4}, jax.devices()[:4])):
        assert_same(run(ring_attention, SEGMENTS, zigzag(T, 4), **LOCAL), run(reference_attention, SEGMENTS, **LOCAL))


LOCAL_MODEL = {**MODERN, "n_layers": 5, "attention": {"window": 5, "pattern": ["local", "local", "global"]}}


@pytest.mark.whole
@pytest.mark.parametrize("features", [{}, {"softcap": 1.0, "sinks": True}], ids=str)
def test_a_scan_over_a_pattern_of_layers_equals_the_unrolled_one(features):
    """Five layers of a pattern of three: one group, and a rest of two."""
    model = {**LOCAL_MODEL, "attention": {**LOCAL_MODEL["attention"], **features}}
    tokens, found = np.random.default_rng(0).integers(0, 61, (2, 16)), []
    for scan_layers in (True, False):
        cfg = make_config(model, run={"scan_layers": scan_layers, "attention": "blocked"})
        graphdef, params = (
            abstract_model(cfg.model, cfg.run)[0],
            without_zeros(init_params(cfg.model, jax.random.key(0))),
        )
        value_and_grad = jax.value_and_grad(lambda p, g=graphdef: jnp.square(bind(g, p)(tokens)[0]).mean())
        found.append(jax.jit(value_and_grad)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), *found)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_to_a_cache_equals_the_reference_token_by_token(window):
    """Wherever in the cache the first token goes: the slots are used in a circle."""
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, n, K)) for i, n in enumerate((H, G, G)))
    expected, kv = reference_attention(q, k, v, AttentionInput(POSITIONS, window=window))
    n_slots, late = T, np.iinfo(np.int32).max
    cache, positions = (jnp.zeros((B, G, n_slots, K)),) * 2, jnp.full((B, n_slots), late)

    @jax.jit
    def attend(t, cache, positions):
        slot = (t + 7) % n_slots
        positions = positions.at[:, slot].set(t)
        inputs = AttentionInput(jnp.full((B, 1), t), None, window, AttentionCache(cache, CacheSlots(positions, slot)))
        now = [jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1) for x in (q, k, v)]
        return *ATTENTIONS["cached"](*now, inputs), positions

    for t in range(T):
        y, cache, positions = attend(t, cache, positions)
        np.testing.assert_allclose(y[:, 0], expected[:, t], atol=1e-5)
    for found, given in zip(cache, kv, strict=True):
        np.testing.assert_array_equal(jnp.roll(found, -7, axis=2), given)


def test_zigzag_gives_every_device_the_same_work():
    order = zigzag(24, 3)
    assert sorted(order) == list(range(24))
    visible = (order + 1).reshape(3, 8).sum(axis=1)  # keys that the queries of each device see
    assert len(set(visible)) == 1


def test_cudnn_is_what_a_gpu_gets(monkeypatch):
    """Lowered for CUDA without one: the call of the fused kernel, with its causal mask, is in the program."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    x = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
    attend = jax.jit(lambda *qkv: ATTENTIONS["cudnn"](*qkv, AttentionInput(jnp.arange(64)[None]))[0])
    text = attend.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "CAUSAL" in text


def test_auto_is_the_table_on_every_mesh():
    cfg = make_config(GPT2_LIKE)
    cpu = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    assert for_mesh(cfg.run, cfg.model, cpu).attention == BACKENDS["cpu"]["attention"]
    assert trainable_on(make_config(GPT2_LIKE), 2, context=2).cfg.run.attention == "ring"


@pytest.mark.parametrize(
    ("model", "axes", "named"),
    [
        ({"attention": "splash"}, {}, "splash runs on a TPU"),
        ({"attention": "cudnn"}, {}, "cudnn runs on a GPU"),
        ({"context_length": 34}, {"context": 2}, "multiple of 4"),
        ({"attention": {"window": 4, "pattern": ["local", "global"]}}, {"pipeline": 2}, "multiple of it"),
        ({"attention": {"sinks": True}}, {"context": 2}, "ring does not compute model.attention.sinks; set mesh.con"),
    ],
)
def test_attention_that_a_mesh_cannot_do_is_refused(model, axes, named):
    with pytest.raises(UserError, match=named):
        trainable_on(make_config({**GPT2_LIKE, **model}), int(np.prod(list(axes.values()))), **axes)


@pytest.mark.parametrize(
    "remat",
    [("named", ("qkv", "attention", "mlp")), ("offload", ("block_input", "attention"))],
    ids=["named", "offload"],
)
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_remat_by_name_changes_nothing(remat, scan_layers):
    tokens = np.random.default_rng(0).integers(0, 61, (2, 16))

    def gradient(**values):
        cfg = make_config(GPT2_LIKE, run={"scan_layers": scan_layers, **values})
        graphdef, params = abstract_model(cfg.model, cfg.run)[0], init_params(cfg.model, jax.random.key(0))
        return jax.jit(jax.grad(lambda p: jnp.square(bind(graphdef, p)(tokens)[0][..., 0]).mean()))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
        gradient(),
        gradient(remat=remat[0], remat_names=remat[1]),
    )


def test_named_remat_saves_what_it_names_and_no_more(capsys):
    def saved(**values):
        cfg = make_config(GPT2_LIKE, run={"scan_layers": False, **values})
        graphdef, params = abstract_model(cfg.model, cfg.run)[0], init_params(cfg.model, jax.random.key(0))
        jax.ad_checkpoint.print_saved_residuals(
            lambda p: bind(graphdef, p)(np.zeros((2, 16), np.int32))[0].sum(), params
        )
        return capsys.readouterr().out

    mlp = f"f32[2,2,16,{4 * 32}]"  # L B T F, which the scan stacks
    assert mlp not in saved(remat="full")
    assert mlp not in saved(remat="named", remat_names=["attention"])
    assert mlp in saved(remat="named", remat_names=["mlp"])
