"""What a training step minimises. `train.objective` names one of `OBJECTIVES`; the step knows none by name.

An objective is a function `(model, params, batch, key) -> {name: (sum, weight)}`. The first term is minimised, as its
sum over the step divided by its weight over the step; the others are reported. docs/extending.md adds one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.loss import LossSpec, log_probabilities, next_token_loss
from gptjax.nn.adapters import join_adapter
from gptjax.nn.transformer import Params, Transformer, bind

Batch = dict[str, jax.Array]  # tokens and targets [B, T] int32, weights [B, T] float32; maybe positions and segments
Terms = dict[str, tuple[jax.Array, jax.Array]]  # name -> a sum and the weight that it is divided by, float32 scalars


class Model(NamedTuple):
    """What is static about the model that an objective is computed with.

    Attributes:
        cfg: of the run.
        graphdef: the model's structure.
    """

    cfg: Config
    graphdef: nnx.GraphDef

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
        model = bind(self.graphdef, join_adapter(params, self.cfg.lora))
        hidden, aux = model(
            batch["tokens"], positions=batch.get("positions"), segments=batch.get("segments"), dropout_key=key
        )
        return model, hidden, aux


class Objective(NamedTuple):
    """An objective and what it asks of the step.

    Attributes:
        terms: (model, params, batch, key) -> terms. The one named "loss", or else the first, is the `train/loss` and
            `val/loss` of the run.
        group_rows: rows that belong together, such as 2 for pairs, one after the other in the batch: they stay in one
            microbatch.
        arrays: of the batch that it needs besides tokens, targets and weights, each [B, T].
        every_token: whether "loss" is the cross-entropy of every token in nats, of which bits per byte can be made.
    """

    terms: Callable[[Model, Params, Batch, jax.Array | None], Terms]
    group_rows: int = 1
    arrays: tuple[str, ...] = ()
    every_token: bool = False


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


OBJECTIVES: dict[str, Objective] = {
    "next_token": Objective(next_token, every_token=True),
    "sft": Objective(next_token),  # of the tokens that the data marks as learnt: no bits per byte
    "dpo": Objective(dpo, group_rows=2, arrays=("reference",)),
}


def check_arrays(name: str, objective: Objective, batch: Batch) -> None:
    """Raise UserError where the batch lacks an array that the objective needs."""
    for array in objective.arrays:
        if array not in batch:
            raise UserError(
                f"train.objective {name} needs the array {array!r} in every batch, which has "
                f"{', '.join(sorted(batch))}; give data that has it"
            )
