"""Which family of Hugging Face has a model's form, and the config.json of an export."""

import json
from typing import Any

from gptjax.config import ModelConfig, override, plain_values
from gptjax.convert.families import FAMILIES
from gptjax.convert.family import Family
from gptjax.errors import UserError

# Their `rope_type`, with our names of its values and theirs.
ROPE_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
    "longrope": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "short_factors": "short_factor",
        "long_factors": "long_factor",
        "attention_factor": "attention_factor",
    },
}
# Their values that may be missing: null, or what `transformers` takes.
ROPE_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}
# The values of features that a family does not have, unless it has a key or a form for them.
PLAIN_FORM = {
    "logit_softcap": None,
    "conv_width": None,
    "embed_multiplier": 1.0,
    "attention.softcap": None,
    "attention.scale_width": None,
    "attention.sinks": False,
    "attention.qk_norm_over": "head",
    "norm.place": "pre",
    "norm.from_one": False,
    "positions.rotated_frac": 1.0,
}


def _facts(cfg: ModelConfig) -> dict[str, Any]:
    """Return a model's form, in the terms of `Family.form`."""
    local, scaled = cfg.local_layers, cfg.embed_multiplier == cfg.d_model**0.5
    even_heads = cfg.d_head * cfg.n_heads == cfg.d_model
    qkv_bias = cfg.bias if cfg.attention.qkv_bias is None else cfg.attention.qkv_bias
    return {
        **plain_values(cfg),
        "attention.qkv_bias": "bias" if qkv_bias == cfg.bias else qkv_bias,
        "n_kv_heads": "n_heads" if cfg.kv_heads == cfg.n_heads else cfg.kv_heads,
        "head_dim": "d_model / n_heads" if even_heads else cfg.d_head,
        "d_model": "a multiple of n_heads" if cfg.d_model % cfg.n_heads == 0 else cfg.d_model,
        "embed_multiplier": "the root of d_model" if scaled else cfg.embed_multiplier,
        "attention.window": "in all layers" if all(local) else "in some layers" if any(local) else "in no layer",
        "positions.local_theta": cfg.positions.local_theta is not None,
    }


def _obstacles(family: Family, cfg: ModelConfig) -> dict[str, str]:
    """Return the fields in which a model differs from a family's form, each with both values for the user."""
    known = {ours for ours, _, _ in family.keys}
    plain = {field: value for field, value in PLAIN_FORM.items() if field not in known}
    facts, form = _facts(cfg), {**plain, **family.form}
    if cfg.attention.window is not None and family.layers is None:
        form["attention.window"] = "in no layer" if family.window is None else "in all layers"
    if cfg.positions.kind == "rope":
        scaling = cfg.positions.scaling
        form["positions.local_theta"] = family.local_theta is not None
        if family.local_theta is not None and scaling is None:  # all layers may rotate alike
            facts["positions.local_theta"] = True
        if scaling is not None and family.ropes is not None and scaling.kind not in family.ropes:
            facts["positions.scaling.kind"], form["positions.scaling.kind"] = scaling.kind, " or ".join(family.ropes)
    if facts["attention.qkv_bias"] == "bias" and family.form["attention.qkv_bias"] != "bias":
        facts["attention.qkv_bias"] = cfg.bias
    # A tensor that the family has and the model lacks is exported as what changes nothing: zeros.
    spare = {"bias", "attention.qkv_bias"} if family.form.get("bias") is True else set()
    return {
        field: f"model.{field} {_in_yaml(facts[field])} where {family.title} has {_in_yaml(wanted)}"
        for field, wanted in form.items()
        if facts[field] != wanted and not (field in spare and not facts[field])
    }


def _in_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def family_for(cfg: ModelConfig, origin: str | None = None) -> str:
    """Return the `model_type` under which a model can be exported; `origin`, where it came from, if that still fits.

    Raises:
        UserError: no family has this form; the message names the fields that differ from the nearest family.
    """
    kinds = [origin, *FAMILIES] if origin in FAMILIES else list(FAMILIES)
    obstacles = {kind: _obstacles(FAMILIES[kind], cfg) for kind in kinds}
    best = min(kinds, key=lambda kind: len(obstacles[kind]))
    if obstacles[best]:
        raise UserError(
            f"no Hugging Face family has this model's form; differing: {', '.join(obstacles[best].values())} "
            f"(model.preset {FAMILIES[best].preset} can be exported)"
        )
    return best


def exported_form(cfg: ModelConfig, kind: str) -> ModelConfig:
    """Return the same model with every tensor of the family: norms with weights, and biases where the family has
    them.
    """
    form = FAMILIES[kind].form
    biases = {"bias": True, "attention.qkv_bias": None} if form.get("bias") is True else {}
    return override(cfg, {"norm.weights": True, **biases})


def export_config(cfg: ModelConfig, kind: str, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model; `transformers` 4 and 5 read it to the same model."""
    family = FAMILIES[kind]
    resolved = {"n_kv_heads": cfg.kv_heads, "head_dim": cfg.d_head, "mlp.width": cfg.mlp_width}
    width = cfg.attention.scale_width or cfg.d_head
    resolved |= {"mlp.moe.width": cfg.expert_width, "attention.scale_width": int(width) if width % 1 == 0 else width}
    ours_values = plain_values(cfg) | resolved
    values = {theirs: ours_values[ours] for ours, theirs, _ in family.keys}
    values |= {key: allowed[0] for key, allowed in family.demands.items()}
    values |= _exported_rope(cfg, family) | _exported_window(cfg, family) | dict(family.written)
    return {"architectures": [family.architecture], "model_type": kind, **values, "torch_dtype": dtype}


def _exported_rope(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the keys of rotary positions: those of `transformers` 4, and `rope_parameters` for what they lack."""
    if cfg.positions.kind != "rope":
        return {}
    theta, scaling = cfg.positions.theta, cfg.positions.scaling
    values: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
    if scaling is not None:
        given = plain_values(scaling)
        named = {theirs: given[ours] for ours, theirs in ROPE_TYPES[scaling.kind].items()}
        named = {theirs: value for theirs, value in named.items() if value is not None}
        values["rope_scaling"] = {"rope_type": scaling.kind, **named}
        if scaling.kind == "longrope":
            values["original_max_position_embeddings"] = named["original_max_position_embeddings"]
    elif family.scaling is not None:
        values["rope_scaling"] = {"rope_type": "default"}
    if family.local_theta is None:
        return values
    local = theta if cfg.positions.local_theta is None else cfg.positions.local_theta
    if family.local_theta_key is not None:
        return {**values, family.local_theta_key: local}
    of_all = {"rope_theta": theta, **(values["rope_scaling"] or {"rope_type": "default"})}
    of_local = {"rope_theta": local, "rope_type": "default"}
    return {**values, "rope_parameters": {"full_attention": of_all, "sliding_attention": of_local}}


def _exported_window(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the keys of a sliding window, and of the layers that have it."""
    if family.window is None:
        return {}
    key, switch, usual = family.window
    some = any(cfg.local_layers)
    # A class whose layers follow a pattern has no null, even where no layer has the window.
    values: dict[str, Any] = {key: cfg.attention.window if some else usual if family.layers else None}
    if switch is not None:
        values[switch] = some
    if family.layers is not None:
        kinds = {True: "sliding_attention", False: "full_attention"}
        values["layer_types"] = [kinds[local] for local in cfg.local_layers]
    return values
