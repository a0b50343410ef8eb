"""The model that a run's adapters belong to: how a checkpoint names it, how it is found, read and recognised."""

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from gptjax.config import LoraConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.nn.adapters import abstract_adapter, merge_adapter
from gptjax.nn.transformer import Params, abstract_model
from gptjax.nn.weights import Int8, hold
from gptjax.optim import map_by_path
from gptjax.parametrization import Metadata
from gptjax.sharding import sharding


class Base(NamedTuple):
    """The weights under a run's adapters.

    Attributes:
        params: in the form in which the run holds them.
        facts: what a checkpoint says of them: `path` as the user gave it, `absolute` of a local one, `fingerprint`.
        adapter: abstract adapters -> adapters to start from, of a base that is a run with the same ones; or None.
    """

    params: Params
    facts: dict[str, str]
    adapter: Callable[[Params], Params] | None = None


class SavedAdapter(NamedTuple):
    """The adapters of a run's checkpoint.

    Attributes:
        lora: their config.
        base: the facts of their base (`Base.facts`).
        read: abstract adapters with their shardings -> adapters.
    """

    lora: LoraConfig
    base: dict[str, str]
    read: Callable[[Params], Params]


def fingerprint(params: Params) -> str:
    """Return a hash of float32 weights by their values, 64 hexadecimal digits.

    It does not depend on the mesh, on the kind of file that the weights came from, or on rows of zeros that pad a
    vocabulary.
    """
    found = hashlib.sha256()
    for path, weight in sorted(flatten_dict(params).items()):
        found.update("/".join(path).encode() + np.asarray(_weighted_sums(weight)).tobytes())
    return found.hexdigest()


@jax.jit
def _weighted_sums(weight: jax.Array) -> jax.Array:
    """Sum the bits of all elements, modulo 2^32, with two odd factors for each that depend on its place."""
    bits = jax.lax.bitcast_convert_type(weight.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(weight.shape, jnp.uint32)
    for axis in range(weight.ndim):
        place = (place ^ jax.lax.broadcasted_iota(jnp.uint32, weight.shape, axis)) * jnp.uint32(0x9E3779B1)
        place ^= place >> 15
    factors = [(place * jnp.uint32(odd)) | 1 for odd in (0x85EBCA6B, 0xC2B2AE35)]
    return jnp.stack([(bits * factor).sum(dtype=jnp.uint32) for factor in factors])


def describe_base(path: str, params: Params) -> dict[str, str]:
    """Return `Base.facts` of float32 weights that were read from a path or id."""
    absolute = {"absolute": os.path.abspath(path)} if os.path.exists(path) else {}
    return {"path": path, **absolute, "fingerprint": fingerprint(params)}


def check_base(saved: Mapping[str, str], found: Mapping[str, str], workdir: str) -> None:
    """Raise UserError where adapters were trained on another base than the one that was found."""
    _check_model(saved, found, f"{workdir!r} holds adapters for another base", "init_from")


def check_teacher(saved: Mapping[str, str], found: Mapping[str, str], workdir: str) -> None:
    """Raise UserError where a run learnt from another teacher than the one that was found."""
    _check_model(saved, found, f"{workdir!r} learnt from another teacher", "distill.teacher, or another --workdir")


def _check_model(saved: Mapping[str, str], found: Mapping[str, str], complaint: str, remedy: str) -> None:
    if saved["fingerprint"] != found["fingerprint"]:
        raise UserError(
            f"{complaint}: {saved['path']!r} with fingerprint {saved['fingerprint'][:12]}, and {found['path']!r} has "
            f"{found['fingerprint'][:12]}; give that model as {remedy}"
        )


def find_base(saved: Mapping[str, str], workdir: str) -> str:
    """Return the path or id of the base that a checkpoint names.

    Raises:
        UserError: it was a local path, and nothing is there now.
    """
    places = [saved["path"], saved.get("absolute", saved["path"])]
    for place in places:
        if os.path.exists(place):
            return place
    if "absolute" in saved:
        raise UserError(
            f"{workdir!r} holds adapters for the model {saved['absolute']!r}, which is not there; put it back, or "
            "link it there"
        )
    return saved["path"]


def as_float32(abstract: Params) -> Params:
    """Return abstract weights in float32, on the shardings of those given, of any form."""

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = leaf.values if isinstance(leaf, Int8) else leaf
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)

    return jax.tree.map(whole, abstract, is_leaf=lambda leaf: isinstance(leaf, Int8))


def hold_all(params: Params, metadata: Metadata, dtype: str) -> Params:
    """Return float32 weights in the form of a dtype (`weights.hold`); those that change are deleted, one by one."""

    def change(path: tuple[str, ...], weight: jax.Array) -> Any:
        held = jax.block_until_ready(jax.jit(lambda x: hold(x, metadata[path], dtype))(weight))
        if jax.tree.leaves(held)[0].dtype == weight.dtype:
            return weight
        weight.delete()
        return held

    return params if dtype == "float32" else map_by_path(change, params)


def merged(base: Params, adapter: SavedAdapter, cfg: ModelConfig, check: Callable[[dict[str, str]], None]) -> Params:
    """Return the float32 weights of the model that computes the same as a base with adapters.

    Args:
        base: float32 weights on their shardings; they are deleted.
        cfg: of the model.
        check: raises UserError where the base, by its facts, is not that of the adapters.
    """
    check(describe_base(adapter.base["path"], base))
    _, params, metadata = abstract_model(cfg)
    shapes, declared = abstract_adapter(adapter.lora, params, metadata)
    first = jax.tree.leaves(base)[0].sharding

    def placed(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = declared[path]["axes"]
        where = sharding(first.mesh, axes) if isinstance(first, NamedSharding) else first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    adapters = adapter.read(map_by_path(placed, shapes))

    def merge_all(base: Params, adapters: Params) -> Params:
        held = {
            path: hold(weight, metadata[path], adapter.lora.base_dtype) for path, weight in flatten_dict(base).items()
        }
        return merge_adapter({**unflatten_dict(held), **adapters}, adapter.lora, metadata)

    shardings = jax.tree.map(lambda weight: weight.sharding, base)
    return jax.jit(merge_all, out_shardings=shardings, donate_argnums=0)(base, adapters)
