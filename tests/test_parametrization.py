"""Parametrizations against the papers' tables, typed in here, and against what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, trainable_on, without_zeros
from flax import nnx

from gptjax import parametrization
from gptjax.apps.scaling.coordinates import added_by, at_width, change_of_activations, describe
from gptjax.config import override
from gptjax.configfile import config_from_dict
from gptjax.convert.weights import without_multipliers
from gptjax.errors import UserError
from gptjax.nn.transformer import Inputs, abstract_model, bind, init_params, logits
from gptjax.optim import make_optimizer
from gptjax.step import init_state, make_train_step

# Four times as wide and three times as deep as the base model, with heads twice as wide.
GROWN = {"d_model": 64, "n_layers": 6, "n_heads": 2, "base_width": 16, "base_layers": 2, "base_head_dim": 16}
MUP = {**GPT2_LIKE, **GROWN, "parametrization": "mup", "tie_embeddings": False}
COMPLETEP = {**MUP, "parametrization": "completep"}

# Yang et al. 2022, table 8 (Adam column) and Dey et al. 2025, table 1, at m = 4, l = 3, alpha = 1:
# learning rate, weight decay, eps.
PAPER = {
    "mup": {
        "embed": (1, 1, 1 / 4),
        "positions": (1, 1, 1 / 4),
        "head": (1, 1, 1 / 4),
        "final_norm/scale": (1, 1, 1 / 4),
        "blocks/mlp_norm/bias": (1, 1, 1 / 4),
        "blocks/attention/query_bias": (1, 1, 1 / 4),
        "blocks/attention/query": (1 / 4, 4, 1 / 4),
        "blocks/attention/out": (1 / 4, 4, 1 / 4),
        "blocks/mlp/up": (1 / 4, 4, 1 / 4),
        "blocks/mlp/down": (1 / 4, 4, 1 / 4),
    },
    "completep": {
        "embed": (1, 1, 1 / 4),
        "head": (1, 1, 1 / 4),
        "final_norm/bias": (1, 1, 1 / 4),
        "blocks/attention_norm/scale": (1, 1, 1 / 12),
        "blocks/mlp/down_bias": (1, 1, 1 / 12),
        "blocks/attention/value": (1 / 4, 4, 1 / 12),
        "blocks/mlp/down": (1 / 4, 4, 1 / 12),
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_treatment_follows_the_papers_tables(name):
    metadata = abstract_model(make_config({**MUP, "parametrization": name}).model)[2]
    found = {"/".join(path): meta["factors"] for path, meta in metadata.items()}
    for path, expected in PAPER[name].items():
        np.testing.assert_allclose([found[path][k] for k in ("lr", "decay", "eps")], expected, err_msg=path)
    assert all(set(f.values()) == {1.0} for f in treatments("standard").values())


def treatments(name: str) -> dict[str, dict]:
    metadata = abstract_model(make_config({**MUP, "parametrization": name}).model)[2]
    return {"/".join(path): meta["factors"] for path, meta in metadata.items()}


def directions(model: dict, grad: float, weight: float, **optim) -> dict[str, float]:
    """What the optimizer makes of equal gradients and equal weights, by path."""
    cfg = make_config(model, optim={"clip_norm": None, **optim})
    _, params, metadata = abstract_model(cfg.model)
    optimizer = make_optimizer(cfg.optim, metadata)
    params, grads = (jax.tree.map(lambda p, v=v: np.full(p.shape, v, np.float32), params) for v in (weight, grad))
    found, _ = optimizer.update(grads, optimizer.init(params), params)
    return {"/".join(k.key for k in keys): float(leaf.ravel()[0]) for keys, leaf in jax.tree.leaves_with_path(found)}


def test_the_optimizer_applies_rate_decay_eps_and_the_users_own_scales():
    scales = {"lr_scales": {"mlp/up": 3.0}}
    found = directions(COMPLETEP, 1.0, 0.0, **scales)  # Adam's first step is g / (|g| + eps)
    assert found["embed"] == pytest.approx(1, rel=1e-5)
    assert found["blocks/mlp/down"] == pytest.approx(1 / 4, rel=1e-5)
    assert found["blocks/mlp/up"] == pytest.approx(3 / 4, rel=1e-5)
    decayed = directions(COMPLETEP, 0.0, 1.0, weight_decay=0.1)
    assert decayed["head"] == decayed["blocks/mlp/up"] == pytest.approx(0.1, rel=1e-5)  # rate x decay stays
    assert decayed["blocks/mlp/up_bias"] == 0
    halved = directions(COMPLETEP, 1e-3, 0.0, eps=12e-3)
    assert halved["blocks/mlp_norm/scale"] == pytest.approx(1 / 2, rel=1e-4)  # eps / 12 is the gradient
    assert halved["final_norm/scale"] == pytest.approx(1 / 4, rel=1e-4)  # eps / 4 is three times the gradient


def test_muon_keeps_its_rate():
    square = {**GPT2_LIKE, **GROWN, "d_mlp": 64, "parametrization": "mup"}
    ours = directions(square, 1.0, 1.0, name="muon", weight_decay=0.1)
    standard = directions({**square, "parametrization": "standard"}, 1.0, 1.0, name="muon", weight_decay=0.1)
    assert ours["blocks/mlp/up"] == standard["blocks/mlp/up"]


@pytest.mark.parametrize("init", ["gpt2", "zero"])
def test_first_values_have_the_papers_spread(init):
    """Hidden variances fall as 1 / m; embeddings and head keep theirs; CompleteP's do not know the depth."""
    params = init_params(make_config({**COMPLETEP, "init": init}).model, jax.random.key(0))
    residual = 0.02 * (2 * 2) ** -0.5 / 2  # of the base model's two blocks
    expected = {
        "gpt2": {"embed": 0.02, "positions": 0.02, "head": 0.02, "query": 0.01, "out": residual},
        "zero": {"embed": 1.0, "positions": 0.02, "head": 0.0, "query": 64**-0.5, "out": 0.0},
    }[init]
    found = {name: params[name] for name in ("embed", "positions", "head")}
    found |= {name: params["blocks"]["attention"][name] for name in ("query", "out")}
    for name, std in expected.items():
        assert np.std(found[name]) == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_base_model_is_the_standard_one_bit_for_bit(optimizer):
    """The same programs, to the letter, for first values and for a step."""
    own = {"base_width": 32, "base_layers": 2, "base_head_dim": 8}
    batch = dict.fromkeys(("tokens", "targets", "weights"), jax.ShapeDtypeStruct((8, 32), jnp.int32))
    batch["weights"] = jax.ShapeDtypeStruct((8, 32), jnp.float32)

    def programs(**model):
        t = trainable_on(make_config({**MODERN, "scan_layers": True, **model}, optim={"name": optimizer}))
        with jax.set_mesh(t.mesh):
            step = make_train_step(t).compiled.lower(t.state, batch).as_text()
        return jax.jit(lambda key: init_params(t.cfg.model, key)).lower(jax.random.key(0)).as_text(), step

    standard = programs()
    assert programs(**own, parametrization="mup") == standard
    assert programs(**own, parametrization="completep") == standard
    assert programs(**{**own, "base_width": 16}, parametrization="mup") != standard


@pytest.mark.parametrize(
    "form",
    [{}, {"qk_norm": True, "positions": "rope"}, {"norm_weights": False, "bias": False, "qk_norm": True}],
    ids=str,
)
def test_multipliers_can_be_taken_into_the_weights(form):
    """1/4 at the head, scores over the head's width, 1/3 of every branch: the standard model with these weights."""
    cfg = make_config({**COMPLETEP, **form}).model
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape), init_params(cfg, jax.random.key(0)))
    plain = override(cfg, {"parametrization.kind": "standard", "norm.weights": True})
    shapes = abstract_model(plain)[1]
    folded = without_multipliers(cfg, params)
    folded = jax.tree.map_with_path(lambda keys, leaf: _leaf_or_ones(folded, keys, leaf.shape), shapes)
    tokens = np.arange(16)[None] % 61
    outputs = []
    for model, weights in ((cfg, params), (plain, folded)):
        bound = bind(abstract_model(model)[0], weights)
        outputs.append(logits(bound, bound(jnp.asarray(tokens))[0]))
    np.testing.assert_allclose(*outputs, atol=2e-5, rtol=1e-4)
    weights, inside = folded["blocks"]["attention"], params["blocks"]["attention"]
    if not form:
        np.testing.assert_allclose(folded["final_norm"]["scale"], params["final_norm"]["scale"] / 4)
        np.testing.assert_allclose(weights["out"], inside["out"] / 3, rtol=1e-6)
        np.testing.assert_allclose(weights["query"] / 32**0.5, inside["query"] * 16**0.5 / 32, rtol=1e-6)


def _leaf_or_ones(tree, keys, shape):
    for key in keys:
        if key.key not in tree:
            return jnp.ones(shape)
        tree = tree[key.key]
    return tree


@pytest.mark.slow
def test_gradients_shrink_as_adams_eps_does():
    """Per entry as 1 / m outside the blocks, and as 1 / (m l) inside: Dey et al. 2025, appendix on eps."""
    tokens = np.random.default_rng(0).integers(0, 61, (4, 32), dtype=np.int32)

    def spread(width, layers):
        sizes = {"d_model": width, "n_heads": width // 16, "n_layers": layers, "scan_layers": True}
        model = {**GPT2_LIKE, **sizes, "tie_embeddings": False}
        cfg = make_config({**model, "parametrization": "completep", "base_width": 64, "base_layers": 2})
        graphdef, cfg = abstract_model(cfg.model, cfg.run)[0], cfg.model

        def loss(params):
            bound = bind(graphdef, params)
            return -jax.nn.log_softmax(logits(bound, bound(tokens)[0]))[..., 0].mean()

        grads = jax.jit(jax.grad(loss))(init_params(cfg, jax.random.key(0)))
        inside = {"up": grads["blocks"]["mlp"]["up"], "norm": grads["blocks"]["mlp_norm"]["scale"]}
        outside = {"embed": grads["embed"], "head": grads["head"]}
        return {name: float(jnp.sqrt(jnp.square(g).mean())) for name, g in {**inside, **outside}.items()}

    base, wide, deep = spread(64, 2), spread(256, 2), spread(64, 8)
    for name, small in base.items():
        assert wide[name] / small == pytest.approx(1 / 4, rel=0.4), name  # of one draw; 1 / 2 would be the next power
        assert deep[name] / small == pytest.approx(1 / 4 if name in ("up", "norm") else 1, rel=0.4), name


@pytest.mark.slow
def test_a_scan_on_eight_devices_is_the_unrolled_model_on_one():
    model = {**COMPLETEP, "n_layers": 2, "base_layers": 1}
    tokens = np.random.default_rng(0).integers(0, 61, (8, 32), dtype=np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": np.ones((8, 32), np.float32)}

    def losses(model, devices, **axes):
        t = trainable_on(make_config(model, optim={"peak_lr": 0.01}), devices, **axes)
        state, step = init_state(t), make_train_step(t)
        found = []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics["train/loss"]))
        return found

    scanned = losses({**model, "scan_layers": True}, 8, fsdp=4, data=2)
    np.testing.assert_allclose(scanned, losses(model, 1), rtol=1e-5)


@pytest.fixture(scope="module")
def check(corpus_file, tmp_path_factory):
    """Name of a parametrization -> the coordinate check of a small model, four times widened."""
    model = {**GPT2_LIKE, "n_layers": 1, "n_heads": 2, "vocab_size": None, "tie_embeddings": False, "base_width": 32}
    data = {"path": str(corpus_file), "tokenizer": "byte", "cache_dir": str(tmp_path_factory.mktemp("tokens"))}
    cfg = config_from_dict({"model": model, "data": data, "optim": {"peak_lr": 4e-3}, "workdir": "unused"})
    narrow = change_of_activations(cfg, 5)  # the same model under every parametrization

    def run(name: str) -> dict:
        named = override(cfg, {"model.parametrization.kind": name})
        return describe([32, 128], [narrow, change_of_activations(at_width(named, 128), 5)])

    return run


@pytest.mark.whole
def test_coordinates_are_flat_under_mup_and_not_under_standard(check):
    assert check("mup")["flat"]
    standard = check("standard")
    assert not standard["flat"]
    assert standard["layers"]["logits"]["slope"] > 0.5


@pytest.mark.whole
def test_the_coordinate_check_sees_a_wrong_exponent(check, monkeypatch):
    monkeypatch.setitem(parametrization.ROLES, "matrix", parametrization.ROLES["matrix"]._replace(lr=-0.5))
    assert not check("mup")["flat"]


def test_the_coordinate_check_measures_what_a_block_with_a_convolution_adds():
    """With an MLP that adds nothing, all that a block adds is its attention's."""
    cfg = make_config({**MODERN, "n_layers": 1, "scan_layers": True}).model
    params = without_zeros(init_params(cfg, jax.random.key(0)))
    params["blocks"]["mlp"]["down"] = jnp.zeros_like(params["blocks"]["mlp"]["down"])
    params["blocks"]["attention_conv"] = jax.random.normal(
        jax.random.key(2), params["blocks"]["attention_conv"].shape
    )

    class Recorded(nnx.Module):
        def __init__(self, block):
            self.block = block

        def __call__(self, x, ctx, cache):
            after, _, aux = self.block(x, ctx, cache)
            return after, added_by(self.block, x, after, ctx), aux

    model = bind(abstract_model(cfg)[0], params)
    model.blocks = Recorded(model.blocks)
    inputs = Inputs(jnp.arange(16)[None])
    _, added, _ = model.apply_blocks(model.embed_inputs(inputs), inputs)
    assert jnp.abs(added["attention"]).max() > 1e-3
    np.testing.assert_allclose(added["mlp"], 0, atol=1e-5)


def test_what_the_base_lacks_is_said():
    with pytest.raises(UserError, match=r"model.parametrization.kind mup needs model.parametrization.base_width"):
        make_config({**GPT2_LIKE, "parametrization": "mup"})
    with pytest.raises(UserError, match=r"completep needs model.parametrization.base_layers"):
        make_config({**GPT2_LIKE, "parametrization": "completep", "base_width": 16})
