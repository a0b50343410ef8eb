"""Configs and checkpoints of earlier versions, read as today's.

A config file and a checkpoint carry a format number. Format 1, of files that carry none, had flat keys in `model`;
format 2 nests them. Old keys are still read, in files and on the command line.
"""

from typing import Any

from gptjax.errors import UserError

FORMAT = 2

# Old key -> new key.
RENAMED = {
    "profile": "run.profile",
    "model.d_mlp": "model.mlp.width",
    "model.rope_theta": "model.positions.theta",
    "model.rope_scaling": "model.positions.scaling",
    "model.norm_weights": "model.norm.weights",
    "model.norm_eps": "model.norm.eps",
    "model.qk_norm": "model.attention.qk_norm",
    "model.qkv_bias": "model.attention.qkv_bias",
    "model.base_width": "model.parametrization.base_width",
    "model.base_layers": "model.parametrization.base_layers",
    "model.base_head_dim": "model.parametrization.base_head_dim",
    "model.remat": "run.remat",
    "model.remat_names": "run.remat_names",
    "model.scan_layers": "run.scan_layers",
}
# Keys that held a plain value and are sections now -> where the plain value belongs.
NOW_SECTIONS = {
    "model.positions": "model.positions.kind",
    "model.norm": "model.norm.kind",
    "model.mlp": "model.mlp.kind",
    "model.parametrization": "model.parametrization.kind",
    "model.attention": "run.attention",
}


def current_key(key: str, plain: bool) -> str:
    """Return today's name of a key.

    Args:
        key: dotted, such as model.rope_theta.
        plain: whether its value is a plain one, and no section.
    """
    for old, new in RENAMED.items():
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    return NOW_SECTIONS.get(key, key) if plain else key


def original_key(key: str) -> str:
    """Return the name that a key had in format 1; a key that has not changed as it is."""
    names = {new: old for old, new in (*RENAMED.items(), *NOW_SECTIONS.items())}
    return names.get(key, key)


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config's nested values with today's keys. A key that is unknown stays as it is.

    Raises:
        UserError: a later version wrote them, or an old key and its new one are both given.
    """
    values = dict(values)
    check_format(values.pop("format", 1), "the config")
    found: dict[str, Any] = {}
    for section, given in values.items():
        nested = section == "model" and isinstance(given, dict)
        keys = [(f"model.{name}", value) for name, value in given.items()] if nested else [(section, given)]
        for old, value in keys or [("model", {})]:
            if not isinstance(old, str):  # the caller names it as unknown
                found[old] = value
                continue
            new = current_key(old, plain=not isinstance(value, dict))
            _put(found, new.split("."), value, new)
    return found


def check_format(number: Any, what: str) -> None:
    """Raise UserError where a later version of this project wrote `what`."""
    if not isinstance(number, int) or number > FORMAT:
        raise UserError(f"{what} has format {number}, and this version reads up to {FORMAT}; upgrade gptjax")


def _put(found: dict[str, Any], path: list[str], value: Any, new: str) -> None:
    """Set a nested value; sections that are already there are kept, and not changed in place."""
    *sections, name = path
    for section in sections:
        inner = found.get(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{section}: {inner!r} must be a section of `key: value` lines")
        found[section] = dict(inner)
        found = found[section]
    if isinstance(value, dict) and isinstance(found.get(name), dict):
        for inner, given in value.items():
            _put(found, [name, inner], given, f"{new}.{inner}")
    elif name in found and found[name] != value:
        raise UserError(f"{new} is given twice, once by its old name {original_key(new)}; keep one of them")
    else:
        found[name] = value
