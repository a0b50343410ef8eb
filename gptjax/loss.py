"""Log-probabilities, next-token cross-entropy and distillation, with the logits of only some positions in memory.

Every device sums the gradient of the head over its own positions, chunk by chunk. The sums of all devices are added
once, at the end, however many chunks there are; the head is gathered once.

Letters: P parts of the positions, one for each device, T positions of a part and a chunk, D residual, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.checks import divisors
from gptjax.sharding import constrain, parts_of

# A chunk's float32 logits on one device take at most this much, unless it would then have fewer tokens than a product
# with the head needs to be bound by arithmetic, and not by the head's gradient, which every chunk reads and writes.
CHUNK_BYTES = 2**28
CHUNK_TOKENS = 1024


class LossSpec(NamedTuple):
    """What is static about how logits become log-probabilities and a loss.

    Attributes:
        vocab_size: logits beyond it belong to padding rows, and count for nothing.
        n_chunks: parts that the positions are cut into; it divides T. None: as `count_chunks` chooses.
        cap: soft cap of the logits, or None.
        z_loss: weight of log(denominator)^2 (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """

    vocab_size: int
    n_chunks: int | None = 1
    cap: float | None = None
    z_loss: float = 0.0


def count_chunks(rows: float, length: int, vocab: float) -> int:
    """Return the least number of chunks of the loss whose logits fit CHUNK_BYTES, or that have CHUNK_TOKENS tokens.

    Args:
        rows, vocab: sequences, and rows of the padded vocabulary, of one device.
        length: positions of one device; the number divides it.
    """
    most_tokens = max(CHUNK_BYTES / (4 * vocab), CHUNK_TOKENS)
    return next((n for n in divisors(length) if rows * length / n <= most_tokens), length)


def log_probabilities(hidden: jax.Array, head: jax.Array, targets: jax.Array, spec: LossSpec) -> jax.Array:
    """Return the log-probability of each target, in nats: [B, T] float32, with gradients to hidden and head.

    The backward pass computes a chunk's logits again. Where a weighted sum is all that is wanted, `next_token_loss`
    saves that.

    Args:
        hidden: [B, T, D], in the compute dtype.
        head: [D, V] float32, or bfloat16 where it is frozen.
        targets: [B, T] int32.
    """

    return _log_probabilities(spec, hidden, head, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probabilities(spec: LossSpec, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    cut, head = _cut(spec, hidden, head), _gathered(head, hidden)

    def body(_, chunk):
        h, t = chunk
        return None, _of_targets(_logits(h, head), t, spec)[0]

    return cut.join(jax.lax.scan(body, None, (cut.split(hidden), cut.split(targets)))[1], targets.shape)


def _log_probabilities_backward(spec, saved, slopes):
    hidden, head, targets = saved

    def gradient(logits, t, slope):
        return (), jax.vjp(lambda raw: _of_targets(raw, t, spec)[0], logits)[1](slope)[0]

    return *_sum_gradients(gradient, (), spec, hidden, head, (targets, slopes))[1], None


_log_probabilities.defvjp(
    lambda spec, *arrays: (_log_probabilities(spec, *arrays), arrays), _log_probabilities_backward
)


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
    def n_chunks(self) -> int | None:
        """The parts that the positions are cut into; None: as `count_chunks` chooses."""
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
        chunk_loss: (logits, *by_position, *whole, spec) of a chunk -> scalars.
        by_position: arrays [B, T, ...] that are cut into chunks, as hidden is, without gradients.
        whole: arrays that every chunk sees, without gradients.
    """
    cut, gathered = _cut(spec, hidden, head), _gathered(head, hidden)

    def body(sums, chunk):
        h, *parts = chunk
        return jax.tree.map(jnp.add, sums, chunk_loss(_logits(h, gathered), *parts, *whole, spec)), None

    chunks = [cut.split(x) for x in (hidden, *by_position)]
    return jax.lax.scan(body, _zeros(chunk_loss, spec, hidden, head, by_position, whole), chunks)[0]


def _zeros(chunk_loss, spec, hidden, head, by_position, whole):
    shapes = jax.eval_shape(lambda: chunk_loss(_logits(hidden, head), *by_position, *whole, spec))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _forward(chunk_loss, spec, hidden, head, by_position, whole):
    def first_apart(logits, parts):
        sums = chunk_loss(logits, *parts, *whole, spec)
        return sums[0], sums

    def gradient(logits, *parts):
        (_, sums), slopes = jax.value_and_grad(first_apart, has_aux=True)(logits, parts)
        return sums, slopes

    zeros = _zeros(chunk_loss, spec, hidden, head, by_position, whole)
    return _sum_gradients(gradient, zeros, spec, hidden, head, by_position)


def _sum_gradients(gradient, zeros, spec, hidden, head, by_position):
    """Fold a gradient over the chunks. Its products have operands in hidden's dtype, and the head's is float32.

    Args:
        gradient: (logits, *by_position) of a chunk -> sums, gradient to the logits.
        zeros: of the sums' shapes.

    Returns:
        the sums of all chunks, and the gradients to hidden and head.
    """
    cut, gathered = _cut(spec, hidden, head), _gathered(head, hidden)

    def body(carry, chunk):
        sums, head_grad = carry
        h, *parts = chunk
        found, slopes = gradient(_logits(h, gathered), *parts)
        slopes = slopes.astype(h.dtype)
        h_grad = jnp.einsum("PTV,DV->PTD", slopes, gathered)
        head_grad += jnp.einsum("PTD,PTV->PDV", h, slopes, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, found), constrain(head_grad, "part", None, "vocab")), h_grad

    head_zeros = constrain(jnp.zeros((cut.n_parts, *head.shape), jnp.float32), "part", None, "vocab")
    chunks = [cut.split(x) for x in (hidden, *by_position)]
    (sums, head_grad), h_grads = jax.lax.scan(body, (zeros, head_zeros), chunks)
    head_grad = constrain(head_grad.sum(0).astype(head.dtype), "embed", "vocab")
    # The sum over devices comes first: if it waited, the backward pass would hold the head's whole gradient.
    return sums, jax.lax.optimization_barrier((cut.join(h_grads, hidden.shape), head_grad))


def _backward(chunk_loss, spec, gradients, cotangents):
    hidden_grad, head_grad = gradients
    scale = cotangents[0]
    return (hidden_grad * scale).astype(hidden_grad.dtype), head_grad * scale, None, None


_sum_chunks.defvjp(_forward, _backward)


class Cut(NamedTuple):
    """How positions [B, T] are cut: into one part for each device, and every part into chunks.

    Attributes:
        n_chunks: of each part. Chunk i holds its positions i, i + n, i + 2 n, ...
        n_rows, n_lengths: by how many the mesh divides B and T.
    """

    n_chunks: int
    n_rows: int
    n_lengths: int

    @property
    def n_parts(self) -> int:
        """The parts that devices hold."""
        return self.n_rows * self.n_lengths

    def split(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, parts, positions, ...]; every device has an equal part of each chunk."""
        (B, T), rest, (n, rows, lengths) = x.shape[:2], x.shape[2:], self
        x = x.reshape(rows, B // rows, lengths, T // lengths // n, n, *rest)
        x = jnp.moveaxis(x, (4, 0, 2), (0, 1, 2)).reshape(n, rows * lengths, -1, *rest)
        return constrain(x, None, "part", None, *[None] * len(rest))

    def join(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undo `split` for an array that has this shape, [B, T, ...]."""
        (B, T, *rest), (n, rows, lengths) = shape, self
        x = x.reshape(n, rows, lengths, B // rows, T // lengths // n, *rest)
        x = jnp.moveaxis(x, (0, 1, 2), (4, 0, 2)).reshape(shape)
        return constrain(x, "batch", "length", *[None] * len(rest))


def _cut(spec: LossSpec | Distillation, hidden: jax.Array, head: jax.Array) -> Cut:
    (B, T), mesh = hidden.shape[:2], jax.sharding.get_abstract_mesh()
    rows, lengths, vocab = (parts_of(mesh, axis) for axis in ("batch", "length", "vocab"))
    rows, lengths = (n if size % n == 0 else 1 for size, n in ((B, rows), (T, lengths)))
    chosen = count_chunks(B / rows, T // lengths, head.shape[1] / vocab) if spec.n_chunks is None else spec.n_chunks
    return Cut(chosen, rows, lengths)


def _gathered(head: jax.Array, hidden: jax.Array) -> jax.Array:
    """Return the head as the products of all chunks take it: in hidden's dtype, and not sharded over D."""
    return constrain(head.astype(hidden.dtype), None, "vocab")


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[P, T, D] and [D, V] -> [P, T, V] float32, from operands in hidden's dtype."""
    return jnp.einsum("PTD,DV->PTV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _chunk_loss(logits, targets, weights, spec):
    return _weighted_loss(*_of_targets(logits, targets, spec), weights, spec)


def _weighted_loss(log_probability, log_denominator, weights, spec):
    cross_entropy = jnp.sum(weights * -log_probability)
    return cross_entropy + spec.z_loss * jnp.sum(weights * jnp.square(log_denominator)), cross_entropy


def _chunk_distillation(logits, targets, weights, teacher_hidden, teacher_head, spec):
    V = logits.shape[-1]
    shared = jnp.arange(V) < min(spec.student.vocab_size, spec.teacher.vocab_size)
    mine = _masked(logits, spec.student)
    theirs = _masked(_logits(teacher_hidden, teacher_head), spec.teacher)[..., :V]
    theirs = jnp.pad(theirs, ((0, 0), (0, 0), (0, V - theirs.shape[-1])), constant_values=-jnp.inf)
    log_q, log_p = (jax.nn.log_softmax(jnp.where(shared, x, -jnp.inf) / spec.temperature) for x in (mine, theirs))
    divergence = jnp.where(shared, jnp.exp(log_p) * (log_p - log_q), 0).sum(-1)
    kl = jnp.sum(weights * divergence)
    total, cross_entropy = _weighted_loss(*_of_masked(mine, targets), weights, spec.student)
    return (1 - spec.weight) * total + spec.weight * spec.temperature**2 * kl, cross_entropy, kl


def _masked(logits, spec):
    """Apply the cap to logits [P, T, V], and make those of the rows that pad the vocabulary minus infinity."""
    if spec.cap is not None:
        logits = spec.cap * jnp.tanh(logits / spec.cap)
    return jnp.where(jnp.arange(logits.shape[-1]) < spec.vocab_size, logits, -jnp.inf)


def _of_targets(logits, targets, spec):
    """Return the log-probability of each target, and the log of the softmax's denominator, both [P, T]."""
    return _of_masked(_masked(logits, spec), targets)


def _of_masked(logits, targets):
    log_denominator = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, not a gather: its gradient is no scatter, and V may be spread over devices.
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(-1)
    return chosen - log_denominator, log_denominator
