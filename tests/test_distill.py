"""Distillation: the loss and its gradient against PyTorch, chunks and meshes, the teacher in a run and in a plan."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2_LIKE, TINY_RUN, make_config
from flax.traverse_util import flatten_dict
from test_step import some_batch

import gptjax
from gptjax.apps.plan.analytic import held_bytes
from gptjax.checkpoint import Checkpoints
from gptjax.config import ModelConfig
from gptjax.configfile import config_from_dict, load_config
from gptjax.convert import open_model
from gptjax.errors import UserError
from gptjax.loss import Distillation, LossSpec, distillation_loss
from gptjax.metrics import read_metrics
from gptjax.nn.adapters import ADAPTER, without_adapter
from gptjax.nn.transformer import init_params
from gptjax.objectives import TEACHER
from gptjax.sharding import make_mesh
from gptjax.step import init_state, make_train_step, make_trainable
from gptjax.trainer import train

B, T, V = 2, 8, 50
TEACHER_SHAPE = {**GPT2_LIKE, "n_layers": 1, "d_model": 48, "vocab_multiple": 64}  # padded otherwise than the student


@pytest.mark.parametrize(("n_chunks", "teacher_rows"), [(1, 50), (4, 64)])
def test_loss_and_gradient_are_those_of_torch(n_chunks, teacher_rows):
    torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
    made = np.random.default_rng(0)
    hidden, teacher_hidden = (made.normal(size=(B, T, D)).astype(np.float32) for D in (12, 16))
    head, teacher_head = (made.normal(size=shape).astype(np.float32) for shape in ((12, 56), (16, teacher_rows)))
    targets, weights = made.integers(0, V, (B, T)), made.integers(0, 3, (B, T)).astype(np.float32)
    spec = Distillation(LossSpec(V, n_chunks, cap=5.0, z_loss=0.01), LossSpec(V, cap=7.0), 2.0, 0.3)

    def ours(hidden, head):
        sums = distillation_loss(hidden, head, teacher_hidden, teacher_head, targets, weights, spec)
        return sums[0], sums

    (_, sums), grads = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, head)
    h, w = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    mine = 5 * torch.tanh((h @ w)[..., :V] / 5)
    theirs = 7 * torch.tanh(torch.tensor(teacher_hidden @ teacher_head)[..., :V] / 7)
    by_token = torch.tensor(weights)
    losses = torch.nn.functional.cross_entropy(mine.transpose(1, 2), torch.tensor(targets), reduction="none")
    q, p = (torch.log_softmax(x / 2, dim=-1) for x in (mine, theirs))
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    cross_entropy, kl = (losses * by_token).sum(), (divergence * by_token).sum()
    penalty = 0.01 * (torch.logsumexp(mine, -1) ** 2 * by_token).sum()
    objective = 0.7 * (cross_entropy + penalty) + 0.3 * 4 * kl
    objective.backward()
    for found, wanted in zip(sums, (objective, cross_entropy, kl), strict=True):
        assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
    for found, wanted in zip(grads, (h.grad, w.grad), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def distilled_on(devices=1, microbatches=1, chunks=1, lora=None, **axes):
    """One step of a small model with a teacher, which keeps what is frozen: the metrics, and the state after it."""
    train = {"objective": "distill", "batch_sequences": 8, "microbatches": microbatches, "loss_chunks": chunks}
    how = {"distill": {"temperature": 2.0, "weight": 0.5}, "optim": {"clip_norm": None, "ema_decay": 0.9}}
    cfg = make_config({**GPT2_LIKE, "n_layers": 1}, train=train, lora=lora or {}, **how)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | axes, jax.devices()[:devices])
    shape = config_from_dict({"model": TEACHER_SHAPE, "workdir": "-"}).model
    t = make_trainable(cfg, mesh, shape)
    drawn = jax.tree.map(np.array, jax.jit(lambda key: init_params(shape, key))(jax.random.key(7)))
    teacher = jax.device_put(drawn, jax.tree.map(lambda x: x.sharding, t.state.params[TEACHER]))
    state = init_state(t, teacher=teacher)
    frozen = {TEACHER: drawn} if lora is None else jax.tree.map(np.array, without_adapter(state.params))
    state, metrics = make_train_step(t)(state, some_batch(t, 0))
    for name, part in frozen.items():
        jax.tree.map(np.testing.assert_array_equal, state.params[name], part)
    names = ("train/loss", "train/objective", "train/kl", "grad_norm")
    return {name: float(metrics[name]) for name in names}, state


@pytest.fixture(scope="module")
def one_device():
    return distilled_on()


@pytest.mark.whole
def test_microbatches_chunks_and_a_mesh_change_nothing_and_the_teacher_is_not_trained(one_device):
    expected, state = one_device
    mean = 0.5 * expected["train/loss"] + 0.5 * 4 * expected["train/kl"]
    assert expected["train/objective"] == pytest.approx(mean, rel=1e-5)
    assert TEACHER not in state.ema
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for name, part in state.params.items() if name != TEACHER
                              for leaf in jax.tree.leaves(part))  # fmt: skip
    sharded, state = distilled_on(8, microbatches=2, chunks=2, fsdp=4, tensor=2)
    assert sharded == pytest.approx(expected, rel=1e-5)
    table = state.params[TEACHER]["embed"]
    assert table.addressable_shards[0].data.size == table.size // 8


@pytest.mark.whole
def test_adapters_learn_from_a_teacher_over_a_frozen_base(one_device):
    metrics, state = distilled_on(lora={"rank": 2})
    names = ("train/loss", "train/objective", "train/kl")  # of the first step, whose adapters have no effect yet
    assert {n: metrics[n] for n in names} == pytest.approx({n: one_device[0][n] for n in names}, rel=1e-5)
    adapter = state.params[ADAPTER]
    assert all(np.any(leaf) for path, leaf in flatten_dict(adapter).items() if path[-1] == "b")
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapter))


def test_an_objective_without_its_teacher_and_a_teacher_that_the_mesh_cannot_cut_are_refused():
    cfg = make_config(GPT2_LIKE, train={"objective": "distill", "batch_sequences": 8})
    one = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    with pytest.raises(UserError, match=r"train.objective distill needs distill.teacher, the model to learn from"):
        make_trainable(cfg, one)
    two = make_mesh({"data": 1, "fsdp": 1, "tensor": 2, "context": 1}, jax.devices()[:2])
    with pytest.raises(UserError, match=r"distill.teacher .*n_heads 3 cannot be cut"):
        make_trainable(cfg, two, ModelConfig(n_layers=1, d_model=48, n_heads=3, vocab_size=61))
    with pytest.raises(UserError, match=r"distill.weight 0\b.* must lie in \(0, 1\]"):
        make_config(GPT2_LIKE, distill={"weight": 0})


@pytest.mark.whole
def test_a_run_learns_from_a_run_resumes_bitwise_and_refuses_another_teacher(
    corpus_file, token_cache, tmp_path, no_closing_sample
):
    shape = [*TINY_RUN, f"--data.path={corpus_file}", f"--data.cache_dir={token_cache}", "--checkpoint.keep_last=5"]
    shape += ["--train.total_steps=10", "--data.workers=0", "--mesh.data=1", "--mesh.fsdp=8"]

    def start(workdir, *flags):
        return train(load_config([*shape, *flags, f"--workdir={tmp_path / workdir}"]))

    distill = ["--train.objective=distill", f"--distill.teacher={tmp_path / 'teacher'}"]
    start("teacher", "--model.d_model=64", "--train.total_steps=5")
    with pytest.raises(UserError, match=r"train.objective distill needs distill.teacher"):
        start("x", *distill[:1])
    with pytest.raises(UserError, match=r"has another tokenizer than data.tokenizer makes"):
        start("x", *distill, "--data.tokenizer=byte")
    start("whole", *distill)
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert Checkpoints(str(whole)).meta(10)["teacher"]["path"] == str(tmp_path / "teacher")
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "10")
    start("part", *distill)
    names = ("step", "train/loss", "train/kl", "val/loss", "val/kl", "val/bpb", "grad_norm")
    first, second = ([{n: row.get(n) for n in names} for row in read_metrics(folder)] for folder in (whole, part))
    assert first == second
    assert first[-1]["val/kl"] < first[0]["val/kl"]
    with pytest.raises(UserError, match=r"learnt from another teacher: .*; give that model as distill.teacher"):
        start("whole", distill[0], f"--distill.teacher={whole}", "--train.total_steps=12")
    assert gptjax.load(whole).logits([[1, 2]]).shape == (1, 2, open_model(whole).config.vocab_size)

    # A plan counts the teacher's weights.
    values = {"model": {**GPT2_LIKE}, "train": {"batch_sequences": 8}, "workdir": "-"}
    taught = {**values, "train": {"batch_sequences": 8, "objective": "distill"}}
    axes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    plain, with_teacher = (
        held_bytes(config_from_dict(cfg), axes, tiled=False)
        for cfg in (values, {**taught, "distill": {"teacher": str(tmp_path / "teacher")}})
    )
    assert with_teacher["teacher"] == with_teacher["params"] - plain["params"] > 0
    assert with_teacher["optimizer"] == plain["optimizer"]
    assert jnp.isfinite(with_teacher["teacher"])
