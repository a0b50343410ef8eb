"""Change single values of a config by their dotted keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

Section = TypeVar("Section")


def override(section: Section, values: Mapping[str, Any]) -> Section:
    """Return a config, or a section of one, with some values changed.

    Args:
        values: by dotted key, such as {"run.remat": "full", "model.mlp.width": 512}.

    Raises:
        UserError: a changed value is out of range, as when the config is made.
    """
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    changed = {name: override(getattr(section, name), parts) for name, parts in inner.items()}
    return dataclasses.replace(section, **own, **changed)


def plain_values(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the plain values of a config by dotted key. Sections are flattened and have no entry of their own."""
    found: dict[str, Any] = {}
    plain = dataclasses.asdict(section)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default_factory):
            found |= plain_values(getattr(section, field.name), f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = plain[field.name]
    return found


def nested_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of dotted keys as nested dictionaries: {"mlp.width": 8} as {"mlp": {"width": 8}}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return found
