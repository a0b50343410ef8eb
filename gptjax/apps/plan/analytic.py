"""Estimate the cost of a step by arithmetic: memory, FLOPs, bytes through HBM and between chips.

It needs neither compiler nor device. The sizes of arguments (weights, moments, batch) come from the run's shardings
and are exact. Temporaries are modelled on what the TPU compiler allocates; `docs/planning.md` compares them.

Letters as in the model.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from gptjax.apps.plan.chips import Topology
from gptjax.apps.plan.orthogonal import OrthogonalCosts, orthogonal_costs
from gptjax.checks import filled_axes
from gptjax.config import Config, DistillConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from gptjax.convert import teacher_config
from gptjax.errors import UserError, choose
from gptjax.loss import count_chunks
from gptjax.nn.adapters import ADAPTER
from gptjax.nn.backends import BACKENDS
from gptjax.nn.layers import GATED
from gptjax.nn.pipeline import count_microbatches
from gptjax.nn.transformer import STACKS, count_params, flops_per_token
from gptjax.objectives import OBJECTIVES, TEACHER
from gptjax.parametrization import ROLES
from gptjax.step import (
    Trainable,
    TrainedCounts,
    base_dtype,
    count_trained,
    make_trainable,
    split_frozen,
    training_flops_per_token,
)

BF16, F32 = 2, 4
HELD_BYTES = {"float32": F32, "bfloat16": BF16, "int8": 1}  # of an element of a matrix, by `lora.base_dtype`


class Costs(NamedTuple):
    """The costs of a step; of one device, except model_flops.

    Attributes:
        memory: bytes of params, optimizer, batch, gradients, temporaries and code.
        model_flops: FLOPs of all devices, as `flops_per_token` counts them.
        executed_flops: FLOPs including recomputation.
        hbm_bytes: bytes read from HBM and written to it.
        collectives: bytes sent by purpose, such as `weights gathered`.
        dcn_bytes: bytes sent between slices (or hosts of GPUs).
    """

    memory: dict[str, float]
    model_flops: float
    executed_flops: float
    hbm_bytes: float
    collectives: dict[str, float]
    dcn_bytes: float

    @property
    def total_bytes(self) -> float:
        """Return the sum of all memory."""
        return sum(self.memory.values())

    @property
    def ici_bytes(self) -> float:
        """Return the bytes sent within a slice."""
        return sum(self.collectives.values()) - self.dcn_bytes


def resolve_mesh(cfg: Config, topology: Topology) -> dict[str, int]:
    """Return the mesh's axis sizes, with -1 resolved.

    Raises:
        UserError: their product is not the number of chips, or `data` is no multiple of the number of slices.
    """
    axes = filled_axes(cfg.mesh.axes, topology.n_chips)
    if axes is None:
        asked = ", ".join(f"{name}={size}" for name, size in cfg.mesh.axes.items())
        raise UserError(
            f"mesh {asked} does not make the {topology.n_chips} chips of {topology.name}; change mesh.* "
            "(-1 takes what is left)"
        )
    if axes["data"] % topology.num_slices:
        raise UserError(
            f"mesh.data {axes['data']} does not split over {topology.num_slices} slices: only the data axis may "
            f"cross the data-centre network, so make it a multiple of {topology.num_slices}"
        )
    return axes


def abstract_trainable(cfg: Config, axes: dict[str, int]) -> Trainable:
    """Return the run's shapes and shardings on a mesh without devices; raise UserError as `make_trainable` does."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return make_trainable(cfg, mesh, planned_teacher(cfg))


def padded_bytes(shape: Iterable[int], itemsize: int) -> int:
    """Return the bytes of an array on a TPU, which stores the last two axes in tiles of 8 x 128 words.

    The compiler orders the axes of an argument so that padding is smallest.
    """
    sizes = tuple(shape)
    if not sizes:
        return 128 * itemsize
    if len(sizes) == 1:
        return _up(sizes[0], 1024) * itemsize
    rows = 8 * (4 // itemsize)
    whole = math.prod(sizes)
    pairs = ((i, j) for i in range(len(sizes)) for j in range(len(sizes)) if i != j)
    return min(whole // sizes[i] // sizes[j] * _up(sizes[i], rows) * _up(sizes[j], 128) for i, j in pairs) * itemsize


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def shard_bytes(tree: Any, tiled: bool) -> int:
    """Return the bytes of one device's shards of a tree of abstract arrays; `tiled`: with a TPU's padding."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += padded_bytes(shape, leaf.dtype.itemsize) if tiled else math.prod(shape) * leaf.dtype.itemsize
    return total


class DeviceSizes(NamedTuple):
    """Sizes on one device, for one microbatch."""

    sequences: float
    tokens: float
    tensor: int
    shards: int  # of the blocks' weights
    itemsize: int  # bytes of an activation's element
    stages: int  # of the pipeline
    turns: int  # in which each stage computes a microbatch, or nothing that counts
    idle: float  # turns for each one that counts, at least 1
    hidden: float  # hidden units of the MLPs that a token passes
    sorted: float  # rows of experts for each token of the device: its choices, and those of others' tokens


def _device_sizes(cfg: Config, axes: dict[str, int]) -> DeviceSizes:
    stages, parts = axes["pipeline"], axes["data"] * axes["fsdp"] * axes["expert"]
    rows = cfg.train.batch_sequences // cfg.train.microbatches
    sequences = cfg.train.batch_sequences / cfg.train.microbatches / (parts * stages)
    microbatches = count_microbatches(rows, cfg.run.pipeline_microbatches, stages, parts) if stages > 1 else 1
    turns = microbatches + stages - 1
    tokens = sequences * cfg.model.context_length / axes["context"]
    itemsize = BF16 if cfg.model.dtype == "bfloat16" else F32
    moe, sorted_rows, hidden = cfg.model.mlp.moe, 0.0, cfg.model.mlp_width
    if cfg.model.mlp.kind == "moe":
        sorted_rows = moe.top_k * axes["expert"]
        hidden = (moe.top_k + moe.shared_experts) * cfg.model.expert_width
    tensor, shards, idle = axes["tensor"], axes["fsdp"] * axes["tensor"] * stages, turns / microbatches
    return DeviceSizes(sequences, tokens, tensor, shards, itemsize, stages, turns, idle, hidden / tensor, sorted_rows)


def _n_hidden(cfg: ModelConfig) -> int:
    """Return how many arrays of hidden units an MLP makes: products, and what the activation makes of them."""
    return 3 if (cfg.mlp.moe.activation if cfg.mlp.kind == "moe" else cfg.mlp.kind) in GATED else 2


def _expert_share(cfg: ModelConfig, parts: int) -> float:
    """Return the share of the blocks' weights that one of so many devices along the expert axis holds."""
    if cfg.mlp.kind != "moe":
        return 1.0
    matrices = (cfg.n_layers - cfg.n_dense_layers) * cfg.mlp.moe.experts * _n_hidden(cfg)
    experts = matrices * cfg.d_model * cfg.expert_width
    return 1 - experts / weight_counts(cfg)["blocks"] * (1 - 1 / parts)


def trained_counts(cfg: Config) -> TrainedCounts:
    """Return `count_trained`, cached by the sections that it reads."""
    return _trained_counts(cfg.model, cfg.lora, tuple(cfg.optim.freeze))


@lru_cache(maxsize=32)
def _trained_counts(model: ModelConfig, lora: LoraConfig, freeze: tuple[str, ...]) -> TrainedCounts:
    return count_trained(Config(model=model, lora=lora, optim=OptimConfig(freeze=freeze)))


def planned_teacher(cfg: Config) -> ModelConfig | None:
    """Return `teacher_config`, cached by what it reads: it opens the model, and a search plans many candidates."""
    m = cfg.model
    return _planned_teacher(cfg.distill.teacher, cfg.train.objective, m.context_length, m.vocab_multiple)


@lru_cache(maxsize=8)
def _planned_teacher(path: str | None, objective: str, T: int, vocab_multiple: int) -> ModelConfig | None:
    model = ModelConfig(context_length=T, vocab_multiple=vocab_multiple)
    train, distill = TrainConfig(objective=objective), DistillConfig(teacher=path)
    return teacher_config(Config(model=model, train=train, distill=distill))


@lru_cache(maxsize=32)
def weight_counts(cfg: ModelConfig) -> dict[str, int]:
    """Return `count_params`, cached: it builds the model's shapes at every call."""
    return count_params(cfg)


@lru_cache(maxsize=32)
def active_counts(cfg: ModelConfig) -> dict[str, int]:
    """Return `count_params` of the weights that one token passes, cached."""
    return count_params(cfg, active=True)


def held_bytes(cfg: Config, axes: dict[str, int], tiled: bool) -> dict[str, int]:
    """Return the bytes that one device holds: all params, those of the blocks, those that are trained, a teacher's
    (which are among the params), and the optimizer's state, of the weights that are trained.

    Raises:
        UserError: a dimension that the mesh cannot shard.
    """
    t = abstract_trainable(cfg, axes)
    state = t.state
    return {
        "params": shard_bytes(state.params, tiled),
        "trained": shard_bytes(split_frozen(state.params, t.frozen)[0], tiled),
        "blocks": shard_bytes({name: state.params.get(name, {}) for name in STACKS}, tiled),
        "teacher": shard_bytes(state.params.get(TEACHER, {}), tiled),
        "optimizer": shard_bytes((state.step, state.total_steps, state.opt_state, state.ema), tiled),
    }


FUSED = ("splash", "cudnn", "ring")  # of `nn.backends.ATTENTIONS`


def estimate(
    cfg: Config, topology: Topology, fused_attention: bool | None = None, held: dict[str, int] | None = None
) -> Costs:
    """Return the costs of a step.

    Args:
        fused_attention: whether scores stay out of HBM and their masked half is not computed (flash or splash
            attention); None: as run.attention has it on these chips.
        held: `held_bytes` of the same model, optimizer and mesh, if known.

    Raises:
        UserError: the mesh does not fit the chips, or cannot shard the model.
    """
    axes = resolve_mesh(cfg, topology)
    if fused_attention is None:
        auto = BACKENDS[topology.chip.kind]["attention"]
        fused_attention = (auto if cfg.run.attention == "auto" else cfg.run.attention) in FUSED
    held = held or held_bytes(cfg, axes, topology.chip.kind == "tpu")
    tokens = cfg.train.batch_sequences * cfg.model.context_length
    teacher = planned_teacher(cfg)
    collectives, dcn = _communication(cfg, axes, topology)
    passes = executed_flops_per_token(cfg, fused_attention, teacher, _device_sizes(cfg, axes).idle)
    return Costs(
        memory=_memory(cfg, held, axes, fused_attention),
        model_flops=tokens * training_flops_per_token(cfg, trained_counts(cfg), teacher),
        executed_flops=tokens * passes / topology.n_chips + _orthogonal(cfg, axes).flops,
        hbm_bytes=_hbm_bytes(cfg, axes, fused_attention),
        collectives=collectives,
        dcn_bytes=dcn,
    )


def _orthogonal(cfg: Config, axes: dict[str, int]) -> OrthogonalCosts:
    """Return what Muon costs a device; of adapters, whose matrices are small, nothing."""
    if cfg.lora.rank:
        return OrthogonalCosts()
    return orthogonal_costs(cfg.model, cfg.optim.name, tuple(cfg.optim.freeze), tuple(axes.items()))


def executed_flops_per_token(
    cfg: Config, fused_attention: bool, teacher: ModelConfig | None = None, idle: float = 1.0
) -> float:
    """Return the FLOPs of forward and backward pass and of remat's recomputation, with the padded vocabulary.

    Attention has two matmuls forward and four backward, over the whole square of scores. A fused kernel recomputes
    the scores in its backward pass (five matmuls) and skips what is masked: the later half, and all before a
    window. A frozen weight has no gradient, which saves two of its six operations. A teacher's forward pass is a
    third of its training.

    Args:
        idle: turns of a pipeline for each one that counts: its stages compute in all of them.
    """
    m, blocks, counts = cfg.model, active_counts(cfg.model)["blocks"], trained_counts(cfg)
    one = 2 * m.n_heads * m.d_head  # of a token and a position that it attends to, in one matmul of the scores' size
    square = one * (visited_positions(m) if fused_attention else m.n_layers * m.context_length)
    again = {"none": (0, 0), "dots": (0, 2)}.get(cfg.run.remat, (2 * blocks, 2))  # named, offload: less
    matmuls = 2 + (5 if fused_attention else 4) + again[1]
    of_blocks = 6 * (blocks + counts.active_adapters) + again[0] + matmuls * square
    taught = 0 if teacher is None else flops_per_token(teacher) / 3
    return idle * of_blocks + 6 * m.d_model * m.padded_vocab - 2 * counts.frozen_active + taught


def visited_positions(m: ModelConfig) -> float:
    """Return to how many positions a token attends on average, summed over the layers."""
    T, window = m.context_length, min(m.attention.window or m.context_length, m.context_length)
    return sum(window - window**2 / (2 * T) if local else T / 2 for local in m.local_layers)


def _memory(cfg: Config, held: dict[str, int], axes: dict[str, int], fused: bool) -> dict[str, float]:
    m, s = cfg.model, _device_sizes(cfg, axes)
    cut_batch = axes["data"] * axes["fsdp"] * axes["expert"] * axes["pipeline"] * axes["context"]
    arrays = 3 + len(choose(OBJECTIVES, cfg.train.objective, "train.objective").arrays)
    batch = arrays * F32 * cfg.train.batch_sequences * m.context_length / cut_batch
    params, blocks = held["params"], held["blocks"]
    rest = params - blocks - held["teacher"] - (held["trained"] if cfg.lora.rank else 0)
    held_itemsize = HELD_BYTES[base_dtype(cfg)]
    block_weights = blocks / held_itemsize
    layer_full = (
        block_weights * s.stages / m.n_layers * axes["fsdp"] * s.itemsize
    )  # one layer's weights, gathered and cast
    head_trained = head_is_trained(cfg)
    V, D = m.padded_vocab / s.tensor, m.d_model
    H, G = m.n_heads / s.tensor, m.kv_heads / s.tensor
    scores = 0 if fused else s.sequences * H * (m.context_length / axes["context"]) * m.context_length

    stream = s.tokens * D * s.itemsize
    kept = stream  # what a layer keeps for the backward pass
    qkv, n_hidden = s.tokens * (H + 2 * G) * m.d_head * s.itemsize, _n_hidden(m)
    hidden = s.tokens * s.hidden * axes["expert"] * s.itemsize
    # Norms, what convolutions make of them, sums; rows sorted by expert, before and after the experts.
    streams = ((8 if m.conv_width else 6) + 2 * s.sorted) * stream
    if cfg.run.remat == "dots":
        kept += qkv + hidden * (n_hidden - 1) + 2 * stream
    elif cfg.run.remat == "named":
        parts = {"block_input": 0, "qkv": qkv, "attention": s.tokens * H * m.d_head * s.itemsize, "mlp": hidden}
        kept += sum(parts[name] for name in cfg.run.remat_names)
    elif cfg.run.remat == "none":
        kept += 2 * qkv + hidden * (n_hidden + 1) + streams + scores * (F32 + BF16 + 1)
    # In the backward pass of one layer: scores, their gradient, and the recomputed activations.
    layer = scores * 2 * F32 + 2 * qkv + (n_hidden + 1) * hidden + streams + 2 * layer_full
    chunk = s.tokens / loss_chunks(cfg, axes) * V
    # The head's gradient and its gathered copy; with tied embeddings, also the copy for the token lookup.
    copies = 2 if m.tie_embeddings else 1
    head = D * V * (F32 * head_trained + copies * s.itemsize) + copies / 2 * rest * head_trained
    # A teacher's logits lie beside the model's.
    loss = chunk * (4 if held["teacher"] else 2) * F32 + head + 2 * stream
    # All float32 weights are cast before the loop over layers.
    casts = block_weights * s.itemsize if s.itemsize == BF16 and held_itemsize == F32 else 0
    return {
        "params": params,
        "optimizer": held["optimizer"],
        "batch": batch,
        "gradients": held["trained"] * (2 if cfg.train.microbatches > 1 else 1),
        "temporaries": m.n_layers * s.idle * kept + casts + max(layer, loss),
        "code": 40e6,
    }


def loss_chunks(cfg: Config, axes: dict[str, int]) -> int:
    """Return the number of chunks of the loss: `train.loss_chunks`, or as the loss chooses (`loss.count_chunks`)."""
    m, s = cfg.model, _device_sizes(cfg, axes)
    chosen = count_chunks(s.sequences, m.context_length // axes["context"], m.padded_vocab / s.tensor)
    return cfg.train.loss_chunks or chosen


def frozen_roles(cfg: Config) -> set[str]:
    """Return the roles of the weights that have no gradient."""
    return set(ROLES) - {ADAPTER} if cfg.lora.rank else set(cfg.optim.freeze)


def head_is_trained(cfg: Config) -> bool:
    """Return whether the head has a gradient; a tied one is the embedding."""
    return ("embed" if cfg.model.tie_embeddings else "head") not in frozen_roles(cfg)


def _hbm_bytes(cfg: Config, axes: dict[str, int], fused: bool) -> float:
    """Return the HBM bytes: each pass moves a layer's activations and weights, the optimizer all its state."""
    m, s = cfg.model, _device_sizes(cfg, axes)
    H, G = m.n_heads / s.tensor, m.kv_heads / s.tensor
    counts = weight_counts(m)
    passes = 3 + {"none": 0, "dots": 0.5}.get(cfg.run.remat, 1)
    arrays = (8 + 4 * s.sorted) * m.d_model + 2 * (2 * H + 2 * G) * m.d_head + 2 * _n_hidden(m) * s.hidden
    scores = 0 if fused else 3 * F32 * s.sequences * H * m.context_length**2 / axes["context"]
    trained = trained_counts(cfg)
    # Each matrix is read twice, and its gradient written; a frozen one is read in the form in which it is held.
    read = HELD_BYTES[base_dtype(cfg)] if cfg.lora.rank else s.itemsize
    gradients = s.itemsize * min(trained.trained / trained.products, 1.0)
    blocks = counts["blocks"] * _expert_share(m, axes["expert"]) / m.n_layers / s.tensor
    weights = s.turns / s.stages * (2 * read + gradients) * blocks
    layer = s.idle * (s.tokens * arrays * s.itemsize + scores) + weights
    logits = 6 * F32 * s.tokens * m.padded_vocab / s.tensor
    state = 10 * F32 * trained.trained * _expert_share(m, axes["expert"]) / s.shards
    return cfg.train.microbatches * (passes * m.n_layers * layer + logits) + state


def _communication(cfg: Config, axes: dict[str, int], topology: Topology) -> tuple[dict[str, float], float]:
    """Return the bytes that one device sends in a step, by purpose, and how many of them leave the slice."""
    m, s, M = cfg.model, _device_sizes(cfg, axes), cfg.train.microbatches
    counts = weight_counts(m)
    blocks = counts["blocks"] * _expert_share(m, axes["expert"]) * s.itemsize / s.tensor / s.stages
    vocab = m.padded_vocab * m.d_model * s.itemsize / s.tensor
    fsdp, tensor = _ring(axes["fsdp"]), _ring(axes["tensor"])
    trained = trained_counts(cfg)
    share = min(trained.trained / trained.products, 1.0)  # of the weights that have a gradient
    n_tables = 1 if m.tie_embeddings else 2
    stream = s.tokens * m.d_model * s.itemsize
    # Each block has two sums forward and two backward; full remat repeats the first.
    sums = m.n_layers * (5 if cfg.run.remat == "full" else 4) + 2
    head_grad = vocab / s.itemsize * F32 * head_is_trained(cfg)
    copies = axes["data"] * axes["expert"]
    batch_parts = copies * axes["fsdp"] * s.stages
    # Each turn hands a microbatch to the next stage, gathers the next one, and gives out a result.
    handed = (1 + 2 * _ring(s.stages)) * s.idle * s.stages * stream if s.stages > 1 else 0
    # A layer gathers tokens and scatters sums, forward and backward; full remat gathers once more.
    exchanges = (m.n_layers - m.n_dense_layers) * (5 if cfg.run.remat == "full" else 4)
    made = {
        "weights gathered": M * fsdp * (2 * s.turns * blocks + n_tables * vocab),
        "gradients scattered": M * fsdp * s.turns * blocks * share,
        "embedding's gradient": M * 2 * _ring(batch_parts) * vocab * ("embed" not in frozen_roles(cfg)),
        "head's gradient": M * (fsdp + 2 * _ring(copies * s.stages) / axes["fsdp"]) * head_grad,
        "gradients over data": M * 2 * _ring(copies) * blocks / axes["fsdp"] * share,
        "matrices dealt to devices": _orthogonal(cfg, axes).sent_bytes,
        "microbatches over stages": M * 2 * handed,
        "tokens over experts": M * exchanges * (axes["expert"] - 1) * stream,
        "activations over tensor": M * 2 * tensor * sums * stream,
        "keys and values over context": M * 4 * _ring(axes["context"]) * m.n_layers
        * s.sequences * m.context_length * 2 * m.kv_heads / s.tensor * m.d_head * s.itemsize,
    }  # fmt: skip
    made = {name: size for name, size in made.items() if size > 0}
    crossing = 0.0
    if topology.num_slices > 1:
        crossing = 2 * _ring(topology.num_slices) * (blocks + n_tables * vocab) / axes["fsdp"] * M * share
    elif topology.chip.kind == "gpu" and topology.n_chips > topology.chips_per_island:
        # The part of each ring that passes between hosts.
        share = 1 - (topology.chips_per_island - 1) / (topology.n_chips - 1)
        crossing = share * sum(size for name, size in made.items() if "tensor" not in name)
    return made, crossing


def _ring(n: int) -> float:
    """Return the fraction of an array that each of n devices sends when they gather or scatter it."""
    return (n - 1) / n
