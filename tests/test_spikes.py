"""Which steps are not taken, and what that leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, make_config, trainable_on

from gptjax.checkpoint import Checkpoints
from gptjax.config.data import DataConfig
from gptjax.data.corpus import load_corpus
from gptjax.lifecycle.start import Fixed, restore, save
from gptjax.spikes import WINDOW_STEPS, first_statistics, judge_step
from gptjax.step import init_state, make_train_step

judge = jax.jit(judge_step, static_argnums=(3, 4))


def judged(values, statistics=None, deviations=10.0):
    """What is decided of steps with these losses and gradient norms, one after another, and the statistics then."""
    statistics, taken = first_statistics() if statistics is None else statistics, []
    for loss, grad_norm in values:
        good, statistics = judge(statistics, jnp.float32(loss), jnp.float32(grad_norm), deviations, 10)
        taken.append(bool(good))
    return taken, statistics


@pytest.fixture(scope="module")
def calm():
    """Statistics of a run whose loss is about 3 and whose gradient's norm is about 0.8."""
    rng = np.random.default_rng(0)
    taken, statistics = judged(
        zip(3 + 0.1 * rng.normal(size=300), 0.8 * np.exp(0.2 * rng.normal(size=300)), strict=True)
    )
    assert all(taken)
    return statistics


@pytest.mark.parametrize(
    ("loss", "grad_norm", "taken"),
    [
        (3.2, 2.0, True),
        (2.0, 0.1, True),
        (24.0, 0.8, False),
        (3.0, 79.0, False),
        (np.nan, 0.8, False),
        (3.0, np.inf, False),
        (-np.inf, 0.8, False),
    ],
)
def test_a_spike_or_no_number_is_not_taken(calm, loss, grad_norm, taken):
    assert judged([(loss, grad_norm)], calm)[0] == [taken]
    after = judged([(loss, grad_norm)], calm)[1]
    assert np.isfinite(after).all()
    assert judged([(3.0, 0.8), (24.0, 79.0)], after)[0] == [True, False]  # it has not become the usual


def test_without_a_limit_only_what_is_no_number_is_not_taken(calm):
    assert judged([(24.0, 79.0), (np.nan, 1.0)], calm, deviations=None)[0] == [True, False]


def test_a_run_that_begins_has_no_spikes():
    taken, _ = judged([(10.0**i, 1.0) for i in range(-5, 5)] * (WINDOW_STEPS // 10))
    assert all(taken)


def test_a_level_that_stays_is_accepted_before_the_run_gives_up(calm):
    taken, _ = judged([(15.0, 6.0)] * 10, calm)
    assert taken[0] is False and taken[-1] is True


@pytest.mark.whole
def test_a_skipped_step_changes_nothing_but_its_number_and_survives_a_restart(tmp_path, corpus_file, token_cache):
    corpus = load_corpus(DataConfig(path=str(corpus_file), cache_dir=str(token_cache)))
    model = {**GPT2_LIKE, "n_layers": 1, "vocab_size": corpus.tokenizer.vocab_size}
    cfg = make_config(model, workdir=str(tmp_path / "run"))
    t = trainable_on(cfg)
    step = make_train_step(t)
    ids = jnp.zeros((8, 32), jnp.int32)
    batch = {"tokens": ids, "targets": ids, "weights": jnp.ones((8, 32))}
    state, metrics = step(init_state(t), batch)
    assert metrics["skipped"] == 0
    calm = jnp.array([WINDOW_STEPS, 0.01, 0.0001, 1.0, 1.0, 1e9, 1e18, 0, 0, 0])  # against which this loss is a spike
    state = state._replace(statistics=calm)
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, batch)
    assert (metrics["skipped"], metrics["update_norm"], int(state.step)) == (1, 0, 2)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))

    checkpoints = Checkpoints(cfg.workdir, cfg.checkpoint)
    save(checkpoints, cfg, corpus, Fixed(), state, None)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(restore(t, corpus, Fixed())))
