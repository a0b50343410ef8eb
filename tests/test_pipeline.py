"""Layers in stages: the losses of one device, whatever else the mesh cuts."""

import re

import jax
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, trainable_on
from mesh_losses import packed_batch
from test_moe import mixture

from gptjax.errors import UserError
from gptjax.step import init_state, make_train_step

MUON = {"name": "muon", "peak_lr": 0.02, "lr_scales": {"embed|head": 0.2}}
MODELS = {
    "gpt2": {"model": {**GPT2_LIKE, "n_layers": 4}, "train": {"batch_sequences": 16}},
    "modern": {"model": {**MODERN, "n_layers": 4}, "optim": MUON, "train": {"batch_sequences": 16}},
    "moe": {"model": mixture({**MODERN, "n_layers": 4}), "train": {"batch_sequences": 16}},
}
STEPS = 3


def configured(name: str, **sections: dict):
    parts = {**MODELS[name], **sections}
    return make_config(parts.pop("model"), **parts)


def losses_on(cfg, devices: int, **axes: int) -> list[float]:
    t = trainable_on(cfg, devices, **axes)
    state, step, found = init_state(t), make_train_step(t), []
    for number in range(STEPS):
        state, metrics = step(state, jax.device_put(packed_batch(number, B=16), t.batch_sharding))
        found += [float(metrics["train/loss"]), float(metrics["grad_norm"])]
    up = state.params["blocks"]["mlp"]["up"]
    assert up.sharding.shard_shape(up.shape)[0] == 4 // axes.get("pipeline", 1)
    return found


@pytest.fixture(scope="module")
def one_device():
    found = {}

    def of(name: str) -> list[float]:
        if name not in found:
            found[name] = losses_on(configured(name), 1)
        return found[name]

    return of


PAIRS = [  # pytest -m 'slow or not slow' -n 0 tests/test_pipeline.py
    {"pipeline": 4, "data": 2},
    {"pipeline": 2, "fsdp": 4},
    {"pipeline": 4, "tensor": 2},
    {"pipeline": 2, "context": 4},
    {"pipeline": 2, "data": 2, "fsdp": 2},
    {"pipeline": 2, "fsdp": 2, "tensor": 2},
    {"pipeline": 2, "tensor": 2, "context": 2},
]
OF_EXPERTS = [{"pipeline": 4, "expert": 2}, {"pipeline": 2, "expert": 4}, {"pipeline": 2, "expert": 2, "fsdp": 2}]


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param("modern", {"pipeline": 4, "fsdp": 2}, marks=pytest.mark.whole),
        pytest.param("moe", {"pipeline": 2, "expert": 2, "context": 2}, marks=pytest.mark.whole),
        *(pytest.param(name, axes, marks=pytest.mark.slow) for axes in PAIRS for name in MODELS),
        *(pytest.param("moe", axes, marks=pytest.mark.slow) for axes in OF_EXPERTS),
    ],
    ids=str,
)
def test_stages_give_the_losses_of_one_device(one_device, name, axes):
    np.testing.assert_allclose(losses_on(configured(name), 8, **axes), one_device(name), atol=1e-5, rtol=1e-5)


@pytest.mark.whole
def test_all_stages_compute_in_every_turn_and_are_idle_as_the_theory_says():
    """M microbatches through S stages: M + S - 1 turns, which the compiled loop counts."""
    for microbatches, turns in ((2, 3), (8, 9)):
        run = {"pipeline_microbatches": microbatches, "remat": "full", "scan_layers": True}
        t = trainable_on(configured("gpt2", run=run), 2, pipeline=2)
        with jax.set_mesh(t.mesh):
            program = make_train_step(t).compiled.lower(t.state, packed_batch(0, B=16)).compile().as_text()
        loops = re.findall(r'known_trip_count":\{"n":"(\d+)"', program)
        assert loops.count(str(turns)) == 2  # forward and backward


@pytest.mark.slow
def test_dropout_differs_between_microbatches_and_not_between_meshes():
    cfg = configured("gpt2", model={**MODELS["gpt2"]["model"], "dropout": 0.2}, run={"pipeline_microbatches": 4})
    found = [losses_on(cfg, n, pipeline=2, **axes) for n, axes in ((2, {}), (4, {"fsdp": 2}))]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert found[0] != losses_on(configured("gpt2"), 1)


@pytest.mark.parametrize(
    ("name", "sections", "axes", "complaint"),
    [
        ("gpt2", {}, {"pipeline": 8}, "model.n_layers 4 cannot be cut into 8 equal parts by the mesh's pipeline"),
        ("gpt2", {"run": {"pipeline_microbatches": 16}}, {"pipeline": 2, "data": 4}, "a multiple of 64"),
        (
            "moe",
            {"model": mixture({**MODERN, "n_layers": 4}, first_dense_layers=2)},
            {"pipeline": 2, "data": 4},
            "mesh.pipeline 2 needs layers of one form",
        ),
    ],
)
def test_what_stages_cannot_be_is_one_line(name, sections, axes, complaint):
    with pytest.raises(UserError, match=complaint):
        trainable_on(configured(name, **sections), 8, **axes)
