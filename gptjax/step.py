"""The train state, and the compiled steps that move it."""

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
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.loss import LossSpec, next_token_loss
from gptjax.nn.backends import check_model_divides, for_mesh
from gptjax.nn.ring import zigzag
from gptjax.nn.transformer import Params, abstract_model, bind, init_params
from gptjax.optim import abstract_opt_state, is_frozen, learning_rate, make_optimizer, map_by_path
from gptjax.sharding import check_divides, sharding

Batch = dict[str, jax.Array]  # tokens and targets [B, T] int32, weights [B, T] float32; maybe positions and segments


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: steps taken, int32 scalar.
        total_steps: where the schedule ends, int32 scalar.
        params: float32 weights.
        opt_state: the optimizer's moments, of the weights that are trained.
        ema: moving average of the weights; None without one.
    """

    step: jax.Array
    total_steps: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None


class Trainable(NamedTuple):
    """A config made concrete on a mesh: everything static that the steps close over.

    Attributes:
        cfg: with what was left open chosen for the mesh.
        graphdef: the model's structure.
        optimizer: gradients to directions, of the weights that are trained.
        frozen: paths of the weights that `optim.freeze` keeps out of gradients and moments.
        state: abstract TrainState, every leaf with its sharding.
        batch_sharding: of a batch's arrays.
    """

    cfg: Config
    mesh: Mesh
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    frozen: frozenset[tuple[str, ...]]
    state: TrainState
    batch_sharding: jax.sharding.NamedSharding


def make_trainable(cfg: Config, mesh: Mesh) -> Trainable:
    """Shapes and shardings of a run; nothing is allocated.

    Raises:
        UserError: a dimension that the mesh cannot cut into equal parts.
    """
    model, train = cfg.model, cfg.train
    for key, size, axis in (
        ("train.batch_sequences / train.microbatches", train.batch_sequences // train.microbatches, "batch"),
        ("model.context_length / train.loss_chunks", model.context_length // train.loss_chunks, "length"),
        ("model.context_length", model.context_length, "stream_length"),
    ):
        check_divides(mesh, key, size, axis)
    check_model_divides(model, mesh)

    cfg = replace(cfg, run=for_mesh(cfg.run, cfg.model, mesh))
    graphdef, params, metadata = abstract_model(cfg.model, cfg.run)
    frozen = frozenset(path for path, weight in metadata.items() if is_frozen(cfg.optim, weight))
    if len(frozen) == len(metadata):
        raise UserError(f"optim.freeze {list(cfg.optim.freeze)} leaves no weight to train; take a role out of it")
    optimizer = make_optimizer(cfg.optim, {path: w for path, w in metadata.items() if path not in frozen})

    def sharded(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, metadata[path]["axes"]))

    weights = map_by_path(sharded, params)
    replicated = sharding(mesh, ())
    moments = abstract_opt_state(optimizer, split_frozen(weights, frozen)[0], replicated)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    state = TrainState(scalar, scalar, weights, moments, weights if cfg.optim.ema_decay else None)
    return Trainable(cfg, mesh, graphdef, optimizer, frozen, state, sharding(mesh, ("batch", "length")))


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


def init_state(t: Trainable) -> TrainState:
    """The state before the first step, each device holding only its shards; the same bits on any mesh."""

    def init() -> TrainState:
        params = init_params(t.cfg.model, jax.random.key(t.cfg.seed))
        ema = jax.tree.map(jnp.copy, params) if t.cfg.optim.ema_decay else None
        total = jnp.asarray(t.cfg.train.total_steps, jnp.int32)
        moments = t.optimizer.init(split_frozen(params, t.frozen)[0])
        return TrainState(jnp.zeros((), jnp.int32), total, params, moments, ema)

    return jax.block_until_ready(_on_mesh(t.mesh, jax.jit(init, out_shardings=shardings_of(t.state)))())


def make_loss(t: Trainable) -> Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
    """(params, batch, dropout_key) -> summed objective, (summed cross-entropy, summed weights)."""
    cfg = t.cfg
    spec = LossSpec(cfg.model.vocab_size, cfg.train.loss_chunks, cfg.model.logit_softcap, cfg.train.z_loss)

    def loss(params: Params, batch: Batch, dropout_key: jax.Array | None = None):
        model = bind(t.graphdef, params)
        if cfg.run.attention == "ring":
            positions = batch.get("positions", jnp.arange(cfg.model.context_length, dtype=jnp.int32)[None])
            order = zigzag(cfg.model.context_length, t.mesh.shape["context"])
            batch = {name: x[:, order] for name, x in {**batch, "positions": positions}.items()}
        hidden, _ = model(
            batch["tokens"], positions=batch.get("positions"), segments=batch.get("segments"), dropout_key=dropout_key
        )
        objective, cross_entropy = next_token_loss(
            hidden, model.head_matrix(), batch["targets"], batch["weights"], spec
        )
        return objective, (cross_entropy, batch["weights"].sum())

    return loss


def make_train_step(t: Trainable) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step. It gives its input's memory away: use only the state that it returns.

    Metrics, float32 scalars: `train/loss` (mean cross-entropy in nats), `grad_norm` (before clipping), `lr`, and
    `skipped`: 1 where loss or gradient was not finite, and weights and moments therefore stayed as they were.
    """
    cfg, M = t.cfg, t.cfg.train.microbatches
    loss_of = make_loss(t)

    def loss(trained: Params, frozen: Params, batch: Batch, key: jax.Array | None):
        return loss_of(join_frozen(trained, frozen), batch, key)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def accumulate(trained: Params, frozen: Params, batch: Batch, key: jax.Array | None):
        """Sums over the microbatches: cross-entropy, token weights, and the gradient of the objective."""
        if M == 1:
            (_, sums), grads = gradient(trained, frozen, batch, key)
            return sums, grads

        def body(carry, inputs):
            index, part = inputs
            sub = None if key is None else jax.random.fold_in(key, index)
            (_, sums), grads = gradient(trained, frozen, part, sub)
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        # Every M-th row to a microbatch, so that a device finds its rows of each at home.
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, M, *x.shape[1:]), 1, 0), batch)
        zeros = jax.tree.map(jnp.zeros_like, ((jnp.zeros(()), jnp.zeros(())), trained))
        return jax.lax.scan(body, zeros, (jnp.arange(M), parts))[0]

    def train_step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step) if cfg.model.dropout else None
        trained, frozen = split_frozen(state.params, t.frozen)
        (cross_entropy, weight), grads = accumulate(trained, frozen, batch, key)
        loss, grads = cross_entropy / weight, jax.tree.map(lambda g: g / weight, grads)
        grad_norm = optax.tree.norm(grads)

        lr = learning_rate(cfg.optim, state.step, state.total_steps)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update(grads, trained, opt_state, ema):
            directions, opt_state = t.optimizer.update(grads, opt_state, trained)
            trained = jax.tree.map(lambda p, d: p - lr * d, trained, directions)
            if ema is not None:
                # A young average forgets faster, so that the first weights do not linger in it.
                decay = jnp.minimum(cfg.optim.ema_decay, (1.0 + state.step) / (10.0 + state.step))
                ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, trained)
            return trained, opt_state, ema

        ema, still = (None, None) if state.ema is None else split_frozen(state.ema, t.frozen)
        # A branch and not a choice of results: the moments are then changed in place, where a CPU copied them first.
        kept = jax.lax.cond(good, update, lambda _, *old: old, grads, trained, state.opt_state, ema)
        trained, opt_state, ema = kept
        params = join_frozen(trained, frozen)
        ema = None if ema is None else join_frozen(ema, still)
        metrics = {"train/loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": 1.0 - good}
        return TrainState(state.step + 1, state.total_steps, params, opt_state, ema), metrics

    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings_of(t.state), t.batch_sharding),
        out_shardings=(shardings_of(t.state), None),
        compiler_options=cpu.COMPILER_OPTIONS[cfg.model.dtype] if _is_cpu(t.mesh) else None,
    )
    return _on_mesh(t.mesh, compiled)


def make_eval_step(t: Trainable) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """(params, batch) -> summed cross-entropy in nats and summed weights, two float32 scalars."""
    loss = make_loss(t)
    compiled = jax.jit(
        lambda params, batch: loss(params, batch)[1],
        in_shardings=(shardings_of(t.state.params), t.batch_sharding),
    )
    return _on_mesh(t.mesh, compiled)


def _on_mesh(mesh: Mesh, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function, on its mesh. What its compiler leaves behind goes back before it asks for memory."""

    def run(*args):
        with jax.set_mesh(mesh):
            if not compiled._cache_size():
                compiled.lower(*args).compile()  # the call below finds it
                if _is_cpu(mesh):
                    cpu.return_freed_memory()
            return compiled(*args)

    run.compiled = compiled  # for tests that count compilations, and for looking at the program
    return run


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"
