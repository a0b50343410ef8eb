"""Measure the seconds of a step on each shape, from which the hours of a study follow."""

import time

import jax
import numpy as np

from gptjax.apps.scaling.ladder import Rung, key_of
from gptjax.sharding import make_mesh
from gptjax.step import init_state, make_train_step, make_trainable

STEPS = 5


def seconds_per_step(rungs: list[Rung]) -> dict[str, float]:
    """Return the median of STEPS timed steps on random tokens, after one that compiles, for each shape and batch."""
    found: dict[str, float] = {}
    for config in (rung.config for rung in rungs):
        if key_of(config) in found:
            continue
        trainable = make_trainable(config, make_mesh(config.mesh.axes))
        step = make_train_step(trainable)
        state = init_state(trainable)
        durations = []
        shape = (config.train.batch_sequences, config.model.context_length)
        tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
        batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(shape, np.float32)}
        for _ in range(1 + STEPS):
            began = time.perf_counter()
            state, metrics = step(state, jax.device_put(batch, trainable.batch_sharding))
            jax.block_until_ready(metrics)
            durations.append(time.perf_counter() - began)
        found[key_of(config)] = float(np.median(durations[1:]))
    return found
