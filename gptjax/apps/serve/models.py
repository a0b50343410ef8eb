"""Open the models of a server. Those that differ by adapters alone share their base's weights, and one batch."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.apps.serve.scheduler import KEPT_CONTEXTS
from gptjax.config import ModelConfig, override, plain_values
from gptjax.convert import initial_model, load, open_model
from gptjax.convert.base import check_base, describe_base, find_base, hold_all
from gptjax.convert.models import Model, on_first_device
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.nn.adapters import abstract_adapter
from gptjax.nn.transformer import Params, abstract_model
from gptjax.shell import display
from gptjax.tokenizers import same_ids

# What may differ among models that share weights: it changes nothing in decoding, or is set by --dtype.
FREE = ("preset", "init", "dropout", "vocab_multiple")


@dataclass(frozen=True)
class Member:
    """A model of a group, by its name.

    Attributes:
        lm: with its own tokenizer and config; the engine is the group's.
        adapter: its number in the engine; 0 for the weights as they are.
    """

    name: str
    lm: LanguageModel
    adapter: int = 0


@dataclass(frozen=True)
class Group:
    """Models that share weights and a batch.

    Attributes:
        lm: the model whose engine all use.
        members: at least one.
    """

    lm: LanguageModel
    members: list[Member]

    @property
    def name(self) -> str:
        """The name of the first member, by which metrics call the batch."""
        return self.members[0].name

    def context(self, most: int) -> int:
        """Return the most tokens of a prompt and its answer, of which the server takes `most` of any model."""
        return min(most, max(member.lm.config.context_length for member in self.members))


def name_models(paths: Sequence[str], names: str | None) -> list[str]:
    """Return a name for each model: those given, separated by commas, or the last parts of the paths.

    Raises:
        UserError: another number of names than models, an empty name, or one name twice.
    """
    found = [Path(path).resolve().name.removesuffix(".gguf") or "model" for path in paths]
    if names is not None:
        found = [name.strip() for name in names.split(",")]
        if len(found) != len(paths) or not all(found):
            raise UserError(f"--name {names!r} must hold one name for each of {len(paths)} models, between commas")
    if twice := [name for number, name in enumerate(found) if name in found[:number]]:
        raise UserError(f"two models have the name {twice[0]!r}; tell them apart, such as --name first,second")
    return found


def open_groups(
    paths: Sequence[str], names: Sequence[str], dtype: str | None, axes: Mapping[str, int] | None
) -> list[Group]:
    """Return the models of paths or ids, in groups that share weights.

    Runs with adapters of one base, and the base itself where it is among them, form a group. On a mesh, with experts,
    or where only one of a base's models is asked for, each model has weights of its own, with its adapter merged.

    Args:
        dtype, axes: as `convert.load` takes them.
    """
    if len(paths) == 1:
        return [_alone(names[0], paths[0], dtype, axes)]
    opened = [open_model(path) for path in paths]
    shared = [] if axes is not None else _shared(opened, paths, dtype)
    groups = [_read_group([(names[i], opened[i], paths[i]) for i in group], dtype) for group in shared]
    apart = set(range(len(paths))) - {i for group in shared for i in group}
    return [*groups, *(_alone(names[i], paths[i], dtype, axes) for i in sorted(apart))]


def _alone(name: str, path: str, dtype: str | None, axes: Mapping[str, int] | None) -> Group:
    lm = load(path, dtype, axes)
    return Group(lm, [Member(name, lm)])


def _shared(opened: Sequence[Model], paths: Sequence[str], dtype: str | None) -> list[list[int]]:
    """Return which models share weights: numbers of two or more, of which one may be the base of the others."""
    found: dict[Any, list[int]] = {}
    for number, model in enumerate(opened):
        if model.adapter is not None and model.config.mlp.kind != "moe":
            lora = model.adapter.lora
            if lora.base_dtype in ("float32", dtype or lora.base_dtype):
                ends = tuple(model.tokenizer.eos_ids)
                key = (model.adapter.base["fingerprint"], lora.base_dtype, ends, repr(_form(model.config, dtype)))
                found.setdefault(key, []).append(number)
    for numbers in found.values():
        adapted = opened[numbers[0]]
        for number, model in enumerate(opened):
            if model.adapter is None and _is_base(model, paths[number], adapted, dtype):
                numbers.insert(0, number)
                break
    return [numbers for numbers in found.values() if len(numbers) > 1]


def _is_base(model: Model, path: str, adapted: Model, dtype: str | None) -> bool:
    """Return whether a model is the base of one with adapters and can be computed beside it."""
    assert adapted.adapter is not None
    place = find_base(adapted.adapter.base, str(adapted.path))
    same = place == path or (os.path.exists(path) and os.path.realpath(path) == os.path.realpath(place))
    return (
        same
        and adapted.adapter.lora.base_dtype in ("float32", dtype)
        and _form(model.config, dtype) == _form(adapted.config, dtype)
        and model.tokenizer.eos_ids == adapted.tokenizer.eos_ids
        and same_ids(model.tokenizer, adapted.tokenizer)
    )


def _form(cfg: ModelConfig, dtype: str | None) -> dict[str, Any]:
    """Return what two configs must have in common to be computed by one program."""
    left_out = {*FREE, "context_length"} if cfg.positions.kind != "learned" else {*FREE}
    left_out |= {"dtype"} if dtype in ("float32", "bfloat16") else set()
    bias = cfg.bias if cfg.attention.qkv_bias is None else cfg.attention.qkv_bias
    derived = {"n_kv_heads": cfg.kv_heads, "head_dim": cfg.d_head, "mlp.width": cfg.mlp_width}
    values = plain_values(cfg) | derived | {"attention.qkv_bias": bias}
    return {name: value for name, value in values.items() if name not in left_out}


def _read_group(models: Sequence[tuple[str, Model, str]], dtype: str | None) -> Group:
    """Read the base of adapters once, and the adapters."""
    adapted = [(model, model.adapter) for _, model, _ in models if model.adapter is not None]
    first, saved = adapted[0]
    config = first.config
    if config.positions.kind != "learned":
        config = replace(config, context_length=max(model.config.context_length for _, model, _ in models))
    config = config if dtype in (None, "int8") else override(config, {"dtype": dtype})
    place = find_base(saved.base, str(first.path))
    params = initial_model(place, config, first.tokenizer).read(on_first_device(config))
    facts = describe_base(place, params)
    adapters = []
    for model, adapter in adapted:
        check_base(adapter.base, facts, str(model.path))
        adapters.append((adapter.lora, _read_adapter(model, config)))
    params = hold_all(params, abstract_model(config)[2], dtype or saved.lora.base_dtype)
    lm = LanguageModel(config, params, first.tokenizer, delete=True)
    lm.engine.adapt(adapters)
    members, number = [], 0
    for name, model, _ in models:
        number += model.adapter is not None
        members.append(Member(name, _view(lm, model), number if model.adapter is not None else 0))
    return Group(lm, members)


def _read_adapter(model: Model, config: ModelConfig) -> Params:
    """Return the adapters of a run.

    Raises:
        UserError: a value that is not finite, which the rows of other models would be multiplied with.
    """
    assert model.adapter is not None
    _, params, metadata = abstract_model(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract_adapter(model.adapter.lora, params, metadata)[0],
    )
    values = model.adapter.read(shapes)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values)):
        raise UserError(f"the adapters of {str(model.path)!r} hold infinite values; take an earlier checkpoint")
    return values


def _view(lm: LanguageModel, model: Model) -> LanguageModel:
    """Return the group's model with the tokenizer and the context of one member."""
    view = copy.copy(lm)
    view.tokenizer = model.tokenizer
    view.config = replace(lm.config, context_length=model.config.context_length)
    return view


def check_context(groups: Sequence[Group], context: int) -> None:
    """Raise UserError where a number of tokens is not in the range of every model's context."""
    for member in (member for group in groups for member in group.members):
        T = member.lm.config.context_length
        if not 2 <= context <= T:
            raise UserError(f"--context {context} must lie in [2, {T}], the context of {member.name}")


def describe_group(group: Group, slots: int, most_context: int) -> str:
    """Return in one line which models a group has, and the memory of its parts.

    Args:
        slots: of its batch.
        most_context: the most tokens of a prompt and its answer.
    """
    engine, context = group.lm.engine, group.context(most_context)
    pairs = [] if engine.stack is None else engine.stack.pairs
    parts = [f"weights {display.size(_bytes(engine.params))}"]
    if pairs:
        parts.append(f"adapters {display.size(_bytes(pairs))}")
    for name, rows in ((f"{slots} slots of {context} tokens", slots), ("beginnings of prompts up to", KEPT_CONTEXTS)):
        cache = jax.eval_shape(lambda rows=rows: engine.empty_cache(rows, context))
        parts.append(f"{name} {display.size(_bytes(cache))}")
    return f"{', '.join(member.name for member in group.members)}: {', '.join(parts)}"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
