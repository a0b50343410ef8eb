"""What a training step minimises. `train.objective` names one of `OBJECTIVES`; the step knows none by name.

An objective is a function `(model, params, batch, key) -> {name: (sum, weight)}`. The first term is minimised, as its
sum over the step divided by its weight over the step; the others are reported. docs/extending.md adds one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import Config, ModelConfig
from gptjax.errors import UserError
from gptjax.loss import Distillation, LossSpec, distillation_loss, log_probabilities, next_token_loss
from gptjax.nn.adapters import join_adapter
from gptjax.nn.transformer import Params, Transformer, bind

Batch = dict[str, jax.Array]  # tokens and targets [B, T] int32, weights [B, T] float32; maybe positions and segments
Terms = dict[str, tuple[jax.Array, jax.Array]]  # name -> a sum and the weight that it is divided by, float32 scalars

TEACHER = "teacher"  # the key of the teacher's weights among a run's weights


class Teacher(NamedTuple):
    """What is static about the model that a run learns from.

    Attributes:
        cfg: of the teacher.
        graphdef: its structure.
    """

    cfg: ModelConfig
    graphdef: nnx.GraphDef


def without_teacher(params: Params) -> Params:
    """Return a run's weights without those of its teacher."""
    return {name: part for name, part in params.items() if name != TEACHER}


class Model(NamedTuple):
    """What is static about the model that an objective is computed with.

    Attributes:
        cfg: of the run.
        graphdef: the model's structure.
        teacher: the model that it learns from; None without one.
    """

    cfg: Config
    graphdef: nnx.GraphDef
    teacher: Teacher | None = None

    @property
    def loss_spec(self) -> LossSpec:
        """How logits become log-probabilities in this run."""
        m, train = self.cfg.model, self.cfg.train
        return LossSpec(m.vocab_size, train.loss_chunks, m.logit_softcap, train.z_loss)

    def run(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[Transformer, jax.Array, Terms]:
        """Return the model bound to its weights, the hidden states [B, T, D], and the blocks' auxiliary terms.

        Args:
            params: with adapters, or those of the base alone (`adapters.without_adapter`).
            key: for dropout; None drops nothing.
        """
        model = bind(self.graphdef, join_adapter(without_teacher(params), self.cfg.lora))
        hidden, aux = model(
            batch["tokens"], positions=batch.get("positions"), segments=batch.get("segments"), dropout_key=key
        )
        return model, hidden, aux

    def run_teacher(self, params: Params, batch: Batch) -> tuple[Transformer, jax.Array]:
        """Return the teacher bound to its weights, and its hidden states [B, T, D']; no gradient reaches them."""
        teacher = bind(self.teacher.graphdef, jax.lax.stop_gradient(params[TEACHER]))
        return teacher, teacher(batch["tokens"], positions=batch.get("positions"), segments=batch.get("segments"))[0]


class Objective(NamedTuple):
    """An objective and what it asks of the step.

    Attributes:
        terms: (model, params, batch, key) -> terms. The one named "loss", or else the first, is the `train/loss` and
            `val/loss` of the run.
        group_rows: rows that belong together, such as 2 for pairs, one after the other in the batch: they stay in one
            microbatch.
        arrays: of the batch that it needs besides tokens, targets and weights, each [B, T].
        every_token: whether "loss" is the cross-entropy of every token in nats, of which bits per byte can be made.
        has_teacher: whether it learns from the model of `distill.teacher`.
    """

    terms: Callable[[Model, Params, Batch, jax.Array | None], Terms]
    group_rows: int = 1
    arrays: tuple[str, ...] = ()
    every_token: bool = False
    has_teacher: bool = False


def next_token(model: Model, params: Params, batch: Batch, key: jax.Array | None) -> Terms:
    """Return the cross-entropy of the next token in nats, and with `train.z_loss` the objective that includes it."""
    transformer, hidden, aux = model.run(params, batch, key)
    total, cross_entropy = next_token_loss(
        hidden, transformer.head_matrix(), batch["targets"], batch["weights"], model.loss_spec
    )
    weight = batch["weights"].sum()
    if model.cfg.train.z_loss:
        return {"objective": (total, weight), "loss": (cross_entropy, weight), **aux}
    return {"loss": (total, weight), **aux}


def dpo(model: Model, params: Params, batch: Batch, key: jax.Array | None) -> Terms:
    """Return the loss, rewards and accuracy of direct preference optimization (Rafailov et al. 2023, 2305.18290).

    The reward of an answer is beta times how much likelier it has become than under the reference (equation 7); the
    loss is the negative log of the probability that the chosen one's is higher, with label smoothing as in
    cDPO (Mitchell 2023, "A note on DPO with noisy preferences", equation 3). Means are over pairs.

    Args:
        batch: rows of pairs, the chosen one first; `reference` [B, T] whose sum is a row's log-probability under the
            reference. A pair of weight 0 is left out.
    """
    transformer, hidden, aux = model.run(params, batch, key)
    how, weights = model.cfg.dpo, batch["weights"]
    log_p = log_probabilities(hidden, transformer.head_matrix(), batch["targets"], model.loss_spec)
    gains = (log_p * weights).sum(axis=1) - batch["reference"].sum(axis=1)
    if how.normalise_length:
        gains /= jnp.maximum(weights.sum(axis=1), 1)
    chosen, rejected = how.beta * gains.reshape(-1, 2).T
    present = jnp.where((weights.max(axis=1) > 0).reshape(-1, 2).all(axis=1), 1.0, 0.0)
    margins, pairs = chosen - rejected, present.sum()
    smoothing = how.label_smoothing
    losses = -(1 - smoothing) * jax.nn.log_sigmoid(margins) - smoothing * jax.nn.log_sigmoid(-margins)
    means = {
        "loss": losses,
        "reward_accuracy": margins > 0,
        "reward_margin": margins,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return {name: ((value * present).sum(), pairs) for name, value in means.items()} | aux


def distill(model: Model, params: Params, batch: Batch, key: jax.Array | None) -> Terms:
    """Return the objective of distillation, the cross-entropy of the data, and the divergence from the teacher.

    Means are over the weighted tokens, in nats: `objective` is what is minimised (`loss.distillation_loss`), `kl`
    KL(teacher || student) at `distill.temperature`.
    """
    transformer, hidden, aux = model.run(params, batch, key)
    teacher, teacher_hidden = model.run_teacher(params, batch)
    how, theirs = model.cfg.distill, model.teacher.cfg
    spec = Distillation(
        model.loss_spec, LossSpec(theirs.vocab_size, cap=theirs.logit_softcap), how.temperature, how.weight
    )
    objective, cross_entropy, divergence = distillation_loss(
        hidden,
        transformer.head_matrix(),
        teacher_hidden,
        teacher.head_matrix(),
        batch["targets"],
        batch["weights"],
        spec,
    )
    weight = batch["weights"].sum()
    return {"objective": (objective, weight), "loss": (cross_entropy, weight), "kl": (divergence, weight), **aux}


OBJECTIVES: dict[str, Objective] = {
    "next_token": Objective(next_token, every_token=True),
    "sft": Objective(next_token),  # of the tokens that the data marks as learnt: no bits per byte
    "dpo": Objective(dpo, group_rows=2, arrays=("reference",)),
    "distill": Objective(distill, every_token=True, has_teacher=True),
}


def check_arrays(name: str, objective: Objective, batch: Batch) -> None:
    """Raise UserError where the batch lacks an array that the objective needs."""
    for array in objective.arrays:
        if array not in batch:
            raise UserError(
                f"train.objective {name} needs the array {array!r} in every batch, which has "
                f"{', '.join(sorted(batch))}; give data that has it"
            )
