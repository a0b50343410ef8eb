"""Convert a family's tensors to our weights, directly onto their shardings, and back, one tensor at a time."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax.config import ModelConfig, override
from gptjax.convert.family import Family, Tensor
from gptjax.nn.transformer import Params, abstract_model, leaf_at
from gptjax.optim import first_match
from gptjax.parametrization import MULTIPLIERS, Path, attention_multiplier, factor

# The letter of each logical axis in `Tensor.dims`.
LETTERS = {
    "vocab": "V",
    "embed": "D",
    "heads": "H",
    "kv_heads": "G",
    "head_dim": "K",
    "mlp": "F",
    "position": "T",
    "norm": "N",
    "expert": "E",
    "choice": "E",
}


class TensorSource(Protocol):
    """Tensors on disk, under the names of the family."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the tensors' shapes, by name."""

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Return the dtypes, by name, of tensors that hold no plain floats."""

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors: a mapping from their present names to the new ones."""

    def split(self, name: str, names: Sequence[str]) -> None:
        """Replace a tensor by equal parts of its rows, [R, N]; of a family with `fused` tensors."""

    def read(self, name: str) -> np.ndarray:
        """Return the values, of any float type."""


class TensorLayout(NamedTuple):
    """A tensor's shape, the layer and the expert it belongs to (None: to none), and the paths of its weights."""

    shape: tuple[int, ...]
    layer: int | None
    paths: list[Path]
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """Return where the tensor lies in a weight: its layer and its expert, as far as it has them."""
        return tuple(number for number in (self.layer, self.expert) if number is not None)


class Layout:
    """How the weights of a model are stored in its family's tensors.

    Args:
        cfg: the config of the model on disk, whose vocabulary is not padded.
        absent: prefixes of the paths of weights that are not on disk, and are zeros.

    Attributes:
        family, cfg, absent: as given.
        stacks, axes: a weight's logical axes by path: those that count tensors, and those of each tensor.
        tensors: by name, those of the layers in the order of the layers.
    """

    def __init__(self, family: Family, cfg: ModelConfig, absent: tuple[str, ...] = ()):
        self.family, self.cfg, self.absent = family, cfg, absent
        _, params, metadata = abstract_model(cfg)
        self.sizes = {"V": cfg.vocab_size, "D": cfg.d_model, "H": cfg.n_heads, "G": cfg.kv_heads, "K": cfg.d_head}
        self.sizes |= {"F": cfg.mlp_width, "T": cfg.context_length, "E": cfg.mlp.moe.experts}
        self.sizes["Q"] = cfg.n_heads + 2 * cfg.kv_heads
        # An expert's matrix is a tensor of its own, unless one tensor holds those of all.
        counts = {path: meta["n_stacked"] - self._holds_experts(path, meta) for path, meta in metadata.items()}
        self.stacks = {path: meta["axes"][: counts[path]] for path, meta in metadata.items()}
        self.axes = {path: meta["axes"][counts[path] :] for path, meta in metadata.items()}
        self.widths = {path: leaf_at(params, path).shape[-1] for path in metadata}
        self.tensors = self._tensors(path for path in metadata if not self.is_absent(path))

    def place(self, path: Path) -> Tensor:
        """Return the tensor, and the part of it, that holds a weight."""
        return self.family.tensors[".".join(path)]

    def _holds_experts(self, path: Path, meta: Mapping[str, Any]) -> bool:
        """Return whether one tensor holds the matrices of all experts."""
        return "expert" in meta["axes"][: meta["n_stacked"]] and "E" in self.place(path).dims

    def is_absent(self, path: Path) -> bool:
        """Return whether a weight is a bias that is not on disk."""
        return path[-1].endswith("bias") and ".".join(path).startswith(self.absent)

    def _tensors(self, paths: Iterable[Path]) -> dict[str, TensorLayout]:
        parts: dict[str, list[Path]] = {}
        for path in paths:
            parts.setdefault(self.place(path).name, []).append(path)
        found = {}
        for name, members in parts.items():
            dims = self.place(members[0]).dims.split(",")
            shape = tuple(math.prod(self._size(members[0], letter) for letter in dim) for dim in dims)
            for numbers in self.places(members[0]):
                layer, expert = (*numbers, None, None)[:2]
                found[name.format(*numbers)] = TensorLayout(shape, layer, members, expert)
        return dict(sorted(found.items(), key=lambda item: -1 if item[1].layer is None else item[1].layer))

    def places(self, path: Path) -> Iterator[tuple[int, ...]]:
        """Yield the numbers of the layer and the expert of each tensor that holds a part of a weight."""
        counts = {"layers": self.cfg.n_layers, "expert": self.cfg.mlp.moe.experts}
        return itertools.product(*(range(counts[axis]) for axis in self.stacks[path]))

    def view(self, path: Path, tensor: np.ndarray) -> np.ndarray:
        """Return a tensor's part for a weight, as a view in the order of our axes."""
        dims, part = self.place(path).dims.replace(",", ""), self.place(path).part
        unfolded = tensor.reshape([self._size(path, letter) for letter in dims])
        if part is not None and "P" in dims:
            unfolded = unfolded[(slice(None),) * dims.index("P") + (part,)]
            dims = dims.replace("P", "")
        elif part is not None:
            H, G = self.cfg.n_heads, self.cfg.kv_heads
            heads = (slice(0, H), slice(H, H + G), slice(H + G, None))[part]
            unfolded = unfolded[(slice(None),) * dims.index("Q") + (heads,)]
            dims = dims.replace("Q", "G" if part else "H")
        return unfolded.transpose([dims.index(LETTERS[axis]) for axis in self.axes[path]])

    def _size(self, path: Path, letter: str) -> int:
        if letter == "F" and "expert" in (*self.stacks[path], *self.axes[path]):
            return self.cfg.expert_width
        if letter == "P":
            fused = self.place(path).name
            return sum(tensor.name == fused for tensor in self.family.tensors.values())
        return self.widths[path] if letter == "N" else self.sizes[letter]


def read_params(layout: Layout, source: TensorSource, abstract: Params) -> Params:
    """Return the weights; each device holds only its own shards.

    The shards of this host's devices are filled layer by layer from views of the tensors; beside them, memory holds
    at most one tensor.

    Args:
        abstract: our weights' shapes and shardings. The vocabulary may be padded further (with zeros), and learned
            positions may be fewer, than on disk.
    """
    params: Params = {}
    for path in layout.axes:
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = _read_weight(layout, source, path, leaf_at(abstract, path))
    return params


def _read_weight(layout: Layout, source: TensorSource, path: Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    of_device = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
    }
    buffers = {
        bounds: _aligned_zeros([stop - start for start, stop in bounds], leaf.dtype)
        for bounds in set(of_device.values())
    }
    for place in () if layout.is_absent(path) else layout.places(path):
        wanted = {bounds: buffer for bounds, buffer in buffers.items() if _holds(bounds, place)}
        if not wanted:
            continue  # other hosts' experts
        view = layout.view(path, source.read(layout.place(path).name.format(*place)))
        for bounds, buffer in wanted.items():
            target = buffer[tuple(number - start for number, (start, _) in zip(place, bounds, strict=False))]
            part = view[tuple(slice(start, stop) for start, stop in bounds[len(place) :])]
            target[tuple(slice(0, n) for n in part.shape)] = part
    arrays = [jax.device_put(buffers[bounds], device) for device, bounds in of_device.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _holds(bounds: tuple[tuple[int, int], ...], place: tuple[int, ...]) -> bool:
    """Return whether a shard with these bounds has a part of the tensor of a layer and an expert."""
    return all(start <= number < stop for number, (start, stop) in zip(place, bounds, strict=False))


def _aligned_zeros(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Return zeros at an address that JAX's CPU devices accept without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def multipliers(cfg: ModelConfig) -> dict[str, float]:
    """Return the parametrization's multipliers, by pattern of the paths of the weights that they fold into."""
    queries = r"/query_norm/" if cfg.attention.qk_norm else r"/query(_bias)?$"
    added = r"^blocks/(attention/out|mlp/down)(_bias)?$"
    if cfg.norm.place != "pre":
        added = r"^blocks/(attention|mlp)_post_norm/"
    return {
        r"^final_norm/": factor(cfg, MULTIPLIERS["output"]),
        added: factor(cfg, MULTIPLIERS["residual"]),
        queries: attention_multiplier(cfg),
    }


def without_multipliers(cfg: ModelConfig, params: Params) -> Params:
    """Return the weights of the standard model that computes the same: the parametrization's multipliers are folded
    into them.
    """
    multiplied = multipliers(cfg)
    if not cfg.norm.weights:  # add scales that change nothing, to carry the multipliers
        wanted = flatten_dict(abstract_model(override(cfg, {"norm.weights": True}))[1])
        neutral = 0.0 if cfg.norm.from_one else 1.0
        scales = {path: jnp.full(leaf.shape, neutral) for path, leaf in wanted.items() if path[-1] == "scale"}
        params = unflatten_dict({**scales, **flatten_dict(params)})

    def multiply(keys: Any, leaf: jax.Array) -> jax.Array:
        by = first_match(multiplied, "/".join(key.key for key in keys), 1.0)
        if by != 1 and cfg.norm.from_one and keys[-1].key == "scale":
            return (leaf + 1) * by - 1
        return leaf * by

    return jax.tree.map_with_path(multiply, params)


def write_value(layout: Layout, params: Params, name: str) -> np.ndarray:
    """Return a tensor of the family, float32. Weights that the model lacks are neutral: scales of 1, biases of 0."""
    found = layout.tensors[name]
    neutral = 1.0 if found.paths[0][-1] == "scale" and not layout.cfg.norm.from_one else 0.0
    tensor = np.full(found.shape, neutral, np.float32)
    for path in found.paths:
        try:
            weight = leaf_at(params, path)
        except KeyError:
            continue
        value = np.asarray(weight[found.place])
        target = layout.view(path, tensor)
        target[...] = value[tuple(slice(0, n) for n in target.shape)]  # without the padding of the vocabulary
    return tensor
