"""Log-probabilities, next-token cross-entropy and distillation, with the logits of only some positions in memory."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSpec(NamedTuple):
    """What is static about how logits become log-probabilities and a loss.

    Attributes:
        vocab_size: logits beyond it belong to padding rows, and count for nothing.
        n_chunks: parts that the positions are cut into; it divides T.
        cap: soft cap of the logits, or None.
        z_loss: weight of log(denominator)^2 (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """

    vocab_size: int
    n_chunks: int = 1
    cap: float | None = None
    z_loss: float = 0.0


def log_probabilities(hidden: jax.Array, head: jax.Array, targets: jax.Array, spec: LossSpec) -> jax.Array:
    """Return the log-probability of each target, in nats: [B, T] float32, with gradients to hidden and head.

    The backward pass computes a chunk's logits again. Where a weighted sum is all that is wanted, `next_token_loss`
    saves that.

    Args:
        hidden: [B, T, D], in the compute dtype.
        head: [D, V] float32, or bfloat16 where it is frozen.
        targets: [B, T] int32.
    """

    @jax.checkpoint
    def body(_, chunk):
        h, t = chunk
        return None, _chunk_log_probabilities(h, head, t, spec)[0]

    _, parts = jax.lax.scan(body, None, _chunks(spec.n_chunks, hidden, targets))
    return jnp.moveaxis(parts, 0, 2).reshape(targets.shape)


class Distillation(NamedTuple):
    """What is static about learning from a teacher's distribution.

    Attributes:
        student, teacher: how the logits of each become log-probabilities. The ids of the smaller vocabulary count.
        temperature: by which the logits of both are divided.
        weight: of the divergence; the cross-entropy has the rest, 1 - weight.
    """

    student: LossSpec
    teacher: LossSpec
    temperature: float
    weight: float

    @property
    def n_chunks(self) -> int:
        """The parts that the positions are cut into."""
        return self.student.n_chunks


def next_token_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, spec: LossSpec
) -> tuple[jax.Array, jax.Array]:
    """Return sums over all positions, to be divided by the sum of the weights.

    Args:
        hidden: [B, T, D], in the compute dtype.
        head: [D, V] float32, or bfloat16 where it is frozen.
        targets: [B, T] int32.
        weights: [B, T] float32; 0 leaves a position out.

    Returns:
        the objective (with z-loss) and the cross-entropy alone, in nats, two float32 scalars. Only the first has a
        gradient.
    """
    return _sum_chunks(_chunk_loss, spec, hidden, head, (targets, weights), ())


def distillation_loss(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    spec: Distillation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the sums of distillation (Hinton et al. 2015, arXiv 1503.02531, section 2) over all positions.

    Args:
        hidden, head, targets, weights: as `next_token_loss` takes them.
        teacher_hidden: [B, T, D'], in the compute dtype.
        teacher_head: [D', V'].

    Returns:
        the objective, (1 - weight) * cross-entropy + weight * temperature^2 * divergence; the cross-entropy; and the
        divergence KL(teacher || student) at the temperature, in nats. Only the first has a gradient.
    """
    return _sum_chunks(_chunk_distillation, spec, hidden, head, (targets, weights, teacher_hidden), (teacher_head,))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_chunks(
    chunk_loss: Callable[..., tuple[jax.Array, ...]],
    spec: LossSpec | Distillation,
    hidden: jax.Array,
    head: jax.Array,
    by_position: tuple[jax.Array, ...],
    whole: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Return the sums over chunks of what `chunk_loss` returns, float32 scalars; only the first has a gradient.

    The gradient is formed in the forward pass, chunk by chunk: the backward pass multiplies by it instead of
    computing the logits again.

    Args:
        chunk_loss: (hidden, head, *by_position, *whole, spec) of a chunk -> scalars.
        by_position: arrays [B, T, ...] that are cut into chunks, as hidden is, without gradients.
        whole: arrays that every chunk sees, without gradients.
    """

    def body(sums, chunk):
        h, *parts = chunk
        return jax.tree.map(jnp.add, sums, chunk_loss(h, head, *parts, *whole, spec)), None

    chunks = _chunks(spec.n_chunks, hidden, *by_position)
    return jax.lax.scan(body, _zeros(chunk_loss, spec, head, chunks, whole), chunks)[0]


def _zeros(chunk_loss, spec, head, chunks, whole):
    h, *parts = jax.tree.map(lambda x: x[0], chunks)
    shapes = jax.eval_shape(lambda: chunk_loss(h, head, *parts, *whole, spec))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _forward(chunk_loss, spec, hidden, head, by_position, whole):
    def first_apart(h, w, parts):
        sums = chunk_loss(h, w, *parts, *whole, spec)
        return sums[0], sums

    gradient = jax.value_and_grad(first_apart, argnums=(0, 1), has_aux=True)

    def body(carry, chunk):
        sums, head_grad = carry
        h, *parts = chunk
        (_, losses), (h_grad, head_part) = gradient(h, head, parts)
        return (jax.tree.map(jnp.add, sums, losses), head_grad + head_part), h_grad

    chunks = _chunks(spec.n_chunks, hidden, *by_position)
    carry = (_zeros(chunk_loss, spec, head, chunks, whole), jnp.zeros_like(head))
    (sums, head_grad), parts = jax.lax.scan(body, carry, chunks)
    return sums, (jnp.moveaxis(parts, 0, 2).reshape(hidden.shape), head_grad)


def _backward(chunk_loss, spec, gradients, cotangents):
    hidden_grad, head_grad = gradients
    scale = cotangents[0]
    return (hidden_grad * scale).astype(hidden_grad.dtype), head_grad * scale, None, None


_sum_chunks.defvjp(_forward, _backward)


def _chunks(n, *arrays):
    """Cut [B, T, ...] to [n, B, T / n, ...]: chunk i holds the positions i, i + n, i + 2 n, ...

    Both B and T may be spread over devices. Of a chunk of neighbouring positions one device holds all, so that every
    device would compute the whole chunk's logits; a chunk cut by stride has an equal part on each device.
    """

    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // n, n, *x.shape[2:]), 2, 0)

    return tuple(map(cut, arrays))


def _chunk_loss(hidden, head, targets, weights, spec):
    return _weighted_loss(*_chunk_log_probabilities(hidden, head, targets, spec), weights, spec)


def _weighted_loss(log_probability, log_denominator, weights, spec):
    cross_entropy = jnp.sum(weights * -log_probability)
    return cross_entropy + spec.z_loss * jnp.sum(weights * jnp.square(log_denominator)), cross_entropy


def _chunk_distillation(hidden, head, targets, weights, teacher_hidden, teacher_head, spec):
    V = head.shape[1]
    shared = jnp.arange(V) < min(spec.student.vocab_size, spec.teacher.vocab_size)
    mine = _masked_logits(hidden, head, spec.student)
    theirs = _masked_logits(teacher_hidden, teacher_head, spec.teacher)[..., :V]
    theirs = jnp.pad(theirs, ((0, 0), (0, 0), (0, V - theirs.shape[-1])), constant_values=-jnp.inf)
    log_q, log_p = (jax.nn.log_softmax(jnp.where(shared, x, -jnp.inf) / spec.temperature) for x in (mine, theirs))
    divergence = jnp.where(shared, jnp.exp(log_p) * (log_p - log_q), 0).sum(-1)
    kl = jnp.sum(weights * divergence)
    log_probability, log_denominator = _of_targets(mine, targets)
    total, cross_entropy = _weighted_loss(log_probability, log_denominator, weights, spec.student)
    return (1 - spec.weight) * total + spec.weight * spec.temperature**2 * kl, cross_entropy, kl


def _chunk_log_probabilities(hidden, head, targets, spec):
    return _of_targets(_masked_logits(hidden, head, spec), targets)


def _masked_logits(hidden, head, spec):
    """Return float32 logits [B, T, V], with the cap, and minus infinity for the rows that pad the vocabulary."""
    logits = _logits(hidden, head)
    if spec.cap is not None:
        logits = spec.cap * jnp.tanh(logits / spec.cap)
    return jnp.where(jnp.arange(head.shape[1]) < spec.vocab_size, logits, -jnp.inf)


def _of_targets(logits, targets):
    """Return the log-probability of each target, and the log of the softmax's denominator, both [B, T]."""
    log_denominator = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, not a gather: its gradient is no scatter, and V may be spread over devices.
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(-1)
    return chosen - log_denominator, log_denominator


@jax.custom_vjp
def _logits(hidden, head):
    """[B, T, D] and [D, V] float32 -> [B, T, V] float32, from operands in hidden's dtype.

    So are those of the gradient's products: left to themselves they would be float32, the logits' own.
    """
    return jnp.einsum("BTD,DV->BTV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _logits_backward(saved, slopes):
    hidden, head = saved
    slopes = slopes.astype(hidden.dtype)
    hidden_grad = jnp.einsum("BTV,DV->BTD", slopes, head.astype(hidden.dtype))
    head_grad = jnp.einsum("BTD,BTV->DV", hidden, slopes, preferred_element_type=jnp.float32)
    return hidden_grad, head_grad.astype(head.dtype)


_logits.defvjp(lambda hidden, head: (_logits(hidden, head), (hidden, head)), _logits_backward)
