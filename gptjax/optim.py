"""Schedules and optimizers. Which rule updates a weight, and whether it decays, follows from the weight's role."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from gptjax.config import OptimConfig
from gptjax.errors import choose
from gptjax.muon import scale_by_muon
from gptjax.parametrization import ROLES, Metadata, Path, Role, role_named


class Schedule(NamedTuple):
    """How the learning rate falls after the warm-up.

    Attributes:
        remaining: progress of the decay (0 to 1) -> share of the way from the final rate (0) to the peak (1).
        late: whether the decay takes only the last `optim.decay_frac` of the steps.
    """

    remaining: Callable[[jax.Array], jax.Array]
    late: bool = False


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x))),
    "linear": Schedule(lambda x: 1 - x),
    "wsd": Schedule(lambda x: 1 - x, late=True),
    "constant": Schedule(jnp.ones_like),
}


def learning_rate(cfg: OptimConfig, step: jax.Array, total_steps: jax.Array) -> jax.Array:
    """Return the rate of a step, float32. Both steps are arrays, so that a compiled step serves any `total_steps`.

    The step numbered 0 is the first to move the weights: a warm-up of w gives it peak / w.
    """
    schedule = choose(SCHEDULES, cfg.schedule, "optim.schedule")
    step, total = step.astype(jnp.float32), total_steps.astype(jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / max(1, cfg.warmup_steps))
    start = jnp.maximum(total * (1 - cfg.decay_frac), cfg.warmup_steps) if schedule.late else cfg.warmup_steps
    progress = jnp.clip((step - start) / jnp.maximum(total - start, 1), 0, 1)
    return cfg.peak_lr * warmup * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * schedule.remaining(progress))


class Rule(NamedTuple):
    """How gradients become directions.

    Attributes:
        make: (config, factor on eps, metadata) -> the transformation, which sees the weights of one group.
        entrywise: whether rate and decay follow the model's size by the roles' exponents, as Adam's do. A rule whose
            updates have one spectral norm in every size keeps its own.
        absolute: whether the factor on the rate is the step at the rate's peak, whatever that peak is.
    """

    make: Callable[[OptimConfig, float, Metadata], optax.GradientTransformation]
    entrywise: bool = True
    absolute: bool = False


def make_adam(cfg: OptimConfig, eps_factor: float, metadata: Metadata) -> optax.GradientTransformation:
    """Return Adam (Kingma and Ba 2014, arXiv 1412.6980)."""
    return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps * eps_factor)


def make_muon(cfg: OptimConfig, eps_factor: float, metadata: Metadata) -> optax.GradientTransformation:
    """Return Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the momentum, made nearly orthogonal."""
    return scale_by_muon(cfg.momentum, metadata)


def make_sign(cfg: OptimConfig, eps_factor: float, metadata: Metadata) -> optax.GradientTransformation:
    """Return the sign of the gradient, by which biases of routers move (Wang et al. 2024, arXiv 2408.15664)."""
    return optax.scale_by_sign()


RULES: dict[str, Rule] = {
    "adam": Rule(make_adam),
    "muon": Rule(make_muon, entrywise=False),
    "sign": Rule(make_sign, absolute=True),
}
# optim.name -> the rule, of RULES, for the weights of a role.
OPTIMIZERS: dict[str, Callable[[Role], str]] = {
    "adamw": lambda role: "adam",
    "muon": lambda role: "muon" if role.hidden else "adam",
}


class Group(NamedTuple):
    """The weights that one transformation updates: they share a rule and a factor on eps."""

    rule: str
    eps_factor: float

    @property
    def name(self) -> str:
        """The group's key in the optimizer's state, in memory and on disk."""
        return self.rule if self.eps_factor == 1 else f"{self.rule}, eps x {self.eps_factor:g}"


class Treatment(NamedTuple):
    """What the optimizer does with a weight: its group, and factors on rate and decay."""

    group: Group
    lr: float
    decay: float


def first_match(table: dict[str, Any], path: str, default: Any = None) -> Any:
    """Return the value of the first pattern that is found in the path."""
    return next((value for pattern, value in table.items() if re.search(pattern, path)), default)


def treat(cfg: OptimConfig, path: Path, weight: dict[str, Any]) -> Treatment:
    """Return the treatment of a weight, which follows from its role, the model's size and `optim.lr_scales`.

    Raises:
        UserError: `optim.name` is unknown.
    """
    role, factors = role_named(weight["role"]), weight["factors"]
    rule = role.rule or choose(OPTIMIZERS, cfg.name, "optim.name")(role)
    lr, decay, eps = (factors["lr"], factors["decay"], factors["eps"]) if RULES[rule].entrywise else (1.0, 1.0, 1.0)
    lr /= cfg.peak_lr if RULES[rule].absolute else 1.0
    lr *= first_match(cfg.lr_scales, "/".join(path), 1.0)
    return Treatment(Group(rule, eps), lr, cfg.weight_decay * decay if role.decays else 0.0)


def is_frozen(cfg: OptimConfig, weight: dict[str, Any]) -> bool:
    """Return whether the weight's role is among `optim.freeze`: it has no gradient and no moments.

    Raises:
        UserError: a role of `optim.freeze` is unknown.
    """
    for role in cfg.freeze:
        choose(ROLES, role, "optim.freeze")
    return weight["role"] in cfg.freeze


def make_optimizer(cfg: OptimConfig, metadata: Metadata) -> optax.GradientTransformation:
    """Return gradients to the direction that is subtracted, times the learning rate, from the weights.

    Args:
        metadata: of each weight that is trained, by its path.

    Raises:
        UserError: `optim.name` or `optim.schedule` is unknown.
    """
    choose(SCHEDULES, cfg.schedule, "optim.schedule")
    treatments = {path: treat(cfg, path, weight) for path, weight in metadata.items()}
    # Checkpoints of every optimizer have a group "muon", without arrays where it is not used.
    groups = {Group("muon", 1.0), *(treatment.group for treatment in treatments.values())}
    rules = {group.name: RULES[group.rule].make(cfg, group.eps_factor, metadata) for group in sorted(groups)}

    def group_names(params):
        return map_by_path(lambda path, _: treatments[path].group.name, params)

    def decay_and_scale(updates, params):
        def direction(path, update, weight):
            treatment = treatments[path]
            update = update + treatment.decay * weight if treatment.decay else update
            return update * treatment.lr

        return map_by_path(direction, updates, params)

    return optax.chain(
        optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
        with_moments_in(cfg.moments_dtype, optax.partition(rules, group_names)),
        optax.stateless(decay_and_scale),
    )


def map_by_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map f(path, leaf, ...) over nested dicts; a path is the tuple of a leaf's names."""
    return jax.tree.map_with_path(lambda keys, *leaves: f(tuple(k.key for k in keys), *leaves), tree, *rest)


def abstract_opt_state(optimizer: optax.GradientTransformation, weights: Any, replicated: Sharding) -> Any:
    """Return the optimizer's state as ShapeDtypeStructs: each moment lies as its weight does.

    Args:
        weights: a tree of ShapeDtypeStructs with shardings.
        replicated: the sharding of what belongs to no weight, such as a count, or has another shape than its weight.
    """

    def placed(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def moment(leaf, weight):
        if is_masked(leaf):  # the weight of another group
            return leaf
        return placed(leaf, weight.sharding if leaf.shape == weight.shape else replicated)

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    return optax.tree.map_params(
        optimizer,
        moment,
        jax.eval_shape(optimizer.init, weights),
        weights,
        transform_non_params=lambda leaf: placed(leaf, replicated),
        is_leaf=is_masked,
    )


def with_moments_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, which computes in float32, with the floating-point part of its state kept in `dtype` between steps."""

    def cast(state, dtype):
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
