"""Build random configs up to the abstract model and its shardings: each builds, or is refused in one line.

`python tests/random_configs.py [TRIALS [SEED]]` prints how many were built and refused, the longest time, and every
other outcome with its arguments.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
import random
import sys
import time
import typing
from collections import Counter
from typing import Any

from gptjax.config import Config, override
from gptjax.configfile import load_config
from gptjax.errors import UserError
from gptjax.sharding import make_mesh
from gptjax.step import make_trainable

LONGEST_S = 5.0
USUAL = {int: ["1", "2", "4", "8", "16", "64"], float: ["0.1", "0.5", "1.0", "1e-3"], bool: ["true", "false"]}
ODD = [
    *("-1", "0", "3", "7", "17", "-0.5", "nan", "inf", "1e400", str(10**12)),
    *("null", "", "[1, 2]", "{a: 1}", "auto", "x", "é", "[]", "{}", "~", "1:2"),
]


def keys_of(kind: Any, prefix: str = "") -> dict[str, list[str]]:
    """Return every key of a config, with usual values of its type."""
    found: dict[str, list[str]] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], prefix + field.name
        inner = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)
        if inner is not None:
            found |= keys_of(inner, f"{name}.")
        found[name] = words_of(hint)
    return found


def words_of(hint: Any) -> list[str]:
    """Return usual values of a type: the words of its Literals, or a few numbers."""
    words = list(USUAL.get(hint, []))
    for one in typing.get_args(hint):
        words += [one] if isinstance(one, str) else words_of(one)
    return words


def random_arguments(keys: dict[str, list[str]], chance: random.Random) -> list[str]:
    """Return one to five options of a command line, most of them with a value of their type."""
    chosen = chance.sample(sorted(keys), chance.randint(1, 5))
    values = [
        chance.choice(keys[name]) if keys[name] and chance.random() < 0.85 else chance.choice(ODD) for name in chosen
    ]
    return [f"--{name}={value}" for name, value in zip(chosen, values, strict=True)]


def try_one(arguments: list[str]) -> str:
    """Return what comes of a config: built, refused, or what else."""
    try:
        cfg = load_config(["configs/debug.yaml", *arguments])
        cfg = override(cfg, {"model.vocab_size": cfg.model.vocab_size or 65})
        make_trainable(cfg, make_mesh(cfg.mesh.axes, slices=cfg.mesh.slices))
    except UserError as error:
        said = str(error)
        return "refused" if said and "\n" not in said and len(said) < 2000 else f"a message of lines: {said}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "built"


def main(trials: int, seed: int) -> int:
    """Print the counts; return 1 where a config was neither built nor refused."""
    keys, counts, problems, longest_s = keys_of(Config), Counter[str](), [], 0.0
    for number in range(trials):
        arguments = random_arguments(keys, random.Random(f"{seed} {number}"))
        began = time.process_time()
        outcome = try_one(arguments)
        took_s = time.process_time() - began
        longest_s = max(longest_s, took_s)
        counts[outcome if outcome in ("built", "refused") else "other"] += 1
        if outcome not in ("built", "refused") or took_s > LONGEST_S:
            problems.append(f"{took_s:.1f} s: {outcome}: {' '.join(arguments)}")
    print(f"{trials} configs: {counts['built']} built, {counts['refused']} refused, {counts['other']} other")
    print(f"longest {longest_s:.1f} s of CPU time\n" + "\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*[int(word) for word in [*sys.argv[1:], *("5000", "0")[len(sys.argv) - 1 :]]]))
