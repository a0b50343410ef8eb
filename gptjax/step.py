"""The train state, and the compiled steps that move it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from gptjax import cpu
from gptjax.config import Config, ModelConfig, override
from gptjax.errors import UserError, choose
from gptjax.hosts import exchange
from gptjax.lifecycle.goodput import spend_on
from gptjax.loss import log_probabilities
from gptjax.nn.adapters import ADAPTER, abstract_adapter, init_adapter
from gptjax.nn.backends import check_model_divides, for_mesh
from gptjax.nn.ring import zigzag
from gptjax.nn.transformer import STACKS, Params, abstract_model, active_share, flops_per_token, init_params
from gptjax.nn.weights import held_axes, hold
from gptjax.objectives import (
    OBJECTIVES,
    TEACHER,
    Batch,
    Model,
    Objective,
    Teacher,
    Terms,
    check_arrays,
    without_teacher,
)
from gptjax.optim import abstract_opt_state, is_frozen, learning_rate, make_optimizer, map_by_path
from gptjax.parametrization import Metadata
from gptjax.sharding import check_divides, parts_of, sharding
from gptjax.spikes import STATISTICS, first_statistics, judge_step, judge_update


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: steps taken, int32 scalar.
        total_steps: where the schedule ends, int32 scalar.
        params: the weights, float32 but for frozen ones under adapters (`lora.base_dtype`); and the teacher's, where
            there is one.
        opt_state: the optimizer's moments, of the weights that are trained.
        ema: moving average of the weights, or of the adapters where there are any; None without one.
        statistics: of losses, gradients and updates (`spikes.STATISTICS`), float32 [spikes.STATISTICS].
    """

    step: jax.Array
    total_steps: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    statistics: jax.Array

    @property
    def averaged(self) -> Params:
        """The weights to evaluate and to sample from: their moving average, where one is kept."""
        return self.params if self.ema is None else {**self.params, **self.ema}


class Trainable(NamedTuple):
    """A config made concrete on a mesh: everything static that the steps close over.

    Attributes:
        cfg: with what was left open chosen for the mesh.
        graphdef: the model's structure.
        optimizer: gradients to directions, of the weights that are trained.
        objective: what a step minimises.
        metadata: of each weight, by path (`transformer.abstract_model`), adapters included.
        frozen: paths of the weights that have neither gradients nor moments: those of `optim.freeze`, or all but the
            adapters where there are any; and the teacher's.
        state: abstract TrainState, every leaf with its sharding.
        batch_sharding: of a batch's arrays.
        teacher: the model that the run learns from; None without one.
    """

    cfg: Config
    mesh: Mesh
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    objective: Objective
    metadata: Metadata
    frozen: frozenset[tuple[str, ...]]
    state: TrainState
    batch_sharding: jax.sharding.NamedSharding
    teacher: Teacher | None = None


def make_trainable(cfg: Config, mesh: Mesh, teacher: ModelConfig | None = None) -> Trainable:
    """Return the shapes and shardings of a run; nothing is allocated.

    Args:
        teacher: the model of `distill.teacher`, of an objective that learns from one.

    Raises:
        UserError: a dimension that the mesh cannot cut into equal parts; an unknown objective, optimizer, schedule or
            role.
    """
    model, train = cfg.model, cfg.train
    objective = choose(OBJECTIVES, train.objective, "train.objective")
    rows, group = train.batch_sequences // train.microbatches, objective.group_rows
    if rows % group:
        raise UserError(
            f"train.batch_sequences / train.microbatches {rows} must be a multiple of {group}, the rows that "
            f"train.objective {train.objective} keeps together"
        )
    per_group = f" / {group} rows of a group" if group > 1 else ""
    for key, size, axis in (
        (f"train.batch_sequences / train.microbatches{per_group}", rows // group, "batch"),
        ("model.context_length / train.loss_chunks", model.context_length // (train.loss_chunks or 1), "length"),
        ("model.context_length", model.context_length, "stream_length"),
    ):
        check_divides(mesh, key, size, axis)
    check_model_divides(model, mesh)
    check_pipeline(cfg, mesh)

    run = for_mesh(cfg.run, cfg.model, mesh)
    learns_from, taught, described = make_teacher(cfg, mesh, objective, teacher)
    cfg = replace(cfg, run=run)
    graphdef, params, metadata = abstract_model(cfg.model, cfg.run)
    if cfg.lora.rank:
        adapter, declared = abstract_adapter(cfg.lora, params, metadata)
        params, metadata = {**params, **adapter}, {**metadata, **declared}
    params, metadata = {**params, **taught}, {**metadata, **described}
    frozen = frozenset(path for path, weight in metadata.items() if path[0] == TEACHER or is_fixed(cfg, weight))
    if len(frozen) == len(metadata):
        raise UserError(f"optim.freeze {list(cfg.optim.freeze)} leaves no weight to train; take a role out of it")
    optimizer = make_optimizer(cfg.optim, {path: w for path, w in metadata.items() if path not in frozen})

    weights = place_weights(cfg, mesh, params, metadata)
    replicated = sharding(mesh, ())
    trained = split_frozen(weights, frozen)[0]
    moments = abstract_opt_state(optimizer, trained, replicated)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    averaged = trained if cfg.lora.rank else without_teacher(weights)
    statistics = jax.ShapeDtypeStruct((STATISTICS,), jnp.float32, sharding=replicated)
    state = TrainState(scalar, scalar, weights, moments, averaged if cfg.optim.ema_decay else None, statistics)
    by_rows = sharding(mesh, ("batch", "length"))
    return Trainable(cfg, mesh, graphdef, optimizer, objective, metadata, frozen, state, by_rows, learns_from)


def check_pipeline(cfg: Config, mesh: Mesh) -> None:
    """Raise UserError where the pipeline's microbatches are not equal parts of what the mesh can cut."""
    rows, parts = cfg.train.batch_sequences // cfg.train.microbatches, parts_of(mesh, "microbatch")
    asked = cfg.run.pipeline_microbatches
    if asked is not None and mesh.shape.get("pipeline", 1) > 1 and rows % (asked * parts):
        raise UserError(
            f"run.pipeline_microbatches {asked} cannot cut train.batch_sequences / train.microbatches {rows} into "
            f"equal parts for the mesh's data x fsdp x expert {parts}; make {rows} a multiple of {asked * parts}"
        )


def make_teacher(
    cfg: Config, mesh: Mesh, objective: Objective, teacher: ModelConfig | None
) -> tuple[Teacher | None, Params, Metadata]:
    """Return the teacher of a run, its abstract weights under the key TEACHER, and their metadata by path.

    Raises:
        UserError: the objective needs one, or the mesh cannot cut it into equal parts.
    """
    if not objective.has_teacher:
        return None, {}, {}
    if teacher is None:
        raise UserError(f"train.objective {cfg.train.objective} needs distill.teacher, the model to learn from")
    teacher = override(teacher, {"dtype": cfg.model.dtype, "dropout": 0.0})
    try:
        check_model_divides(teacher, mesh)
        graphdef, params, metadata = abstract_model(teacher, for_mesh(cfg.run, teacher, mesh))
    except UserError as error:
        raise UserError(f"distill.teacher {cfg.distill.teacher!r}: {error}") from None
    return Teacher(teacher, graphdef), {TEACHER: params}, {(TEACHER, *path): w for path, w in metadata.items()}


def is_fixed(cfg: Config, weight: dict[str, Any]) -> bool:
    """Return whether a weight is not trained: its role is in `optim.freeze`, or adapters are trained in its place."""
    return is_frozen(cfg.optim, weight) or (cfg.lora.rank > 0 and weight["role"] != ADAPTER)


class TrainedCounts(NamedTuple):
    """Numbers of weights, with the padding of the vocabulary.

    Attributes:
        trained: those that have a gradient.
        products: those that multiply activations: the matrices of the blocks, and the head, tied or not.
        frozen_active: of these, those that multiply one token and have no gradient.
        active_adapters: in adapters, those that multiply one token, on top of the products.
    """

    trained: int
    products: int
    frozen_active: float
    active_adapters: float


def count_trained(cfg: Config) -> TrainedCounts:
    """Count the weights of a run by what a step does with them."""
    _, params, metadata = abstract_model(cfg.model)
    leaves, adapters, declared = flatten_dict(params), {}, {}
    if cfg.lora.rank:
        adapters, declared = abstract_adapter(cfg.lora, params, metadata)
    fixed = {path: is_fixed(cfg, weight) for path, weight in metadata.items()}
    head = ("embed",) if cfg.model.tie_embeddings else ("head",)
    products = [path for path in leaves if path[0] in STACKS or path == head]
    sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
    in_adapters = {path: math.prod(leaf.shape) for path, leaf in flatten_dict(adapters).items()}
    return TrainedCounts(
        trained=sum(size for path, size in sizes.items() if not fixed[path]) + sum(in_adapters.values()),
        products=sum(sizes[path] for path in products),
        frozen_active=sum(sizes[p] * active_share(cfg.model, metadata[p]) for p in products if fixed[p]),
        active_adapters=sum(size * active_share(cfg.model, declared[p]) for p, size in in_adapters.items()),
    )


def training_flops_per_token(cfg: Config, counts: TrainedCounts, teacher: ModelConfig | None = None) -> float:
    """Return the floating-point operations of a step for one token: `flops_per_token`, where all weights are trained.

    A frozen weight costs four operations and not six: it has no gradient. The adapters' products are added, and the
    forward pass of a teacher, a third of its training.

    Args:
        counts: `count_trained` of the config.
        teacher: the model that the run learns from; None without one.
    """
    own = flops_per_token(cfg.model) - 2 * counts.frozen_active + 6 * counts.active_adapters
    return own + (0 if teacher is None else flops_per_token(teacher) / 3)


def base_dtype(cfg: Config) -> str:
    """Return the dtype in which the model's matrices are held: of a frozen base, or else float32."""
    return cfg.lora.base_dtype if cfg.lora.rank else "float32"


def place_weights(cfg: Config, mesh: Mesh, params: Params, metadata: Metadata) -> Params:
    """Return abstract weights with their shardings, in the form in which the run holds them (`lora.base_dtype`)."""

    def place(path, leaf):
        dtype = "float32" if path[0] == TEACHER else base_dtype(cfg)
        held = jax.eval_shape(lambda x: hold(x, metadata[path], dtype), leaf)
        axes = held_axes(metadata[path], dtype)
        return jax.tree.map(
            lambda x, names: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, names)), held, axes
        )

    return map_by_path(place, params)


def split_frozen(params: Params, frozen: frozenset[tuple[str, ...]]) -> tuple[Params, Params]:
    """Split the weights into those that are trained and those at the paths of `frozen`, two nested dicts."""
    parts: tuple[Params, Params] = ({}, {})
    for path, leaf in flatten_dict(params).items():
        parts[path in frozen][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def join_frozen(trained: Params, frozen: Params) -> Params:
    """Return the weights that `split_frozen` split."""
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)})


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(t: Trainable, base: Params | None = None, teacher: Params | None = None) -> TrainState:
    """The state before the first step, each device holding only its shards; the same bits on any mesh.

    Args:
        base: the weights to start from, without adapters, in the form and on the shardings of `t.state`; None draws
            them.
        teacher: the weights of the model to learn from, on their shardings; None without one.
    """
    cfg = t.cfg
    given = {**(base or {}), **({} if teacher is None else {TEACHER: teacher})}

    def init(given: Params) -> TrainState:
        key = jax.random.key(cfg.seed)
        drawn = without_teacher(given) or map_by_path(
            lambda path, weight: hold(weight, t.metadata[path], base_dtype(cfg)), init_params(cfg.model, key)
        )
        adapters = {name: t.state.params[name] for name in t.state.params if name == ADAPTER}
        params = {**drawn, **init_adapter(adapters, t.metadata, key)}
        trained = split_frozen(params, t.frozen)[0]
        averaged = jax.tree.map(jnp.copy, trained if cfg.lora.rank else params) if cfg.optim.ema_decay else None
        total = jnp.asarray(cfg.train.total_steps, jnp.int32)
        new = {name: part for name, part in params.items() if name not in given}
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, total, new, t.optimizer.init(trained), averaged, first_statistics())

    wanted = t.state._replace(params={name: t.state.params[name] for name in t.state.params if name not in given})
    state = on_mesh(t.mesh, jax.jit(init, out_shardings=shardings_of(wanted)))(given)
    return jax.block_until_ready(state._replace(params={**given, **state.params}))


def make_terms(t: Trainable) -> Callable[[Params, Batch, jax.Array | None], Terms]:
    """Return (params, batch, key) -> the objective's terms, one of them named "loss"."""
    cfg, model = t.cfg, Model(t.cfg, t.graphdef, t.teacher)

    def terms_of(params: Params, batch: Batch, key: jax.Array | None = None) -> Terms:
        check_arrays(cfg.train.objective, t.objective, batch)
        terms = t.objective.terms(model, params, in_order_of_attention(t, batch), key)
        for name in cfg.train.aux_weights:
            choose(terms, name, "train.aux_weights")
        if "loss" in terms:
            return terms
        first = next(iter(terms))
        return {"loss" if name == first else name: term for name, term in terms.items()}

    return terms_of


def in_order_of_attention(t: Trainable, batch: Batch) -> Batch:
    """Return a batch with its positions in the order in which the run's attention kernel wants them."""
    if t.cfg.run.attention != "ring":
        return batch
    length = t.cfg.model.context_length
    positions = batch.get("positions", jnp.arange(length, dtype=jnp.int32)[None])
    order = zigzag(length, t.mesh.shape["context"])
    return {name: x[:, order] for name, x in {**batch, "positions": positions}.items()}


def make_gradient(t: Trainable) -> Callable[[Params, Params, Batch, jax.Array | None], tuple[Any, Params]]:
    """Return (trained, frozen, batch, key) -> ((weight of the minimised term, all terms), gradient of its mean).

    Sums and weights are those of the whole batch and are divided once: unequal microbatches change nothing.
    """
    M, aux_weights = t.cfg.train.microbatches, t.cfg.train.aux_weights
    terms_of = make_terms(t)

    def minimised(trained: Params, frozen: Params, batch: Batch, key: jax.Array | None, totals: Any):
        """The sum whose gradient, divided by the first term's weight in the step, is the step's."""
        terms = terms_of(join_frozen(trained, frozen), batch, key)
        objective, weight = next(iter(terms.values()))
        if totals is None:
            totals = weight, {name: term[1] for name, term in terms.items()}
        for name, scale in aux_weights.items():
            objective += scale * terms[name][0] * jax.lax.stop_gradient(totals[0] / totals[1][name])
        return objective, (weight, terms)

    gradient = jax.value_and_grad(minimised, has_aux=True)

    def accumulated(trained: Params, frozen: Params, batch: Batch, key: jax.Array | None):
        """The same over microbatches, one after the other."""
        parts = jax.tree.map(lambda x: split_rows(x, M, t.objective.group_rows), batch)
        inputs = (jnp.arange(M), parts)

        def key_of(index: jax.Array) -> jax.Array | None:
            return None if key is None else jax.random.fold_in(key, index)

        def weights(inputs):
            index, part = inputs
            _, (weight, terms) = minimised(trained, frozen, part, key_of(index), None)
            return weight, {name: term[1] for name, term in terms.items()}

        # Auxiliary terms have weights of their own, which the step's ratios need first; their sums are not computed.
        totals = jax.tree.map(lambda x: x.sum(0), jax.lax.map(weights, inputs)) if aux_weights else None

        def body(carry, inputs):
            index, part = inputs
            (_, sums), grads = gradient(trained, frozen, part, key_of(index), totals)
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        shapes = jax.eval_shape(minimised, trained, frozen, jax.tree.map(lambda x: x[0], parts), key, totals)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes, trained))
        return jax.lax.scan(body, zeros, inputs)[0]

    def whole(trained: Params, frozen: Params, batch: Batch, key: jax.Array | None):
        if M == 1:
            (_, sums), grads = gradient(trained, frozen, batch, key, None)
        else:
            sums, grads = accumulated(trained, frozen, batch, key)
        return sums, jax.tree.map(lambda g: g / sums[0], grads)

    return whole


def split_rows(x: jax.Array, n_parts: int, group_rows: int) -> jax.Array:
    """Split [B, ...] into microbatches [M, B / M, ...]: every M-th group of rows, so that devices keep their rows."""
    groups = jnp.moveaxis(x.reshape(-1, n_parts, group_rows, *x.shape[1:]), 1, 0)
    return groups.reshape(n_parts, -1, *x.shape[1:])


def make_update(t: Trainable) -> Callable[[TrainState, Params, jax.Array, jax.Array], tuple[Any, ...]]:
    """Return (state, gradients, rate, whether to take the step) -> (norm of the update, without the rate; weights,
    moments, average).

    Where the step is not taken, the norm is 0 and the rest stays as it is.
    """

    def update(state: TrainState, grads: Params, lr: jax.Array, good: jax.Array):
        def move(grads, trained, opt_state, ema):
            directions, opt_state = t.optimizer.update(grads, opt_state, trained)
            trained = jax.tree.map(lambda p, d: p - lr * d, trained, directions)
            if ema is not None:
                # A young average forgets faster, so that the first weights do not linger in it.
                decay = jnp.minimum(t.cfg.optim.ema_decay, (1.0 + state.step) / (10.0 + state.step))
                ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, trained)
            return optax.tree.norm(directions), trained, opt_state, ema

        def stay(grads, *kept):
            return jnp.zeros(()), *kept

        trained, frozen = split_frozen(state.params, t.frozen)
        ema, frozen_ema = (None, None) if state.ema is None else split_frozen(state.ema, t.frozen)
        # A branch and not a choice of results: the moments are then changed in place, where a CPU copied them first.
        norm, trained, opt_state, ema = jax.lax.cond(good, move, stay, grads, trained, state.opt_state, ema)
        return norm, join_frozen(trained, frozen), opt_state, None if ema is None else join_frozen(ema, frozen_ema)

    return update


def make_train_step(t: Trainable) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the compiled step. It consumes its input state: use only the state that it returns.

    Metrics, float32 scalars: `train/loss` and `train/NAME` of every other term (means over the step), `grad_norm`
    (before clipping), `update_norm` (of what the weights changed by), `lr`, and `skipped`: 1 where the objective or
    its gradient was not finite or spiked (`spikes.judge_step`), so that weights and moments stayed as they were.
    """
    cfg, gradient, update = t.cfg, make_gradient(t), make_update(t)

    def train_step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step) if cfg.model.dropout else None
        trained, frozen = split_frozen(state.params, t.frozen)
        (_, terms), grads = gradient(trained, frozen, batch, key)
        grad_norm = optax.tree.norm(grads)
        means = {f"train/{name}": total / weight for name, (total, weight) in terms.items()}

        lr = learning_rate(cfg.optim, state.step, state.total_steps)
        limits = cfg.train.spike_deviations, cfg.train.rollback_skips
        good, statistics = judge_step(state.statistics, means["train/loss"], grad_norm, *limits)
        norm, params, opt_state, ema = update(state, grads, lr, good)
        update_norm = lr * norm
        judged = jnp.where(jnp.isfinite(update_norm), norm, jnp.inf)  # the schedule is no spike
        statistics = judge_update(statistics, good, judged, *limits)
        metrics = {**means, "grad_norm": grad_norm, "update_norm": update_norm, "lr": lr, "skipped": 1.0 - good}
        return TrainState(state.step + 1, state.total_steps, params, opt_state, ema, statistics), metrics

    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings_of(t.state), t.batch_sharding),
        out_shardings=(shardings_of(t.state), None),
        compiler_options=cpu.compiler_options(cpu.PRODUCTS_OF[cfg.model.dtype]) if _is_cpu(t.mesh) else None,
    )
    return on_mesh(t.mesh, compiled)


def make_eval_step(t: Trainable) -> Callable[[Params, Batch], Terms]:
    """Return (params, batch) -> the objective's terms, one named "loss": sums and weights, float32 scalars."""
    compiled = jax.jit(make_terms(t), in_shardings=(shardings_of(t.state.params), t.batch_sharding))
    return on_mesh(t.mesh, compiled)


def make_row_log_probabilities(t: Trainable) -> Callable[[Params, Batch], jax.Array]:
    """Return (params, batch) -> the log-probability of each row's targets of weight 1, in nats: [B] float32, whole on
    every device.
    """
    model = Model(t.cfg, t.graphdef)

    def compute(params: Params, batch: Batch) -> jax.Array:
        batch = in_order_of_attention(t, batch)
        transformer, hidden, _ = model.run(params, batch, None)
        log_p = log_probabilities(hidden, transformer.head_matrix(), batch["targets"], model.loss_spec)
        return (log_p * batch["weights"]).sum(axis=1)

    shardings = (shardings_of(t.state.params), t.batch_sharding)
    return on_mesh(t.mesh, jax.jit(compute, in_shardings=shardings, out_shardings=sharding(t.mesh, ())))


def on_mesh(mesh: Mesh, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, called on its mesh.

    What its compiler leaves behind goes back before it asks for memory.
    """

    def run(*args):
        with jax.set_mesh(mesh):
            if not compiled._cache_size():
                with spend_on("compile"):
                    compiled.lower(*args).compile()  # the call below finds it
                if _is_cpu(mesh):
                    cpu.return_freed_memory()
                exchange(None)  # all processes have compiled: in a collective, gloo waits for a peer for 30 s only
            return compiled(*args)

    run.compiled = compiled  # for tests that count compilations, and for looking at the program
    return run


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"
