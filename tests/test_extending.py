"""Every part of docs/extending.md, as it stands there, in a run: added by import alone, nothing patched."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GPT2_LIKE, ROOT, TINY_RUN, make_config, trainable_on
from flax import nnx

from gptjax.configfile import load_config
from gptjax.convert.configs import import_config
from gptjax.convert.families import FAMILIES
from gptjax.data.corpus import KINDS, load_corpus
from gptjax.errors import UserError
from gptjax.lifecycle.evaluation import make_evaluate
from gptjax.loss import next_token_loss
from gptjax.nn.backends import ATTENTIONS
from gptjax.nn.layers import param
from gptjax.nn.transformer import bind
from gptjax.objectives import OBJECTIVES, Objective
from gptjax.optim import OPTIMIZERS, RULES, SCHEDULES, learning_rate, make_optimizer
from gptjax.parametrization import ROLES, size_factors
from gptjax.step import init_state, make_eval_step, make_terms, make_train_step
from gptjax.trainer import train as run


@pytest.fixture(autouse=True)
def tables():
    """Take out again what a test adds, since other tests of the process read the same tables."""
    tables = (ATTENTIONS, FAMILIES, KINDS, OBJECTIVES, OPTIMIZERS, ROLES, RULES, SCHEDULES)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def part(heading: str) -> dict:
    """What the first block of code under a heading of docs/extending.md defines."""
    text = (ROOT / "docs" / "extending.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    return names


def rows(B: int, weights: np.ndarray | None = None, T: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, GPT2_LIKE["vocab_size"], (B, T + 1), dtype=np.int32)
    weights = np.ones((B, T)) if weights is None else weights
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights.astype(np.float32)}


def very_unequal(B: int, T: int = 32) -> np.ndarray:
    """Weights of 1 to a few positions of some rows, and to all of others."""
    return (np.arange(T) < np.linspace(1, T, B)[:, None]).astype(np.float32)


def test_an_optimizer_from_outside_trains_on_a_mesh():
    part("An optimizer")
    optim = {"name": "lion", "weight_decay": 0.0, "clip_norm": None, "schedule": "constant", "peak_lr": 0.01}
    t = trainable_on(make_config(GPT2_LIKE, optim=optim), 8, fsdp=8)
    state, step = init_state(t), make_train_step(t)
    before = np.asarray(state.params["blocks"]["mlp"]["up"])
    state, metrics = step(state, rows(8))
    moved = np.abs(np.asarray(state.params["blocks"]["mlp"]["up"]) - before)
    np.testing.assert_allclose(moved, 0.01, rtol=1e-3)  # Lion's update is a sign
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == before.shape]
    assert moments
    assert all(not leaf.sharding.is_fully_replicated for leaf in moments)
    n = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert float(metrics["update_norm"]) == pytest.approx(0.01 * n**0.5, rel=0.01)


def test_a_schedule_from_outside_falls_late():
    part("A schedule")
    assert "sqrt" in SCHEDULES
    cfg = make_config(GPT2_LIKE, optim={"schedule": "sqrt", "peak_lr": 1.0, "decay_frac": 0.2, "final_lr_frac": 0.0})
    found = [float(learning_rate(cfg.optim, jnp.asarray(s), jnp.asarray(100))) for s in (0, 80, 85, 100)]
    np.testing.assert_allclose(found, [1, 1, 1 - 0.25**0.5, 0], atol=1e-6)


def steps_of(objective: str, microbatches: int, devices: int = 1, **axes):
    """Weights, metrics and evaluation after two steps on pairs of very unequal lengths."""
    train = {"objective": objective, "batch_sequences": 16, "microbatches": microbatches}
    if objective == "with_size":
        train["aux_weights"] = {"size": 0.3}
    t = trainable_on(make_config(GPT2_LIKE, train=train, optim={"name": "muon", "clip_norm": None}), devices, **axes)
    state, step = init_state(t), make_train_step(t)
    batch = jax.device_put(rows(16, very_unequal(16)), t.batch_sharding)
    for _ in range(2):
        state, metrics = step(state, batch)
    return state.params, metrics, make_eval_step(t)(state.params, batch)


@pytest.mark.whole
def test_pairs_stay_together_in_microbatches_and_on_devices():
    part("An objective")
    params, metrics, evaluated = steps_of("prefer_first", 1)
    assert {"train/loss", "train/accuracy"} <= set(metrics)
    assert set(evaluated) == {"loss", "accuracy"}
    assert float(evaluated["loss"][1]) == 8  # pairs, not rows
    for devices, axes in ((1, {}), (4, {"data": 2, "fsdp": 2})):
        others, found, _ = steps_of("prefer_first", 2, devices, **axes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), others, params)
        for name in metrics:
            np.testing.assert_allclose(found[name], metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_evaluation_reports_every_term_and_bits_per_byte_only_of_all_tokens(corpus_file, token_cache):
    part("An objective")
    data = {"path": str(corpus_file), "tokenizer": "byte", "cache_dir": str(token_cache)}
    found = {}
    for objective in ("next_token", "prefer_first"):
        train = {"objective": objective, "batch_sequences": 8, "eval_sequences": 16}
        cfg = make_config({**GPT2_LIKE, "vocab_size": 257}, data=data, train=train)
        t, corpus = trainable_on(cfg), load_corpus(cfg.data)
        found[objective] = make_evaluate(t, corpus)(init_state(t))
    assert set(found["next_token"]) == {"val/loss", "val/bpb"}
    assert set(found["prefer_first"]) == {"val/loss", "val/accuracy"}
    source = corpus.sources[0]
    bits = found["next_token"]["val/loss"] / np.log(2) * source.val_predictions / source.val_bytes
    assert found["next_token"]["val/bpb"] == pytest.approx(bits)
    assert found["prefer_first"]["val/loss"] > 0


def test_a_batch_that_would_tear_a_group_apart_is_refused():
    part("An objective")
    with pytest.raises(UserError, match=r"microbatches 1 must be a multiple of 2, the rows .* prefer_first keeps"):
        trainable_on(
            make_config(GPT2_LIKE, train={"objective": "prefer_first", "batch_sequences": 4, "microbatches": 4})
        )
    with pytest.raises(UserError, match=r"train.objective 'prefer_frist' .*did you mean 'prefer_first'"):
        trainable_on(make_config(GPT2_LIKE, train={"objective": "prefer_frist"}))


class Measured(nnx.Module):
    """A block that also returns the size of what it gives, with a weight of its own: every position counts."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x, ctx, cache):
        x, cache, aux = self.block(x, ctx, cache)
        return x, cache, {**aux, "size": (jnp.square(x[..., 0]).sum(), jnp.float32(x[..., 0].size))}


def with_size(model, params, batch, key):
    """Next tokens, and the mean size over positions and layers."""
    transformer = bind(model.graphdef, params)
    transformer.blocks = Measured(transformer.blocks)
    hidden, aux = transformer(batch["tokens"], dropout_key=key)
    sums = next_token_loss(hidden, transformer.head_matrix(), batch["targets"], batch["weights"], model.loss_spec)
    return {"loss": (sums[0], batch["weights"].sum()), **aux}


@pytest.mark.whole
def test_an_auxiliary_loss_of_a_block_is_added_in_its_own_mean_whatever_the_microbatches():
    OBJECTIVES["with_size"] = Objective(with_size)
    params, metrics, _ = steps_of("with_size", 1)
    others, found, _ = steps_of("with_size", 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), others, params)
    for name in ("train/loss", "train/size", "grad_norm"):
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-4, err_msg=name)
    train = {"objective": "with_size", "batch_sequences": 16, "aux_weights": {"size": 0.3}}
    t = trainable_on(make_config(GPT2_LIKE, train=train))
    batch = rows(16, very_unequal(16))

    def expected(params):
        terms = make_terms(t)(params, batch)
        loss, size = (total / weight for total, weight in (terms["loss"], terms["size"]))
        return loss + 0.3 * size

    state = init_state(t)
    norm = optax.tree.norm(jax.grad(expected)(state.params))
    _, metrics = make_train_step(t)(state, batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_an_auxiliary_weight_without_a_term_and_a_missing_array_are_refused():
    OBJECTIVES["weighted"] = Objective(with_size, arrays=("advantages",))
    for train, message in (
        ({"objective": "weighted"}, r"train.objective weighted needs the array 'advantages' in every batch"),
        ({"aux_weights": {"los": 1.0}}, r"train.aux_weights 'los' .*did you mean 'loss'"),
    ):
        t = trainable_on(make_config(GPT2_LIKE, train={"batch_sequences": 8, **train}))
        with pytest.raises(UserError, match=message):
            make_eval_step(t)(init_state(t).params, rows(8))


def test_a_role_from_outside_decides_the_treatment():
    probe = part("A role")["make_probe"](nnx.Rngs(0), 32, 4)
    metadata = {("probe",): probe.get_metadata()}
    cfg = make_config({**GPT2_LIKE, "parametrization": "mup", "base_width": 8}, optim={"name": "muon"})
    for weight in metadata.values():
        weight["factors"] = size_factors(cfg.model, weight)
    assert metadata[("probe",)]["factors"] == {"lr": 1 / 4, "decay": 4, "eps": 1 / 4}
    optimizer = make_optimizer(cfg.optim, metadata)
    params = {"probe": probe[...]}
    zero = jax.tree.map(jnp.zeros_like, params)
    update, state = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_array_equal(update["probe"], 0)  # no decay
    assert any("momentum" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state))  # Muon's
    with pytest.raises(ValueError, match=r"role 'porbe' is not in parametrization.ROLES; did you mean 'probe'"):
        param(nnx.Rngs(0), (4,), ("norm",), "porbe")


def test_an_attention_kernel_from_outside_is_trained_with():
    part("An attention kernel")
    losses = {}
    for name in ("sigmoid", "reference"):
        t = trainable_on(make_config(GPT2_LIKE, run={"attention": name}), 2, fsdp=2)
        state, step = init_state(t), make_train_step(t)
        for _ in range(3):
            state, metrics = step(state, rows(8))
        losses[name] = float(metrics["train/loss"])
    assert np.isfinite(losses["sigmoid"])
    assert losses["sigmoid"] != losses["reference"]
    with pytest.raises(UserError, match=r"run.attention 'sigmoud' is not one of .*did you mean 'sigmoid'"):
        trainable_on(make_config(GPT2_LIKE, run={"attention": "sigmoud"}))


@pytest.mark.whole
def test_a_kind_of_data_and_a_hook_from_outside_make_a_run(tmp_path):
    part("A kind of data")
    hook = part("A hook")["LargestGradient"]()
    data = ["--data.kind=digits", "--data.path=6000", f"--data.cache_dir={tmp_path}", "--mesh.data=8"]
    flags = [*TINY_RUN, *data, f"--workdir={tmp_path / 'run'}", "--train.total_steps=4"]
    assert run(load_config(flags), [hook]) == 0
    assert 1 <= hook.step <= 4
    assert hook.norm > 0
    with pytest.raises(UserError, match=r"data.kind 'digit' is not one of text, .*digits; did you mean 'digits'"):
        run(load_config([*flags, "--data.kind=digit", f"--workdir={tmp_path / 'other'}"]))


def test_a_family_from_outside_is_imported():
    part("A model family")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = {"vocab_size": 100, "max_position_embeddings": 32, "num_key_value_heads": 2, **sizes}
    mine = import_config({"model_type": "my_llama", **config})
    assert mine == import_config({"model_type": "llama", **config})
    with pytest.raises(UserError, match="my_lama"):
        import_config({"model_type": "my_lama", **config})
