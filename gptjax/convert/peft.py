"""Adapters as PEFT's files (adapter_config.json, adapter_model.safetensors), in both directions.

PEFT adapts the modules of `transformers`: one adapter for each tensor. Where a tensor holds several of our weights
(GPT-2's queries, keys and values), their adapters of rank r become one of rank n r, with B in blocks.

Source: `peft` 0.21: tuners/lora/config.py, tuners/lora/layer.py, utils/save_and_load.py.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax.config import LoraConfig
from gptjax.convert.base import SavedAdapter
from gptjax.convert.configs import read_json
from gptjax.convert.families import FAMILIES
from gptjax.convert.forms import exported_form, family_for
from gptjax.convert.models import Model
from gptjax.convert.safetensors import NAME, SafetensorsFolder, read_facts, write_safetensors
from gptjax.convert.weights import Layout, multipliers
from gptjax.errors import UserError
from gptjax.nn.adapters import ADAPTER, abstract_adapter
from gptjax.nn.transformer import Params, abstract_model, leaf_at
from gptjax.optim import first_match

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "gptjax_base"  # in the header of the weights: the fingerprint of the base
PREFIX = "base_model.model."
WeightPath = tuple[str, ...]


class Module(NamedTuple):
    """A module of `transformers` whose weight can have an adapter.

    Attributes:
        name: of the module, with `{}` for the layer, such as `model.layers.{}.self_attn.q_proj`.
        paths: our weights that it holds, in the order of its parts.
    """

    name: str
    paths: list[WeightPath]

    @property
    def suffix(self) -> str:
        """The name within a layer, which `target_modules` lists."""
        return self.name.partition("{}.")[2]


def modules_of(layout: Layout) -> list[Module]:
    """Return the modules that hold matrices of the blocks."""
    metadata = abstract_model(layout.cfg)[2]
    found: dict[str, list[WeightPath]] = {}
    for path, weight in metadata.items():
        if weight["role"] == "matrix":
            found.setdefault(layout.place(path).name.removesuffix(".weight"), []).append(path)
    return [
        Module(name, sorted(paths, key=lambda path: layout.place(path).part or 0)) for name, paths in found.items()
    ]


def write_adapter(model: Model, adapter: SavedAdapter, folder: Path) -> str:
    """Write a run's adapters as PEFT's files, in float32; return the base that they name.

    Raises:
        UserError: no family has the model's form; there are adapters of experts.
    """
    kind = family_for(model.config)
    layout = Layout(FAMILIES[kind], exported_form(model.config, kind))
    lora, adapters = adapter.lora, _read_here(model, adapter)
    factors = multipliers(model.config)
    tensors: dict[str, np.ndarray] = {}
    targets, ranks = [], {}
    for module in modules_of(layout):
        pairs = {path: flatten_dict(adapters).get((*path, "a")) for path in module.paths}
        chosen = [path for path in module.paths if pairs[path] is not None]
        if not chosen:
            continue
        if any("expert" in (*layout.stacks[path], *layout.axes[path]) for path in chosen):
            raise UserError(
                f"{str(model.path)!r} has adapters of experts, which PEFT's files cannot hold here; write the merged "
                f"model: gptjax convert to-hf {model.path} --merged true --out DIR"
            )
        targets.append(module.suffix)
        if len(chosen) > 1:
            ranks[module.suffix] = len(chosen) * lora.rank
        for layer in range(model.config.n_layers):
            scaled = [
                (
                    pairs[path][layer],
                    leaf_at(adapters, (*path, "b"))[layer] * first_match(factors, "/".join(path), 1.0),
                )
                for path in chosen
            ]
            a, b = _joined(layout, module, chosen, scaled)
            name = PREFIX + module.name.format(layer)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    facts = {BASE: adapter.base["fingerprint"]}
    write_safetensors(folder, shapes, np.dtype(np.float32), tensors.__getitem__, max_shard_bytes=2**63, facts=facts)
    (folder / NAME).rename(folder / WEIGHTS)
    base = adapter.base["path"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": layout.place(("blocks", "mlp", "up")).dims == "D,F",
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": {name: rank * lora.scale for name, rank in ranks.items()},
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return base


def _read_here(model: Model, adapter: SavedAdapter) -> Params:
    """Return a run's adapters as arrays of NumPy."""
    _, params, metadata = abstract_model(model.config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract_adapter(adapter.lora, params, metadata)[0],
    )
    return jax.tree.map(np.asarray, adapter.read(shapes)[ADAPTER])


def _joined(
    layout: Layout, module: Module, chosen: list[WeightPath], pairs: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return lora_A [n r, inputs] and lora_B [outputs, n r] of a module's n adapters in one layer."""
    rank = pairs[0][0].shape[-1]
    a = np.concatenate([a.reshape(-1, rank).T for a, _ in pairs])
    widths = [_outputs(layout, path) for path in module.paths]
    b = np.zeros((sum(widths), len(pairs) * rank), np.float32)
    for number, (path, (_, part)) in enumerate(zip(chosen, pairs, strict=True)):
        start = sum(widths[: module.paths.index(path)])
        rows = part.reshape(rank, -1).T
        b[start : start + len(rows), number * rank : (number + 1) * rank] = rows
    return np.ascontiguousarray(a), b


def _shape(layout: Layout, path: WeightPath) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the input dimensions and the output dimensions of a weight in one layer."""
    _, params, metadata = abstract_model(layout.cfg)
    shape = leaf_at(params, path).shape[1:]
    n_in = metadata[path]["n_in"]
    return shape[:n_in], shape[n_in:]


def _outputs(layout: Layout, path: WeightPath) -> int:
    return math.prod(_shape(layout, path)[1])


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json's values.

    Raises:
        UserError: no such file, or an adapter of a kind that cannot be read.
    """
    values = read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG} has peft_type {values.get('peft_type')!r}; only LORA can be read")
    for key in ("use_dora", "modules_to_save", "layers_to_transform", "trainable_token_indices", "target_parameters"):
        if values.get(key):
            raise UserError(f"{folder / CONFIG} has {key} {values[key]!r}, which cannot be read; merge it in PEFT")
    if values.get("bias", "none") != "none":
        raise UserError(
            f"{folder / CONFIG} has bias {values['bias']!r}, and only 'none' can be read; merge it in PEFT"
        )
    return values


def check_base_of(folder: Path, facts: Mapping[str, str]) -> None:
    """Raise UserError where a PEFT folder that was exported here belongs to another base (`Base.facts`).

    PEFT itself records the base's name alone; then any base of the same shapes passes.
    """
    wanted = read_facts(folder / WEIGHTS).get(BASE, facts["fingerprint"])
    if wanted != facts["fingerprint"]:
        raise UserError(
            f"{str(folder)!r} is an adapter for a base with fingerprint {wanted[:12]}, and {facts['path']!r} has "
            f"{facts['fingerprint'][:12]}; give its own with --base"
        )


def read_adapter(folder: Path, values: Mapping[str, Any], layout: Layout) -> tuple[LoraConfig, Params]:
    """Return the config and the adapters of a PEFT folder, for a base of this layout.

    Adapters of unequal rank are padded with zeros to the largest, and their factors folded into B.

    Raises:
        UserError: tensors that the base has no place for, or of another shape.
    """
    source = SafetensorsFolder(folder, WEIGHTS)
    left = set(source.shapes)
    n_layers, pairs = layout.cfg.n_layers, {}
    for module in modules_of(layout):
        for layer in range(n_layers):
            names = [f"{PREFIX}{module.name.format(layer)}.lora_{letter}.weight" for letter in "AB"]
            if left.issuperset(names):
                left -= set(names)
                a, b = (np.asarray(source.read(name), np.float32) for name in names)
                pairs[module.suffix, layer] = (a, b * _scale(values, module.suffix, len(a)))
    if left or not pairs:
        example = f"; its {min(left)} has no place there" if left else ""
        raise UserError(
            f"{str(folder)!r} is an adapter for another base than the {layout.family.title} given{example}; give its "
            "own with --base"
        )
    rank = max(len(a) for a, _ in pairs.values())
    found: dict[WeightPath, np.ndarray] = {}
    for module in modules_of(layout):
        if any((module.suffix, layer) in pairs for layer in range(n_layers)):
            found |= _split(
                layout, module, [pairs.get((module.suffix, layer)) for layer in range(n_layers)], rank, folder
            )
    targets = tuple(sorted({f"^{'/'.join(path[:-1])}$" for path in found}))
    return LoraConfig(rank=rank, alpha=float(rank), targets=targets), {ADAPTER: unflatten_dict(found)}


def _scale(values: Mapping[str, Any], suffix: str, rank: int) -> float:
    patterns = values.get("alpha_pattern") or {}
    alpha = next((alpha for name, alpha in patterns.items() if suffix.endswith(name)), values.get("lora_alpha", 8))
    return alpha / (rank**0.5 if values.get("use_rslora") else rank)


def _split(
    layout: Layout, module: Module, layers: list[Any], rank: int, folder: Path
) -> dict[WeightPath, np.ndarray]:
    """Return A and B, of all layers, of each of our weights in a module; a layer without an adapter has zeros."""
    found, start = {}, 0
    whole = sum(_outputs(layout, path) for path in module.paths)
    for path in module.paths:
        inputs, outputs = _shape(layout, path)
        a = np.zeros((len(layers), math.prod(inputs), rank), np.float32)
        b = np.zeros((len(layers), rank, math.prod(outputs)), np.float32)
        for layer, pair in enumerate(layers):
            if pair is None:
                continue
            if pair[0].shape[1] != math.prod(inputs) or len(pair[1]) != whole:
                raise UserError(
                    f"{str(folder)!r} is an adapter for another base: its {module.suffix} maps {pair[0].shape[1]} to "
                    f"{len(pair[1])}, and the base's {math.prod(inputs)} to {whole}; give its own with --base"
                )
            a[layer, :, : len(pair[0])] = pair[0].T
            b[layer, : len(pair[0])] = pair[1][start : start + b.shape[-1]].T
        found[*path, "a"] = a.reshape(len(layers), *inputs, rank)
        found[*path, "b"] = b.reshape(len(layers), rank, *outputs)
        start += math.prod(outputs)
    return found
