"""What a step costs, by arithmetic: memory, FLOPs, bytes through HBM and between chips. No compiler, no device.

Arguments (weights, moments, batch) come from the project's own shardings, so they are exact. Temporaries follow what
the TPU compiler was seen to keep; `docs/planning.md` compares them.

Letters as in the model; W stands for the weights that a device holds of the blocks.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from gptjax.apps.plan.chips import Topology
from gptjax.checks import filled_axes
from gptjax.config import Config, ModelConfig
from gptjax.errors import UserError
from gptjax.nn.backends import BACKENDS
from gptjax.nn.transformer import count_params, flops_per_token
from gptjax.step import Trainable, make_trainable

BF16, F32 = 2, 4


class Costs(NamedTuple):
    """A step, on one device.

    Attributes:
        memory: bytes of params, optimizer, batch, gradients, temporaries and code.
        model_flops: of all devices, as `flops_per_token` counts them.
        executed_flops: of one device: with what is recomputed.
        hbm_bytes: read and written.
        collectives: wire bytes by what they are for: `params gathered`, ...
        dcn_bytes: wire bytes between slices (or hosts of GPUs).
    """

    memory: dict[str, float]
    model_flops: float
    executed_flops: float
    hbm_bytes: float
    collectives: dict[str, float]
    dcn_bytes: float

    @property
    def total_bytes(self) -> float:
        """All memory."""
        return sum(self.memory.values())

    @property
    def ici_bytes(self) -> float:
        """Wire bytes within a slice."""
        return sum(self.collectives.values()) - self.dcn_bytes


def resolve_mesh(cfg: Config, topology: Topology) -> dict[str, int]:
    """The mesh's sizes, with -1 filled in.

    Raises:
        UserError: they do not multiply to the number of chips, or `data` does not split over the slices.
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
    """The run's shapes and shardings on a mesh that has no devices; raises UserError as `make_trainable`."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return make_trainable(cfg, mesh)


def padded_bytes(shape: Iterable[int], itemsize: int) -> int:
    """Bytes of an array on a TPU, which stores the last two axes in tiles of 8 x 128 words.

    The compiler orders the axes of an argument so that the least is wasted.
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
    """Bytes of a device's part of a tree of abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += padded_bytes(shape, leaf.dtype.itemsize) if tiled else math.prod(shape) * leaf.dtype.itemsize
    return total


class Shape(NamedTuple):
    """Sizes that one device sees, in one microbatch."""

    sequences: float
    tokens: float
    tensor: int
    cut: int  # parts that the blocks' weights are cut into
    width: int  # bytes of an activation's element


def _shape(cfg: Config, axes: dict[str, int]) -> Shape:
    sequences = cfg.train.batch_sequences / cfg.train.microbatches / (axes["data"] * axes["fsdp"])
    tokens = sequences * cfg.model.context_length / axes["context"]
    width = BF16 if cfg.model.dtype == "bfloat16" else F32
    return Shape(sequences, tokens, axes["tensor"], axes["fsdp"] * axes["tensor"], width)


@lru_cache(maxsize=32)
def model_flops_per_token(cfg: ModelConfig) -> float:
    """`flops_per_token`, kept."""
    return flops_per_token(cfg)


@lru_cache(maxsize=32)
def weight_counts(cfg: ModelConfig) -> dict[str, int]:
    """`count_params`, which builds the model's shapes anew each time."""
    return count_params(cfg)


def held_bytes(cfg: Config, axes: dict[str, int], tiled: bool) -> dict[str, int]:
    """Bytes of a device's params, of the blocks' part of them, and of the rest of the state.

    Raises:
        UserError: a dimension that the mesh cannot cut.
    """
    state = abstract_trainable(cfg, axes).state
    return {
        "params": shard_bytes(state.params, tiled),
        "blocks": shard_bytes(state.params["blocks"], tiled),
        "optimizer": shard_bytes((state.step, state.total_steps, state.opt_state, state.ema), tiled),
    }


FUSED = ("splash", "cudnn", "ring")  # of `nn.backends.ATTENTIONS`


def estimate(
    cfg: Config, topology: Topology, fused_attention: bool | None = None, held: dict[str, int] | None = None
) -> Costs:
    """The costs of a step.

    Args:
        fused_attention: scores never reach HBM, and their masked half is not computed (flash or splash attention);
            None: as the config has it on these chips.
        held: `held_bytes` of the same model, optimizer and mesh, where they are at hand.

    Raises:
        UserError: the mesh does not fit the chips, or cannot cut the model.
    """
    axes = resolve_mesh(cfg, topology)
    if fused_attention is None:
        auto = BACKENDS[topology.chip.kind]["attention"]
        fused_attention = (auto if cfg.run.attention == "auto" else cfg.run.attention) in FUSED
    held = held or held_bytes(cfg, axes, topology.chip.kind == "tpu")
    tokens = cfg.train.batch_sequences * cfg.model.context_length
    collectives, dcn = _communication(cfg, axes, topology)
    return Costs(
        memory=_memory(cfg, held, axes, fused_attention),
        model_flops=tokens * model_flops_per_token(cfg.model),
        executed_flops=tokens * executed_flops_per_token(cfg, fused_attention) / topology.n_chips,
        hbm_bytes=_hbm_bytes(cfg, axes, fused_attention),
        collectives=collectives,
        dcn_bytes=dcn,
    )


def executed_flops_per_token(cfg: Config, fused_attention: bool) -> float:
    """FLOPs of forward, backward and what remat computes again, with the vocabulary's padding.

    Attention: two matmuls forward and four backward, over the whole square. A fused kernel computes the scores again
    in its backward (five matmuls) and leaves the masked half out.
    """
    m, blocks = cfg.model, weight_counts(cfg.model)["blocks"]
    square = 2 * m.n_layers * m.n_heads * m.d_head * m.context_length  # one matmul of the scores' size
    share = 0.5 if fused_attention else 1.0
    again = {"none": (0, 0), "dots": (0, 2)}.get(cfg.run.remat, (2 * blocks, 2))  # named, offload: less
    matmuls = 2 + (5 if fused_attention else 4) + again[1]
    return 6 * (blocks + m.d_model * m.padded_vocab) + again[0] + matmuls * share * square


def _memory(cfg: Config, held: dict[str, int], axes: dict[str, int], fused: bool) -> dict[str, float]:
    m, s = cfg.model, _shape(cfg, axes)
    cut_batch = axes["data"] * axes["fsdp"] * axes["context"]
    batch = 3 * F32 * cfg.train.batch_sequences * m.context_length / cut_batch
    params, blocks = held["params"], held["blocks"]
    rest = params - blocks
    layer_full = blocks / m.n_layers * axes["fsdp"]  # one layer's weights, gathered, float32
    V, D, F = m.padded_vocab / s.tensor, m.d_model, m.mlp_width / s.tensor
    H, G = m.n_heads / s.tensor, m.kv_heads / s.tensor
    scores = 0 if fused else s.sequences * H * (m.context_length / axes["context"]) * m.context_length

    stream = s.tokens * D * s.width
    kept = stream  # what a layer keeps for the backward pass
    qkv, hidden = s.tokens * (H + 2 * G) * m.d_head * s.width, s.tokens * F * s.width
    n_hidden = 3 if m.mlp.kind == "swiglu" else 2
    streams = (8 if m.conv_width else 6) * stream  # norms, what convolutions make of them, sums
    if cfg.run.remat == "dots":
        kept += qkv + hidden * (n_hidden - 1) + 2 * stream
    elif cfg.run.remat == "named":
        parts = {"block_input": 0, "qkv": qkv, "attention": s.tokens * H * m.d_head * s.width, "mlp": hidden}
        kept += sum(parts[name] for name in cfg.run.remat_names)
    elif cfg.run.remat == "none":
        kept += 2 * qkv + hidden * (n_hidden + 1) + streams + scores * (F32 + BF16 + 1)
    # In the backward pass of one layer: scores and their gradient, and the activations that were computed again.
    layer = scores * (2 * F32 + BF16) + 2 * qkv + (n_hidden + 1) * hidden + streams + 2 * layer_full / F32 * s.width
    chunk = s.tokens / cfg.train.loss_chunks * V
    # The head's gradient and its gathered copy; where it is tied, the copy that the tokens were looked up in besides.
    copies = 2 if m.tie_embeddings else 1
    loss = chunk * (2 * F32) + D * V * (F32 + copies * s.width) + copies / 2 * rest + 2 * stream
    casts = blocks / F32 * s.width if s.width == BF16 else 0  # all weights are cast before the loop over layers
    return {
        "params": params,
        "optimizer": held["optimizer"],
        "batch": batch,
        "gradients": params * (2 if cfg.train.microbatches > 1 else 1),
        "temporaries": m.n_layers * kept + casts + max(layer, loss),
        "code": 40e6,
    }


def _hbm_bytes(cfg: Config, axes: dict[str, int], fused: bool) -> float:
    """Each pass over a layer reads and writes its activations and gathered weights; the optimizer all its state."""
    m, s = cfg.model, _shape(cfg, axes)
    H, G, F = m.n_heads / s.tensor, m.kv_heads / s.tensor, m.mlp_width / s.tensor
    counts = weight_counts(m)
    passes = 3 + {"none": 0, "dots": 0.5}.get(cfg.run.remat, 1)
    arrays = 8 * m.d_model + 2 * (2 * H + 2 * G) * m.d_head + (6 if m.mlp.kind == "swiglu" else 4) * F
    scores = 0 if fused else 3 * F32 * s.sequences * H * m.context_length**2 / axes["context"]
    weights = 3 * s.width * counts["blocks"] / m.n_layers / s.tensor
    layer = s.tokens * arrays * s.width + scores + weights
    logits = 6 * F32 * s.tokens * m.padded_vocab / s.tensor
    state = 10 * F32 * counts["total"] / s.cut
    return cfg.train.microbatches * (passes * m.n_layers * layer + logits) + state


def _communication(cfg: Config, axes: dict[str, int], topology: Topology) -> tuple[dict[str, float], float]:
    """Wire bytes by purpose, and those between slices, from one device in a step."""
    m, s, M = cfg.model, _shape(cfg, axes), cfg.train.microbatches
    counts = weight_counts(m)
    blocks = counts["blocks"] * s.width / s.tensor
    vocab = m.padded_vocab * m.d_model * s.width / s.tensor
    fsdp, tensor = _ring(axes["fsdp"]), _ring(axes["tensor"])
    n_tables = 1 if m.tie_embeddings else 2
    stream = s.tokens * m.d_model * s.width
    # The block's two sums forward and two backward; full remat needs the first of them again.
    sums = m.n_layers * (5 if cfg.run.remat == "full" else 4) + 2
    head_grad = vocab / s.width * F32 * cfg.train.loss_chunks
    batch_parts = axes["data"] * axes["fsdp"]
    made = {
        "weights gathered": M * fsdp * (2 * blocks + n_tables * vocab),
        "gradients scattered": M * fsdp * blocks,
        "embedding's gradient": M * 2 * _ring(batch_parts) * vocab,
        "head's gradient": M * (fsdp + 2 * _ring(axes["data"]) / axes["fsdp"]) * head_grad,
        "gradients over data": M * 2 * _ring(axes["data"]) * blocks / axes["fsdp"],
        "activations over tensor": M * 2 * tensor * sums * stream,
        "keys and values over context": M * 4 * _ring(axes["context"]) * m.n_layers
        * s.sequences * m.context_length * 2 * m.kv_heads / s.tensor * m.d_head * s.width,
    }  # fmt: skip
    made = {name: size for name, size in made.items() if size > 0}
    crossing = 0.0
    if topology.num_slices > 1:
        crossing = 2 * _ring(topology.num_slices) * (blocks + n_tables * vocab) / axes["fsdp"] * M
    elif topology.chip.kind == "gpu" and topology.n_chips > topology.chips_per_island:
        # Rings that leave a host: what a host's GPUs cannot give each other.
        share = 1 - (topology.chips_per_island - 1) / (topology.n_chips - 1)
        crossing = share * sum(size for name, size in made.items() if "tensor" not in name)
    return made, crossing


def _ring(n: int) -> float:
    """The share of an array that leaves a device when n devices gather or scatter it."""
    return (n - 1) / n
