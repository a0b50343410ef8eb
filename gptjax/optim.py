"""Schedules, optimizers, and what each weight's path says about its treatment."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.config import OptimConfig


class Treatment(NamedTuple):
    """How the optimizer treats the weights of a path: by which rule, and whether they decay."""

    optimizer: str
    decay: bool


# Pattern of a weight's path -> its treatment; the first match counts.
TREATMENTS: dict[str, dict[str, Treatment]] = {
    "adamw": {
        r"norm/|bias|conv|positions": Treatment("adam", decay=False),
        r".*": Treatment("adam", decay=True),
    },
    "muon": {
        r"norm/|bias|conv|positions": Treatment("adam", decay=False),
        r"blocks/": Treatment("muon", decay=True),
        r".*": Treatment("adam", decay=True),
    },
}

# Share of the way through the decay (0 to 1) -> share of the way from the final rate (0) to the peak (1).
DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    "linear": lambda x: 1 - x,
    "wsd": lambda x: 1 - x,
    "constant": jnp.ones_like,
}


def learning_rate(cfg: OptimConfig, step: jax.Array, total_steps: jax.Array) -> jax.Array:
    """The rate of a step, float32. Both steps are arrays, so that a compiled step serves any `total_steps`.

    The step numbered 0 is the first to move the weights: a warm-up of w gives it peak / w.
    """
    step, total = step.astype(jnp.float32), total_steps.astype(jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / max(1, cfg.warmup_steps))
    start = jnp.maximum(total * (1 - cfg.decay_frac), cfg.warmup_steps) if cfg.schedule == "wsd" else cfg.warmup_steps
    progress = jnp.clip((step - start) / jnp.maximum(total - start, 1), 0, 1)
    return cfg.peak_lr * warmup * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * DECAYS[cfg.schedule](progress))


def first_match(table: dict[str, Any], path: str, default: Any = None) -> Any:
    """The value of the first pattern that is found in the path."""
    return next((value for pattern, value in table.items() if re.search(pattern, path)), default)


def make_optimizer(cfg: OptimConfig, metadata: dict[tuple[str, ...], dict[str, Any]]) -> optax.GradientTransformation:
    """Gradients to the direction that is subtracted, times the learning rate, from the weights.

    Args:
        metadata: of each weight by its path, as `transformer.abstract_model` gives it.
    """
    treatments = {path: first_match(TREATMENTS[cfg.name], "/".join(path)) for path in metadata}

    def by_path(of: Callable[[tuple[str, ...]], Any]) -> Callable[[Any], Any]:
        """A tree like the weights', each leaf what its path says."""
        return lambda tree: jax.tree.map_with_path(lambda keys, _: of(tuple(k.key for k in keys)), tree)

    factors = {path: meta["factors"][treatments[path].optimizer] for path, meta in metadata.items()}
    rules = {"muon": scale_by_muon(cfg.momentum, by_path(lambda path: metadata[path]))}
    labels = {path: treatment.optimizer for path, treatment in treatments.items()}
    for path in (path for path, label in labels.items() if label == "adam"):
        eps = factors[path]["eps"]
        labels[path] = "adam" if eps == 1 else f"adam, eps x {eps:g}"
        rules[labels[path]] = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps * eps)
    decays = by_path(lambda path: cfg.weight_decay * factors[path]["decay"] if treatments[path].decay else 0.0)
    rates = by_path(lambda path: first_match(cfg.lr_scales, "/".join(path), 1.0) * factors[path]["lr"])

    def decay_and_scale(updates, params):
        trees = (updates, params, decays(updates), rates(updates))
        return jax.tree.map(lambda u, w, decay, rate: (u + decay * w if decay else u) * rate, *trees)

    return optax.chain(
        optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
        with_moments_in(cfg.moments_dtype, optax.partition(rules, by_path(lambda path: labels[path]))),
        optax.stateless(decay_and_scale),
    )


def with_moments_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, which computes in float32, with the floating-point part of its state kept in `dtype` between steps."""

    def cast(state, dtype):
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


class MuonState(NamedTuple):
    """The running sum of gradients, shaped like the weights."""

    momentum: optax.Updates


def scale_by_muon(decay: float, metadata_of: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the momentum, made nearly orthogonal.

    Args:
        decay: of the momentum, used the Nesterov way.
        metadata_of: tree of weights -> tree of their metadata, for reading a weight as a matrix.
    """

    def init(params):
        return MuonState(optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, state.momentum, updates)
        nesterov = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, momentum, updates)
        metadata = metadata_of(updates)
        return jax.tree.map(lambda m, meta: _orthogonal_update(m, meta), nesterov, metadata), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def _orthogonal_update(x: jax.Array, meta: dict[str, Any]) -> jax.Array:
    """`orthogonalize`, on a weight that is a stack of matrices, scaled by sqrt(max(1, outputs / inputs))."""
    layers = 1 if "layers" in meta["axes"] else 0
    split = layers + meta["n_in"]
    shape = (*x.shape[:layers], math.prod(x.shape[layers:split]), math.prod(x.shape[split:]))
    matrix = orthogonalize(x.reshape(shape))
    return (matrix * max(1.0, shape[-1] / shape[-2]) ** 0.5).reshape(x.shape)


def orthogonalize(x: jax.Array, steps: int = 5) -> jax.Array:
    """Bring the singular values of [..., n, m] near 1, keeping the singular vectors.

    A quintic Newton-Schulz iteration, x <- a x + (b A + c A^2) x with A = x x^T. The coefficients maximise the
    slope at 0 and leave singular values within about [0.7, 1.2] (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[-1] >= x.shape[-2]
    x = x if wide else x.mT  # A is the smaller of the two products
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(steps):
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x if wide else x.mT
