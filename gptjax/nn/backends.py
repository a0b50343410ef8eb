"""The ways to compute attention and to go through the layers, and what is best on which devices."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.nn.attention import Attend, make_reference
from gptjax.nn.blocked import make_blocked
from gptjax.nn.convolution import causal_convolution
from gptjax.nn.kernels import make_dot_product, make_splash
from gptjax.nn.ring import make_ring, ring_convolution

# How attention is computed: (positions [B or 1, T], segments [B, T] or None) -> Attend.
ATTENTIONS: dict[str, Callable[..., Attend]] = {
    "auto": make_reference,  # of a model on no mesh, as for generation; on a mesh, `for_mesh` chooses
    "reference": make_reference,
    "blocked": make_blocked,
    "xla": partial(make_dot_product, "xla"),
    "cudnn": partial(make_dot_product, "cudnn"),
    "splash": make_splash,
    "ring": make_ring,
}


def make_convolution(attention: str, positions: jax.Array) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    """(x [B, T, D], taps [W, D], recent) -> as `causal_convolution`, whatever order the attention has its rows in."""
    return partial(ring_convolution if attention == "ring" else causal_convolution, positions)


ATTENTION_NEEDS = {"cudnn": "gpu", "splash": "tpu"}  # the others run on any platform

# What `auto` and null mean, by the platform of a mesh's devices.
BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": {"attention": "blocked", "scan_layers": False},
    "tpu": {"attention": "splash", "scan_layers": True},
    "gpu": {"attention": "cudnn", "scan_layers": True},
}


def for_mesh(cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> ModelConfig:
    """The config with what `auto` and null leave open chosen for a mesh's devices (BACKENDS).

    An abstract mesh has no devices: what needs one kind is allowed there, and `auto` is as on those that are here.

    Raises:
        UserError: attention that the devices do not have, or that cannot cut the sequence as the mesh does.
    """
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    parts = mesh.shape["context"]
    chosen, attention = BACKENDS[platform], cfg.attention
    if attention == "auto":
        attention = "ring" if parts > 1 else chosen["attention"]
        if attention == "cudnn" and (cfg.dtype == "float32" or cfg.d_head % 8 or cfg.d_head > 128):
            attention = "xla"  # the fused kernel does not do these
    if isinstance(mesh, Mesh) and ATTENTION_NEEDS.get(attention, platform) != platform:
        raise UserError(
            f"model.attention {attention} runs on a {ATTENTION_NEEDS[attention].upper()} and the devices are "
            f"{platform.upper()}s; make it auto"
        )
    if attention in ATTENTION_NEEDS and parts > 1:
        raise UserError(f"model.attention {attention} does not cut sequences; make it ring, or mesh.context 1")
    if attention == "ring" and cfg.context_length % (2 * parts):
        raise UserError(
            f"model.context_length {cfg.context_length} cannot be cut into two chunks for each of mesh.context "
            f"{parts} devices; make it a multiple of {2 * parts}"
        )
    chunk = cfg.context_length // (2 * parts)
    if attention == "ring" and cfg.conv_width is not None and cfg.conv_width - 1 > chunk:
        raise UserError(
            f"model.conv_width {cfg.conv_width} reaches beyond one of the ring's chunks of {chunk} tokens; make it "
            f"at most {chunk + 1}, or model.context_length at least {2 * parts * (cfg.conv_width - 1)}"
        )
    scan_layers = chosen["scan_layers"] if cfg.scan_layers is None else cfg.scan_layers
    return replace(cfg, attention=attention, scan_layers=scan_layers)


def scans_layers(cfg: ModelConfig) -> bool:
    """Whether one block is compiled and looped over; where nothing is said, everywhere but on a CPU."""
    return jax.default_backend() != "cpu" if cfg.scan_layers is None else cfg.scan_layers


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The weights with the layers apart, each leaf of `blocks` a tuple of L arrays. It takes them over, leaf by leaf.

    For generation: a loop over tokens would cut the layers out of the stack at every token, a copy of all weights and
    of the cache.
    """

    def take_apart(tree: dict[str, Any]) -> None:
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                take_apart(leaf)
            else:
                tree[name] = tuple(leaf)

    take_apart(params["blocks"])
    return params


def is_apart(leaf: Any) -> bool:
    """Whether a leaf of `blocks` is what `unstack` made of it."""
    return isinstance(leaf, tuple)
