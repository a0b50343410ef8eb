"""Range checks of a config's values, each an error that names the key, the value and what would be right."""

import math
import re
from collections.abc import Mapping
from typing import Any

from gptjax.errors import UserError


def check(good: bool, name: str, value: Any, what: str) -> None:
    """Raise UserError unless good."""
    if not good:
        raise UserError(f"{name} {value} {what}")


def check_at_least(least: int, section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= least, f"{section}.{name}", value, f"must be at least {least}")


def check_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(value is None or 0 < value < math.inf, f"{section}.{name}", value, "must be a number above 0")


def is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def filled_axes(axes: Mapping[str, int], devices: int) -> dict[str, int] | None:
    """Sizes of a mesh's axes with -1 filled in; None where they do not multiply to so many devices."""
    fixed = math.prod(size for size in axes.values() if size != -1)
    filled = {name: devices // fixed if size == -1 else size for name, size in axes.items()}
    return filled if math.prod(filled.values()) == devices else None
