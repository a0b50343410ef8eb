"""Match the tensors of a file with those of its config.json: names without their prefix, a head that is tied to the
embedding or not, and tensors that are missing, unexpected or of another shape.

Source: `transformers` 5.24, modeling_utils.py (`tie_weights`) and core_model_loading.py (`rename_source_key`).
"""

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.convert.family import Family
from gptjax.convert.foreign import foreign_tensors, quantization, wrapping
from gptjax.convert.weights import Layout, TensorSource
from gptjax.errors import UserError

# Heads that do not affect the one for the next token: GPT-2's for multiple choice, and TRL's value heads.
OTHER_HEADS = ("multiple_choice_head.", "v_head.", "value_head.")


def match_tensors(layout: Layout, source: TensorSource, config: Mapping[str, Any]) -> Layout:
    """Give the source's tensors the names of the family, and return the layout with the head that the source has.

    Raises:
        UserError: tensors are missing, unexpected, of another shape, or hold no plain floats.
    """
    if reason := quantization(config, source.shapes, source.unreadable.values()):
        raise UserError(reason)
    _split_fused(layout, source)
    _match_names(layout, source)
    layout = _match_head(layout, source)
    _check_tensors(layout, source)
    return layout


def _split_fused(layout: Layout, source: TensorSource) -> None:
    """Replace tensors that hold several of the family's by those."""
    family, numbers = layout.family, itertools.product(range(layout.cfg.n_layers), layout.family.fused)
    for layer, (pattern, paths) in numbers:
        name = pattern.format(layer)
        if name not in source.shapes:
            continue
        experts = range(layout.cfg.mlp.moe.experts)
        names = [family.tensors[path].name.format(layer, expert) for expert in experts for path in paths]
        names = list(dict.fromkeys(names))  # a router's name has no expert
        rows = math.prod(source.shapes[name][:-1])
        if rows != (wanted := sum(layout.tensors[part].shape[0] for part in names)):
            raise UserError(
                f"the model has {name} {source.shapes[name]}, with {rows} rows instead of {wanted}; its config.json "
                "may be another model's"
            )
        source.split(name, names)


def _match_names(layout: Layout, source: TensorSource) -> None:
    """Add the prefix of the family's names, or remove it, where the name that results is one that the model has."""
    prefix, head = layout.family.prefix, layout.family.tensors["head"].name
    wanted = {*layout.tensors, head}

    def known(name: str) -> bool:
        return name in wanted or name.endswith(layout.family.ignored)

    names = {}
    for name in source.shapes:
        if name.startswith(prefix) and name.removeprefix(prefix) in wanted:
            names[name] = name.removeprefix(prefix)
        elif name not in wanted and not name.startswith(prefix) and known(prefix + name):
            names[name] = prefix + name
    if twice := [name for name in names if names[name] in source.shapes]:
        raise UserError(
            f"the model has both {twice[0]} and {names[twice[0]]}, which are the same weight; save the model again"
        )
    source.rename(names)


def _match_head(layout: Layout, source: TensorSource) -> Layout:
    """Return the layout of a model whose head is its own where the file has another than the embedding.

    As in `transformers`: two different tensors are not tied; a head without an embedding is both.
    """
    embed, head = (layout.family.tensors[name].name for name in ("embed", "head"))
    shapes = source.shapes
    if not layout.cfg.tie_embeddings or head not in shapes:
        return layout
    if embed not in shapes:
        source.rename({head: embed})
        return layout
    if {embed, head} & source.unreadable.keys() or shapes[embed] != shapes[head]:
        raise UserError(
            f"the model has {head} {shapes[head]} and {embed} {shapes[embed]}, but config.json says "
            "tie_word_embeddings; set it to false if the head is its own, or remove the tensor"
        )
    if np.array_equal(np.asarray(source.read(embed), np.float32), np.asarray(source.read(head), np.float32)):
        return layout
    untied = dataclasses.replace(layout.cfg, tie_embeddings=False)
    return Layout(layout.family, untied, layout.absent)


def _check_tensors(layout: Layout, source: TensorSource) -> None:
    wanted = {name: tensor.shape for name, tensor in layout.tensors.items()}
    found, family = source.shapes, layout.family
    ignored = family.ignored
    if layout.cfg.tie_embeddings:
        ignored = (*ignored, family.tensors["head"].name)  # a copy of the embedding
    extra = [name for name in found if name not in wanted and not name.endswith(ignored)]
    if heads := [name for name in extra if name.startswith(OTHER_HEADS)]:
        print(f"note: {', '.join(heads)}: heads of another task; ignored", file=sys.stderr)
        extra = [name for name in extra if name not in heads]
    missing = [name for name in wanted if name not in found]
    if reason := foreign_tensors(extra):
        raise UserError(reason)
    if missing:
        raise UserError(_about_missing(layout, missing, found))
    if wrong := [name for name in wanted if found[name] != wanted[name]]:
        raise UserError(_about_shapes(family, wrong, found, wanted))
    if extra:
        raise UserError(_about_extra(layout, extra))
    if other := [name for name in wanted if name in source.unreadable]:
        kind = source.unreadable[other[0]]
        raise UserError(f"{other[0]} is {kind}, which cannot be read; save the model as float32, float16 or bfloat16")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _about_missing(layout: Layout, missing: list[str], found: Mapping[str, Any]) -> str:
    if missing == [layout.family.tensors["head"].name]:
        return (
            f"the model lacks {missing[0]}: it is a base model without a head, or its embedding is its head; give "
            "one saved as ...ForCausalLM, or set tie_word_embeddings to true in config.json"
        )
    if prefix := wrapping(found, missing):
        return (
            f"the names of the model's tensors begin with {prefix!r}, as those of a wrapped module; unwrap it before "
            "it is saved, or rename its tensors without that"
        )
    return (
        f"the model lacks {_listed(missing)}; its config.json is another model's, or a file is incomplete: copy all "
        "again"
    )


def _about_extra(layout: Layout, extra: list[str]) -> str:
    """Return a message that names the keys of config.json that contradict unexpected tensors."""
    pattern = re.escape(layout.family.tensors["blocks.mlp.down"].name).replace(r"\{\}", r"(\d+)")
    layers = {int(found[1]) for name in extra if (found := re.fullmatch(pattern, name))}
    if layers:
        key = next(theirs for ours, theirs, _ in layout.family.keys if ours == "n_layers")
        stated = f"config.json says {key} {layout.cfg.n_layers}"
        return f"the model has the unexpected tensors {_listed(extra)}, and {stated}; correct the key"
    return (
        f"the model has the unexpected tensors {_listed(extra)}, which no {layout.family.title} of its config.json "
        "has; give the config.json that was saved with it"
    )


def _about_shapes(family: Family, wrong: list[str], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return a message about tensors of another shape, with the keys of config.json that set the first one's."""
    differences = [f"{name} {found[name]} instead of {wanted[name]}" for name in wrong]
    first = re.sub(r"\.\d+\.", ".{}.", wrong[0])
    dims = next(tensor.dims for tensor in family.tensors.values() if tensor.name == first)
    of_letter = {"V": "vocab_size", "D": "d_model", "N": "d_model", "F": "mlp.width", "T": "context_length"}
    of_letter |= {"H": "n_heads", "Q": "n_heads", "E": "mlp.moe.experts", "G": "n_kv_heads", "K": "head_dim"}
    fields = {of_letter[letter] for letter in dims if letter in of_letter}
    fields |= {"mlp.moe.width"} if "F" in dims else set()
    keys = ", ".join(theirs for ours, theirs, _ in family.keys if ours in fields)
    return (
        f"the model has tensors of the wrong shape: {_listed(differences)}; check {keys} in config.json, which may "
        "be another model's"
    )
