"""Log-probabilities and next-token cross-entropy, with the logits of only some positions in memory at a time."""

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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
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
        the objective (with z-loss) and the cross-entropy alone, in nats, two float32 scalars. Only the
        first has a gradient, and it is formed in the forward pass, chunk by chunk: the backward pass
        multiplies by it instead of computing the logits again.
    """

    def body(sums, chunk):
        h, t, w = chunk
        return jax.tree.map(jnp.add, sums, _chunk_loss(h, head, t, w, spec)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), _chunks(spec.n_chunks, hidden, targets, weights))[0]


def _forward(hidden, head, targets, weights, spec):
    gradient = jax.value_and_grad(_chunk_loss, argnums=(0, 1), has_aux=True)

    def body(carry, chunk):
        sums, head_grad = carry
        h, t, w = chunk
        losses, (h_grad, head_part) = gradient(h, head, t, w, spec)
        return (jax.tree.map(jnp.add, sums, losses), head_grad + head_part), h_grad

    zero = jnp.zeros((), jnp.float32)
    carry = ((zero, zero), jnp.zeros_like(head))
    (sums, head_grad), parts = jax.lax.scan(body, carry, _chunks(spec.n_chunks, hidden, targets, weights))
    return sums, (jnp.moveaxis(parts, 0, 2).reshape(hidden.shape), head_grad)


def _backward(spec, gradients, cotangents):
    hidden_grad, head_grad = gradients
    scale = cotangents[0]
    return (hidden_grad * scale).astype(hidden_grad.dtype), head_grad * scale, None, None


next_token_loss.defvjp(_forward, _backward)


def _chunks(n, *arrays):
    """Cut [B, T, ...] to [n, B, T / n, ...]: chunk i holds the positions i, i + n, i + 2 n, ...

    Both B and T may be spread over devices. Of a chunk of neighbouring positions one device holds all, so that every
    device would compute the whole chunk's logits; a chunk cut by stride has an equal part on each device.
    """

    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // n, n, *x.shape[2:]), 2, 0)

    return tuple(map(cut, arrays))


def _chunk_loss(hidden, head, targets, weights, spec):
    log_probability, log_denominator = _chunk_log_probabilities(hidden, head, targets, spec)
    cross_entropy = jnp.sum(weights * -log_probability)
    return cross_entropy + spec.z_loss * jnp.sum(weights * jnp.square(log_denominator)), cross_entropy


def _chunk_log_probabilities(hidden, head, targets, spec):
    logits = _logits(hidden, head)
    if spec.cap is not None:
        logits = spec.cap * jnp.tanh(logits / spec.cap)
    ids = jnp.arange(head.shape[1])
    logits = jnp.where(ids < spec.vocab_size, logits, -jnp.inf)
    log_denominator = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, not a gather: its gradient is no scatter, and V may be spread over devices.
    chosen = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
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
