"""Losses of 20 steps of a small model on each mesh named, printed as JSON; with three more arguments, as one process
of several: python tests/mesh_losses.py MESHES_JSON [COORDINATOR NUM_PROCESSES PROCESS_ID]
"""

import json
import os
import sys

import jax
import numpy as np
from conftest import GPT2_LIKE, MODERN, make_config

from gptjax.hosts import global_batch, rows_of_this_host
from gptjax.sharding import make_mesh
from gptjax.step import init_state, make_train_step, make_trainable

MUON = {"name": "muon", "peak_lr": 0.02, "lr_scales": {"embed|head": 0.2}, "ema_decay": 0.9}
CONFIGS = {"adamw": make_config(GPT2_LIKE), "muon": make_config(MODERN, optim=MUON)}
STEPS = 20


def packed_batch(seed: int, B: int = 8, T: int = 32) -> dict[str, np.ndarray]:
    """Random tokens in rows of two documents and a rest without weight."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, GPT2_LIKE["vocab_size"], (B, T + 1), dtype=np.int32)
    cuts = np.sort(rng.integers(1, T, (B, 2)), axis=1)
    segments = (np.arange(T) >= cuts[:, :1]).astype(np.int32) + (np.arange(T) >= cuts[:, 1:])
    starts = np.where(segments == 0, 0, np.where(segments == 1, cuts[:, :1], cuts[:, 1:]))
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": (segments < 2).astype(np.float32),
        "positions": (np.arange(T) - starts).astype(np.int32),
        "segments": segments,
    }


def losses_on(name: str, axes: dict[str, int], devices: list) -> list[float]:
    """Losses of a config's first steps on packed rows."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | axes
    t = make_trainable(CONFIGS[name], make_mesh(sizes, devices))
    state, step, losses = init_state(t), make_train_step(t), []
    rows = rows_of_this_host(t.batch_sharding, (8, 32))
    for number in range(STEPS):
        here = jax.tree.map(lambda x: x[rows], packed_batch(number))
        state, metrics = step(state, global_batch(here, rows, t.batch_sharding, 8))
        losses.append(float(metrics["train/loss"]))
    return losses


if __name__ == "__main__":
    meshes, *processes = sys.argv[1:]
    if processes:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # and not the eight of conftest
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(processes[0], int(processes[1]), int(processes[2]))
    print(json.dumps([losses_on(name, axes, jax.devices()) for name, axes in json.loads(meshes)]))
