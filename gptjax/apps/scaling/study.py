"""The study file: which models, which budgets, and which limits. Its directory contains all that follows from it.

study.yaml            this file
plan.json             the rungs, read by the verbs that fit
probe.json            seconds a step of each shape, by `plan --probe`
rungs/ID/             a run's directory, and result.json once it is finished
table.csv             the results, by `collect`
forecasts/ID.json     the prediction for a held-out rung, written before its run
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from gptjax.configfile import read_yaml
from gptjax.errors import UserError, nearest
from gptjax.shell.commandline import wrong_value


@dataclass(frozen=True)
class ModelShape:
    """The size of a model; all else is the base config's.

    Args:
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_heads: query heads.
    """

    n_layers: int
    d_model: int
    n_heads: int


@dataclass(frozen=True)
class HeldOut:
    """A run that no fit may touch, and that needs a forecast before it starts.

    Args:
        flops: of its training.
        shape: of its model.
    """

    flops: float
    shape: ModelShape


@dataclass(frozen=True)
class Budgets:
    """How long each shape is trained; each value makes one rung a shape.

    Args:
        flops: training FLOPs, the same for every shape (isoFLOP).
        tokens_per_param: training tokens for each weight that multiplies.
        tokens: training tokens.
        held_out: single runs beyond these, to be forecast.
    """

    flops: tuple[float, ...] = ()
    tokens_per_param: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    held_out: tuple[HeldOut, ...] = ()


@dataclass(frozen=True)
class Sweeps:
    """What is varied besides, in all combinations; an empty field keeps the base config's value.

    Args:
        peak_lr: learning rates.
        batch_sequences: sequences a step.
        seeds: seeds.
    """

    peak_lr: tuple[float, ...] = ()
    batch_sequences: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Limits:
    """The limits beyond which a plan warns or raises.

    Args:
        epochs: passes over the corpus beyond which a rung is warned of (Muennighoff et al. 2023, arXiv 2305.16264).
        min_steps: fewer steps than these are warned of.
        total_flops: a study of more is refused; null means no limit.
    """

    epochs: float = 4.0
    min_steps: int = 200
    total_flops: float | None = None


@dataclass(frozen=True)
class Study:
    """A scaling study.

    Args:
        base: config file of every rung, relative to the study file.
        ladder: the shapes.
        budgets: how long they are trained.
        sweeps: what else is varied.
        warmup_frac: warm-up as a share of each rung's steps; null keeps the base config's warmup_steps.
        branches: with the schedule wsd, begin a rung where the shorter one of its kind began to cool down, rather
            than at step 0; the results are bitwise identical.
        limits: warnings and refusals.
        flops_per_s: FLOPs a second that training reaches, for the hours; null: they are not known.
        usd_per_hour: price of the machine, for the cost.
    """

    base: str
    ladder: tuple[ModelShape, ...]
    budgets: Budgets = field(default_factory=Budgets)
    sweeps: Sweeps = field(default_factory=Sweeps)
    warmup_frac: float | None = None
    branches: bool = False
    limits: Limits = field(default_factory=Limits)
    flops_per_s: float | None = None
    usd_per_hour: float | None = None

    def __post_init__(self):
        if not self.ladder:
            raise UserError("ladder is empty; list shapes with n_layers, d_model and n_heads")
        if not any((self.budgets.flops, self.budgets.tokens_per_param, self.budgets.tokens)):
            raise UserError("budgets are empty; give budgets.flops, budgets.tokens_per_param or budgets.tokens")
        numbers = {f"budgets.{name}": getattr(self.budgets, name) for name in ("flops", "tokens_per_param", "tokens")}
        numbers["budgets.held_out.flops"] = tuple(held.flops for held in self.budgets.held_out)
        numbers |= {name: (getattr(self, name),) for name in ("flops_per_s", "usd_per_hour")}
        for name, values in numbers.items():
            for value in values:
                if value is not None and not 0 < value < math.inf:
                    raise UserError(f"{name} {value} must be positive and finite")
        if self.warmup_frac is not None and not 0 <= self.warmup_frac < 1:
            raise UserError(f"warmup_frac {self.warmup_frac} must lie in [0, 1)")
        if self.branches and self.warmup_frac is not None:
            raise UserError(
                "branches share their warm-up; drop warmup_frac, set optim.warmup_steps in the base config"
            )


def load_study(directory: str | Path) -> Study:
    """Return the study of a directory, from its study.yaml.

    Raises:
        UserError: no file, an unknown key (the nearest is named), a wrong type, or conflicting values.
    """
    path = Path(directory, "study.yaml")
    values = read_yaml(path)
    _refuse_unknown(values, Study, "")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, None)
    try:
        read = parser.instantiate(parser.parse_object(values))
    except ArgumentError as error:
        raise UserError(f"{path}: {wrong_value(error)}") from None
    study = Study(**{f.name: read[f.name] for f in dataclasses.fields(Study)})
    return dataclasses.replace(study, base=str(path.parent / study.base))


def _refuse_unknown(values: Any, kind: Any, prefix: str) -> None:
    """Raise UserError for a key that a dataclass, or one inside it, does not have."""
    if isinstance(kind, types.GenericAlias) and isinstance(values, list):
        for value in values:
            _refuse_unknown(value, typing.get_args(kind)[0], prefix)
    if not (dataclasses.is_dataclass(kind) and isinstance(values, dict)):
        return
    known = {f.name: f.type for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown key {prefix + str(key)!r}{nearest(str(key), known)}")
        _refuse_unknown(value, known[key], f"{prefix}{key}.")
