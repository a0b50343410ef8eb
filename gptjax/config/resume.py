"""Which values may differ between the runs that share a directory.

They change how a run is computed, or for how long, but not which weights a given step produces. A field declares this
with `field(default=..., metadata=FREE)`.
"""

import dataclasses

FREE = {"free_on_resume": True}  # metadata of a field, or of a section with all that is in it


def free_keys(section: type, prefix: str = "") -> list[str]:
    """Return the keys that may differ on resume; a section's key stands for every key inside it."""
    keys = []
    for field in dataclasses.fields(section):
        if field.metadata.get("free_on_resume"):
            keys.append(prefix + field.name)
        elif dataclasses.is_dataclass(field.default_factory):
            keys += free_keys(field.default_factory, f"{prefix}{field.name}.")
    return keys
