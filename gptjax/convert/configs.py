"""Convert Hugging Face's config.json to our config: every key is used, known to have no effect, or refused by name.

Source: the configuration_*.py of `transformers` 5.24, and its configuration_utils.py, modeling_rope_utils.py and
masking_utils.py for the keys of all families.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gptjax.config import ModelConfig, nested_values, plain_values
from gptjax.configfile import config_from_dict
from gptjax.convert.families import FAMILIES
from gptjax.convert.family import Family
from gptjax.convert.foreign import another_head, unknown_family
from gptjax.convert.forms import ROPE_DEFAULTS, ROPE_TYPES
from gptjax.errors import UserError
from gptjax.shell.paths import refuse_lfs_pointer

SIZES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "mlp.width", "context_length", "vocab_size")
SIZES += ("mlp.moe.experts", "mlp.moe.top_k", "mlp.moe.width")
DERIVED_WHERE_NULL = ("num_key_value_heads", "head_dim", "n_inner")  # as their classes compute it
DEFAULT_FULL_LAYERS = 28  # `max_window_layers`, where there is none

# Keys that any family may have, with the values under which they change nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "per_layer_config": (None,),
    "pruned_heads": (None, {}),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "partial_rotary_factor": (1, None),
}
# Keys about training, saving or generation, not about what a model computes; and prefixes of such keys.
_IRRELEVANT = """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path architectures
    attention_dropout attn_implementation attn_pdrop bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cls_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label initializer_range is_decoder is_llama_config label2id length_penalty mask_token_id max_length
    min_length model_type n_ctx name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id use_bfloat16 use_cache use_return_dict
"""
IRRELEVANT = frozenset(_IRRELEVANT.split())
IRRELEVANT_BEGINNINGS = ("summary_", "unsloth_")
READ_ELSEWHERE = ("compression_config", "quantization_config", "transformers_weights")  # foreign.py, safetensors.py
# Patterns of keys with which other families change what is computed.
MECHANISMS = (
    r"softcap|multiplier|logit_scale|logits_scaling|scale_emb|scale_depth|dim_model_base|expert|router|clip_qkv|alibi"
    r"|parallel_(residual|attn)|qk_(layer)?norm|no_rope|nope_|lora_rank|mamba|ssm_|chunk_size|bidirectional"
)


class Imported(NamedTuple):
    """What a config.json describes.

    Attributes:
        model: our config of it.
        absent: prefixes of the paths of biases that its files lack and that are zeros.
    """

    model: ModelConfig
    absent: tuple[str, ...]


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names; raise UserError for an unknown one."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(unknown_family(config, {key: (f.title, f.architecture) for key, f in FAMILIES.items()}))
    if reason := another_head(config):
        raise UserError(reason)
    return FAMILIES[kind]


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; raise UserError where it holds none."""
    try:
        data = path.read_bytes()
        refuse_lfs_pointer(path, data)
        values = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values


def model_section(path: str) -> str:
    """Return the section `model` of a config file, as YAML, for a config.json or the folder that has one.

    Raises:
        UserError: it cannot be read; or as `import_config`.
    """
    file = Path(path)
    config = read_json(file / "config.json" if file.is_dir() else file)
    found, usual = plain_values(import_config(config).model), plain_values(ModelConfig())
    section = nested_values({key: value for key, value in found.items() if value != usual[key]})
    return yaml.safe_dump({"model": section}, sort_keys=False)


def import_config(config: Mapping[str, Any]) -> Imported:
    """Return our config of the model that a config.json describes.

    Raises:
        UserError: a family that is not known, or a variant of one that this project cannot run.
    """
    family = family_of(config)
    config = {**config, **{theirs: config[alias] for alias, theirs in family.aliases.items() if alias in config}}
    _check_keys(family, config)
    model: dict[str, Any] = {}
    for ours, theirs, default in family.keys:
        if ours != "bias":
            model[ours] = _value(ours, theirs, config.get(theirs, default), default)
    shared = ("positions.kind", "norm.", "mlp.", "attention.qk_norm", "attention.sinks")
    model |= {field: value for field, value in family.form.items() if field.startswith(shared)}
    if "embed_multiplier" in family.form:
        model["embed_multiplier"] = model["d_model"] ** 0.5
    model["bias"], absent = _import_biases(family, config)
    if family.form["attention.qkv_bias"] is True and not model["bias"]:
        model["attention.qkv_bias"] = True
    if model["positions.kind"] == "rope":
        model |= _import_rope(family, config)
    model |= _import_window(family, config, model["n_layers"])
    try:
        return Imported(config_from_dict({"model": nested_values(model)}).model, absent)
    except UserError as error:
        raise UserError(f"config.json: {error}") from None


def _value(ours: str, theirs: str, value: Any, default: Any) -> Any:
    if value is None and (default is None or theirs in DERIVED_WHERE_NULL):
        return None
    if ours in SIZES and not (type(value) is int and value >= 1):
        raise UserError(f"config.json: {theirs} {value!r} must be a number of at least 1")
    return value


def _import_biases(family: Family, config: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Return whether the model has biases, and the prefixes of the paths of those that are not in its files."""
    if not family.biases:
        return family.form["bias"], ()
    present = {key: config.get(key, False) for key in family.biases}
    for key, value in present.items():
        if not isinstance(value, bool):
            raise UserError(f"config.json: {key} {value!r} must be true or false")
    some = any(present.values())
    return some, tuple(family.biases[key] for key, value in present.items() if some and not value)


def _check_keys(family: Family, config: Mapping[str, Any]) -> None:
    """Raise UserError for keys under which a model cannot be run here; print a note for unknown keys."""
    neutral = {**NEUTRAL_VALUES, **family.demands}
    for key, allowed in neutral.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"config.json: {key} {config[key]!r} cannot be run here, only {allowed[0]!r}")
    used = {theirs for _, theirs, _ in family.keys} | neutral.keys() | family.aliases.keys() | IRRELEVANT
    used |= {*READ_ELSEWHERE, *family.unread, "layer_types"}
    if family.form["positions.kind"] == "rope":
        used |= {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"}
    used |= {family.local_theta_key, *family.period}
    if family.window is not None:
        used |= {*family.window[:2], "max_window_layers"}
    unknown = [key for key in config if key not in used and not key.startswith(IRRELEVANT_BEGINNINGS)]
    for key in unknown:
        if re.search(MECHANISMS, key) and _has_effect(config[key]):
            raise UserError(
                f"config.json: {key} {config[key]!r} is not a key of {family.title}, and cannot be run here; remove "
                "it if the weights were trained without it (transformers ignores it)"
            )
    if unknown:
        names = ", ".join(sorted(unknown)[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        print(
            f"note: config.json: {names}: not read for {family.title}; ignored, as by transformers", file=sys.stderr
        )


def _has_effect(value: Any) -> bool:
    """Return whether a value turns a mechanism on: true, or a number other than 0 and 1."""
    return value is True or (value is not False and value not in (None, 0, 1, [], {}))


LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}


def _import_window(family: Family, config: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """Return our keys of a sliding window and of the layers that have it; none where no layer has."""
    key, switch, default = family.window or (None, None, None)
    kinds = config.get("layer_types")
    if kinds is not None:
        allowed = LAYER_TYPES.keys() if family.layers is not None else {"full_attention"}
        if not isinstance(kinds, list) or len(kinds) != n_layers or not {*map(str, kinds)} <= allowed:
            raise UserError(
                f"config.json: layer_types must be {n_layers} of {' or '.join(sorted(allowed))}, to be run here"
            )
    if key is None:
        return {}
    window = config.get(key, default)
    if switch is not None and not config.get(switch, False):
        window = None
    layers = _window_layers(family, config, n_layers)
    if window is None:
        if "local" in layers and (kinds is not None or family.layers):
            raise UserError(f"config.json: layer_types has sliding_attention, but there is no {key}; make them agree")
        return {}
    if type(window) is not int or window < 1:
        raise UserError(f"config.json: {key} {window!r} must be a number of at least 1, or null")
    if "local" not in layers:
        return {}
    period = next(p for p in range(1, len(layers) + 1) if all(x == layers[i % p] for i, x in enumerate(layers)))
    return {"attention.window": window, "attention.pattern": layers[:period]}


def _window_layers(family: Family, config: Mapping[str, Any], n_layers: int) -> list[str]:
    """Return which layers have the window, local, and which do not, global."""
    if config.get("layer_types") is not None:
        return [LAYER_TYPES[kind] for kind in config["layer_types"]]
    if family.layers is None:
        return ["local"] * n_layers
    if family.layers == ():
        full = config.get("max_window_layers", DEFAULT_FULL_LAYERS)
        if type(full) is not int:
            raise UserError(f"config.json: max_window_layers {full!r} must be a number")
        return ["global" if i < full else "local" for i in range(n_layers)]
    pattern = list(family.layers)
    for key in family.period:
        if key in config:
            if type(config[key]) is not int or config[key] < 1:
                raise UserError(f"config.json: {key} {config[key]!r} must be a number of at least 1")
            pattern = ["local"] * (config[key] - 1) + ["global"]
            break
    return [pattern[i % len(pattern)] for i in range(n_layers)]


def _import_rope(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our keys of rotary positions. transformers 5 keeps theirs in `rope_parameters`, 4 in `rope_theta` and
    `rope_scaling`; with both, 5 takes `rope_scaling`. A family with two bases has `rope_parameters` for each."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or family.scaling or {}
    theta, local = config.get("rope_theta", family.theta), {}
    if family.local_theta is not None:
        nested = config.get("rope_parameters") or {}
        parts = [nested.get(name) or {} for name in ("full_attention", "sliding_attention")]
        if not all(isinstance(part, Mapping) for part in parts):
            raise UserError(f"config.json: the rope parameters {nested!r} must be an object for each layer type")
        if parts[1].get("rope_type", "default") != "default":
            raise UserError(
                f"config.json: rope_type {parts[1]['rope_type']!r} of sliding_attention cannot be run here"
            )
        given = {**parts[0], **(config.get("rope_scaling") or {})}
        freq = config.get(family.local_theta_key, family.local_theta)
        local = {"positions.local_theta": parts[1].get("rope_theta", freq)}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise UserError(f"config.json: the rope scaling {given!r} must be an object with a rope_type")
    scaling = _import_scaling(family, config, given)
    partial = given.get("partial_rotary_factor")
    if "positions.rotated_frac" in (ours for ours, _, _ in family.keys) and partial is not None:
        local["positions.rotated_frac"] = partial
    elif partial not in (None, 1):
        raise UserError(f"config.json: partial_rotary_factor {partial} cannot be run here, only 1.0")
    return {"positions.theta": given.get("rope_theta", theta), "positions.scaling": scaling, **local}


def _import_scaling(family: Family, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return our `positions.scaling`; None where the wavelengths are not scaled."""
    kind = given.get("rope_type", given.get("type", "default"))
    known = ROPE_TYPES if family.ropes is None else family.ropes
    if "yarn" not in known and kind in ("su", "yarn"):
        kind = "longrope"  # Phi-3's names of old
    if kind == "dynamic":  # it changes only positions beyond max_position_embeddings, which are not run here
        kind, given = "default", {key: value for key, value in given.items() if key != "factor"}
        print(
            "note: config.json: rope_type 'dynamic': run up to max_position_embeddings, where it is the default",
            file=sys.stderr,
        )
    if kind not in known:
        raise UserError(f"config.json: rope_type {kind!r} cannot be run here; known: {', '.join(known)}")
    names = ROPE_TYPES[kind]
    used = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *names.values()}
    if kind in ("default", "longrope"):
        used.add("original_max_position_embeddings")
    if strange := given.keys() - used:
        key = min(strange)
        raise UserError(
            f"config.json: {key} {given[key]!r} is not a key of the rope_type {kind!r} here; remove it if the "
            "weights were trained without it"
        )
    longest = config.get("max_position_embeddings", 2048)
    values = dict(given)
    if "original_context" in names:
        theirs = names["original_context"]
        values[theirs] = config.get(theirs, given.get(theirs, longest))
    if kind == "longrope" and values.get("factor") is None:
        values["factor"] = longest / values[names["original_context"]]
    missing = [theirs for ours, theirs in names.items() if ours not in ROPE_DEFAULTS and values.get(theirs) is None]
    if missing:
        raise UserError(f"config.json: rope_type {kind!r} lacks {', '.join(missing)}")
    scaling = {}
    for ours, theirs in names.items():
        value = values.get(theirs)
        scaling[ours] = ROPE_DEFAULTS.get(ours) if value is None else value
    return {"kind": kind, **scaling} if scaling else None
