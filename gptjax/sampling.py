"""How the next token is drawn: temperature, top-k, top-p and min-p, for rows that each have their own."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError

N_BEST = 256  # with no larger top_k, only so many of the best logits are ordered, and not the whole vocabulary


class Sampling(NamedTuple):
    """How a request's tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest; None for all.
        top_p: only the smallest set of tokens whose probability reaches p (Holtzman et al. 2019); None for all.
        min_p: only tokens at least p times as likely as the likeliest (Nguyen et al. 2024); None for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def check(self) -> "Sampling":
        """Return itself; raises UserError for values out of range."""
        for name, value, good, rule in (
            ("temperature", self.temperature, self.temperature >= 0, "must not be negative"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "must be at least 1"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "must lie in [0, 1]"),
        ):
            if not good:
                raise UserError(f"{name} {value} {rule}")
        return self


class RowSampling(NamedTuple):
    """How each row's tokens are drawn: arrays [B], so that one program serves any mix of requests.

    Attributes:
        temperature: float32; 0 takes the likeliest token.
        top_k: int32; 0 for no limit.
        top_p: float32; 1 for no limit.
        min_p: float32; 0 for no limit.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


def as_rows(samplings: Sequence[Sampling]) -> RowSampling:
    """Return the arrays of so many requests' values."""
    return RowSampling(
        np.array([s.temperature for s in samplings], np.float32),
        np.array([min(s.top_k or 0, np.iinfo(np.int32).max) for s in samplings], np.int32),
        np.array([1.0 if s.top_p is None else s.top_p for s in samplings], np.float32),
        np.array([s.min_p or 0.0 for s in samplings], np.float32),
    )


def draw(raw: jax.Array, key: jax.Array, count: jax.Array, rows: RowSampling) -> jax.Array:
    """Draw one token for each row of logits [B, V]: [B] int32.

    Args:
        raw: [B, V] float32.
        key: [B, 2] uint32, the data of each row's key; the token is drawn by fold_in(key, count).
        count: [B] int32, how many tokens each row has drawn before.
        rows: how each row draws.
    """
    likeliest = jnp.argmax(raw, axis=-1).astype(jnp.int32)

    def sample() -> jax.Array:
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key), count)
        drawn = jax.vmap(jax.random.categorical)(keys, filter_logits(raw, rows)).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, drawn, likeliest)

    return jax.lax.cond((rows.temperature > 0).any(), sample, lambda: likeliest)


def filter_logits(raw: jax.Array, rows: RowSampling) -> jax.Array:
    """Divide logits [B, V] by each row's temperature; -inf where its top-k, top-p or min-p leaves a token out."""
    V = raw.shape[-1]
    x = raw / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    limited = (rows.top_k > 0) & (rows.top_k < V)
    ordering = limited | (rows.top_p < 1)  # rows whose limits need their logits in order

    def least_of_best() -> jax.Array:
        return _least_kept(jax.lax.top_k(x, min(N_BEST, V))[0], rows)

    def least_of_all() -> jax.Array:
        return _least_kept(jnp.sort(x, axis=-1, descending=True), rows)

    best_suffice = (~ordering | (limited & (rows.top_k <= N_BEST))).all()
    which = jnp.where(ordering.any(), jnp.where(best_suffice, 1, 2), 0)
    least = jax.lax.switch(which, [lambda: jnp.full_like(x[:, :1], -jnp.inf), least_of_best, least_of_all])
    least = jnp.where(ordering[:, None], least, -jnp.inf)
    least = jnp.maximum(least, x.max(-1, keepdims=True) + jnp.log(rows.min_p)[:, None])
    return jnp.where(x < least, -jnp.inf, x)


def _least_kept(ordered: jax.Array, rows: RowSampling) -> jax.Array:
    """Return the least logit, [B, 1], that top-k, and after it top-p, keep of a row's best, in descending order."""
    C = ordered.shape[-1]
    k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, C), C)[:, None]
    kth = jnp.take_along_axis(ordered, k - 1, axis=-1)
    ordered = jnp.where(ordered < kth, -jnp.inf, ordered)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (before < rows.top_p[:, None]) | (rows.top_p >= 1)[:, None]
    return jnp.min(jnp.where(kept & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1, keepdims=True)
