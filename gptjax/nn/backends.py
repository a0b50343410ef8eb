"""The kernels of attention, and which of them, and which loop over layers, is best on which devices."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from gptjax.config import ModelConfig, RunConfig
from gptjax.errors import UserError, choose
from gptjax.nn.attention import Kernel, cached_attention, reference_attention
from gptjax.nn.blocked import blocked_attention
from gptjax.nn.convolution import causal_convolution
from gptjax.nn.kernels import dot_product_attention, splash_attention
from gptjax.nn.ring import ring_attention, ring_convolution
from gptjax.sharding import check_divides

# run.attention -> kernel; "cached" is what decoding uses, whatever the config says.
ATTENTIONS: dict[str, Kernel] = {
    "auto": reference_attention,  # until `for_mesh` or `for_platform` chooses
    "reference": reference_attention,
    "blocked": blocked_attention,
    "xla": partial(dot_product_attention, "xla"),
    "cudnn": partial(dot_product_attention, "cudnn"),
    "splash": splash_attention,
    "ring": ring_attention,
    "cached": cached_attention,
}


def make_convolution(attention: str, positions: jax.Array) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    """Return (x [B, T, D], taps [W, D], recent) -> as `causal_convolution`, for rows in the attention's order."""
    return partial(ring_convolution if attention == "ring" else causal_convolution, positions)


# What of `model.attention` a kernel does not compute.
ATTENTION_LACKS = {"xla": ("softcap", "sinks"), "cudnn": ("softcap", "sinks"), "ring": ("sinks",)}
ATTENTION_NEEDS = {"cudnn": "gpu", "splash": "tpu"}  # the others run on any platform

# What `auto` and null mean, by the platform of a mesh's devices.
BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": {"attention": "blocked", "scan_layers": False},
    "tpu": {"attention": "splash", "scan_layers": True},
    "gpu": {"attention": "cudnn", "scan_layers": True},
}


def for_platform(run: RunConfig, cfg: ModelConfig, platform: str) -> RunConfig:
    """Return the run's config with what `auto` and null leave open chosen for devices of a platform (BACKENDS)."""
    chosen, attention = BACKENDS[platform], run.attention
    if attention == "auto":
        attention = chosen["attention"]
        if attention == "cudnn" and (cfg.dtype == "float32" or cfg.d_head % 8 or cfg.d_head > 128):
            attention = "xla"  # the fused kernel does not compute these
        if missing_features(attention, cfg):
            attention = "blocked"
    scan_layers = chosen["scan_layers"] if run.scan_layers is None else run.scan_layers
    return replace(run, attention=attention, scan_layers=scan_layers)


def missing_features(attention: str, cfg: ModelConfig) -> list[str]:
    """Return the keys of `model.attention` that the model uses and the kernel does not compute."""
    return [name for name in ATTENTION_LACKS.get(attention, ()) if getattr(cfg.attention, name)]


def for_mesh(run: RunConfig, cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> RunConfig:
    """Return the run's config with what `auto` and null leave open chosen for a mesh's devices.

    An abstract mesh has no devices: what needs one kind is allowed there, and `auto` is as on those that are here.

    Raises:
        UserError: attention that the devices do not have, or that cannot cut the sequence as the mesh does.
    """
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    parts = mesh.shape["context"]
    if run.attention == "auto" and parts > 1:
        run = replace(run, attention="ring")
    run = for_platform(run, cfg, platform)
    attention = run.attention
    choose(ATTENTIONS, attention, "run.attention")
    if isinstance(mesh, Mesh) and ATTENTION_NEEDS.get(attention, platform) != platform:
        raise UserError(
            f"run.attention {attention} runs on a {ATTENTION_NEEDS[attention].upper()} and the devices are "
            f"{platform.upper()}s; make it auto"
        )
    if attention in ATTENTION_NEEDS and parts > 1:
        raise UserError(f"run.attention {attention} does not cut sequences; make it ring, or mesh.context 1")
    if missing := missing_features(attention, cfg):
        remedy = "mesh.context 1" if parts > 1 else "run.attention auto"
        raise UserError(f"run.attention {attention} does not compute model.attention.{missing[0]}; set {remedy}")
    if attention == "ring":
        _check_ring(cfg, parts)
    return run


def _check_ring(cfg: ModelConfig, parts: int) -> None:
    """Raise UserError where a ring of so many devices cannot cut the model's sequences."""
    if cfg.context_length % (2 * parts):
        raise UserError(
            f"model.context_length {cfg.context_length} cannot be cut into two chunks for each of mesh.context "
            f"{parts} devices; make it a multiple of {2 * parts}"
        )
    chunk = cfg.context_length // (2 * parts)
    if cfg.conv_width is not None and cfg.conv_width - 1 > chunk:
        raise UserError(
            f"model.conv_width {cfg.conv_width} reaches beyond one of the ring's chunks of {chunk} tokens; make it "
            f"at most {chunk + 1}, or model.context_length at least {2 * parts * (cfg.conv_width - 1)}"
        )


def check_model_divides(cfg: ModelConfig, mesh: Mesh) -> None:
    """Raise UserError where the mesh cannot cut the model's dimensions into equal parts."""
    moe = cfg.mlp.kind == "moe"
    if not moe and mesh.shape.get("expert", 1) > 1:
        raise UserError(
            f"mesh.expert {mesh.shape['expert']} needs model.mlp.kind moe, and it is {cfg.mlp.kind}; set "
            "mesh.expert 1, and raise mesh.data or mesh.fsdp in its place"
        )
    mlp = [("model.mlp.width", cfg.mlp_width, "mlp")] if not moe or cfg.n_dense_layers else []
    if moe:
        width = "model.mlp.width" if cfg.mlp.moe.width is None else "model.mlp.moe.width"
        mlp += [("model.mlp.moe.experts", cfg.mlp.moe.experts, "expert"), (width, cfg.expert_width, "mlp")]
    stages = mesh.shape.get("pipeline", 1)
    if stages > 1 and cfg.n_dense_layers:
        raise UserError(
            f"mesh.pipeline {stages} needs layers of one form, and the first {cfg.n_dense_layers} have no experts; "
            "set mesh.pipeline 1, or model.mlp.moe.first_dense_layers 0"
        )
    per_stage = max(cfg.n_layers // stages, 1)
    if any(local != cfg.local_layers[i % per_stage] for i, local in enumerate(cfg.local_layers)):
        raise UserError(
            f"mesh.pipeline {stages} needs stages of one pattern, and {per_stage} layers do not repeat the "
            f"{len(cfg.attention.pattern)} of model.attention.pattern; make model.n_layers / mesh.pipeline "
            "a multiple of it"
        )
    for key, size, axis in (
        ("model.n_layers", cfg.n_layers, "layers"),
        ("model.n_heads", cfg.n_heads, "heads"),
        ("model.n_kv_heads", cfg.kv_heads, "kv_heads"),
        *mlp,
        ("model.d_model", cfg.d_model, "embed"),
        ("model.vocab_multiple", cfg.padded_vocab, "vocab"),
    ):
        check_divides(mesh, key, size, axis)


def scans_layers(run: RunConfig) -> bool:
    """Return whether one block is compiled and looped over; null means everywhere but on a CPU."""
    return jax.default_backend() != "cpu" if run.scan_layers is None else run.scan_layers
