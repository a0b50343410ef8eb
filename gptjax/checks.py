"""Range checks of a config's values; each error names the key, the value and the rule."""

import math
import re
from collections.abc import Mapping
from typing import Any

from gptjax.errors import UserError


def check(good: bool, name: str, value: Any, rule: str) -> None:
    """Raise UserError unless `good`; `rule` says what the value must be."""
    if not good:
        raise UserError(f"{name} {value} {rule}")


def check_at_least(least: int, section: str, config: Any, *names: str) -> None:
    """Raise UserError where a field of a section is below `least`; None is allowed."""
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= least, f"{section}.{name}", value, f"must be at least {least}")


def check_positive(section: str, config: Any, *names: str) -> None:
    """Raise UserError where a field of a section is not finite and positive; None is allowed."""
    for name in names:
        value = getattr(config, name)
        check(value is None or 0 < value < math.inf, f"{section}.{name}", value, "must be a number above 0")


def is_pattern(text: str) -> bool:
    """Return whether a text is a valid regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def divisors(n: int) -> list[int]:
    """Return the divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def filled_axes(axes: Mapping[str, int], devices: int) -> dict[str, int] | None:
    """Return the sizes of a mesh's axes with -1 filled in; None where their product is not the number of devices."""
    fixed = math.prod(size for size in axes.values() if size != -1)
    filled = {name: devices // fixed if size == -1 else size for name, size in axes.items()}
    return filled if math.prod(filled.values()) == devices else None
