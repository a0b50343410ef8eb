"""A study's rungs: exact configs with whole numbers of steps, their cost, and warnings about them."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from gptjax.apps.scaling.study import ModelShape, Study
from gptjax.config import CheckpointConfig, Config, ModelConfig, free_keys, plain_values
from gptjax.configfile import load_config
from gptjax.configversions import original_key
from gptjax.data.corpus import Corpus, load_corpus
from gptjax.errors import UserError
from gptjax.nn.transformer import STACKS, abstract_model, count_params, flops_per_token
from gptjax.shell.display import count, duration, plural, power, significant, table
from gptjax.trainer import with_vocabulary

USUAL_RATIO = 20  # tokens a weight at the optimum, before a study knows better (Hoffmann et al. 2022, table 3)
LONG_WARMUP = 0.1  # share of the steps; long warm-ups of short runs bend the law (Porian et al. 2024, section 3.2)


@dataclass(frozen=True)
class Rung:
    """One run of a study.

    Attributes:
        id: hash of the resolved config and of the data.
        config: the resolved config, without the run's directory.
        fingerprint: of the corpus, the older of its two, so that a study that an earlier version began keeps its ids.
        params: weights by convention: `total`; `matmul`, those that multiply (blocks and head); `blocks`.
        flops: of training: steps times FLOPs a token (forward and backward, with attention).
        budget_flops: the budget; `flops` differs a little, since steps are whole.
        epochs: passes over the corpus.
        held_out: no fit may touch it.
    """

    id: str
    config: Config
    fingerprint: str
    params: dict[str, int]
    flops: float
    budget_flops: float
    epochs: float
    held_out: bool

    @property
    def tokens(self) -> int:
        """Return the number of tokens trained on."""
        return self.config.train.total_steps * _tokens_per_step(self.config)

    @property
    def cooldown_step(self) -> int:
        """Return the last step that a wsd schedule takes at its peak; a longer rung of its kind can resume from
        there.
        """
        return int(self.config.train.total_steps * (1 - self.config.optim.decay_frac))

    @property
    def kind(self) -> Config:
        """Return the config without the length of its training: equal for rungs of which one can branch off the
        other.
        """
        train = dataclasses.replace(self.config.train, total_steps=1, eval_interval_steps=1)
        return dataclasses.replace(self.config, train=train, checkpoint=CheckpointConfig())

    @property
    def name(self) -> str:
        """Return shape and tokens, for a reader."""
        m = self.config.model
        return f"{m.n_layers}x{m.d_model} {count(self.tokens)} tokens"


def make_rungs(study: Study) -> list[Rung]:
    """Return the rungs of a study by rising FLOPs: the longest are last.

    Raises:
        UserError: a base config, shape or corpus that is not possible, equal rungs, or a study beyond its limit.
    """
    base = load_config([study.base])
    if study.branches and base.optim.schedule != "wsd":
        raise UserError(f"branches need optim.schedule wsd; the base config has {base.optim.schedule}")
    corpus = load_corpus(base.data)
    base = with_vocabulary(base, corpus)
    sweeps = study.sweeps
    rates = sweeps.peak_lr or (base.optim.peak_lr,)
    batches = sweeps.batch_sequences or (base.train.batch_sequences,)
    variants = list(itertools.product(rates, batches, sweeps.seeds or (base.seed,)))
    rungs: dict[str, Rung] = {}
    points = [(shape, flops, False) for shape in study.ladder for flops in _budgets_flops(study, base, shape)]
    points += [(held.shape, held.flops, True) for held in study.budgets.held_out]
    for point, varied in itertools.product(points, variants):
        rung = _make_rung(study, base, corpus, point, varied)
        if rung.id in rungs:
            raise UserError(f"two rungs are the same: {rung.name}; remove one from ladder, budgets or sweeps")
        rungs[rung.id] = rung
    total = sum(rung.flops for rung in rungs.values())
    limit = study.limits.total_flops
    if limit is not None and total > limit:
        raise UserError(f"the study needs {total:.3g} FLOPs, over limits.total_flops {limit:.3g}; drop rungs")
    return sorted(rungs.values(), key=lambda rung: (rung.flops, rung.id))


def with_shape(base: Config, shape: ModelShape) -> Config:
    """Return the config with a shape of the ladder."""
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **dataclasses.asdict(shape)))


@cache
def conventions(model: ModelConfig) -> dict[str, int]:
    """Return a model's number of weights by convention: total, matmul (blocks and head), blocks.

    Of experts, the latter two count those that a token passes.
    """
    counts = count_params(model, active=True)
    head = model.d_model * model.vocab_size
    return {"total": count_params(model)["total"], "matmul": counts["blocks"] + head, "blocks": counts["blocks"]}


@cache
def groups(model: ModelConfig) -> dict[str, int]:
    """Return a model's number of weights by kind: embedding, position, head (0 where tied), blocks, norms."""
    counts = dict.fromkeys(("embedding", "position", "head", "blocks", "norms"), 0)
    whole = count_params(model)
    _, params, metadata = abstract_model(model)
    for names, group in {"embed": "embedding", "positions": "position", "head": "head", "blocks": "blocks"}.items():
        counts[group] = whole.get(names, 0)
    for path in metadata:
        if any("norm" in name for name in path):
            leaf = params
            for name in path:
                leaf = leaf[name]
            counts["norms"] += math.prod(leaf.shape)
            counts["blocks"] -= math.prod(leaf.shape) if path[0] in STACKS else 0
    return counts


_flops_per_token = cache(flops_per_token)


def _tokens_per_step(config: Config) -> int:
    return config.train.batch_sequences * config.model.context_length


def _budgets_flops(study: Study, base: Config, shape: ModelShape) -> Iterator[float]:
    model = with_shape(base, shape).model
    yield from study.budgets.flops
    for ratio in study.budgets.tokens_per_param:
        yield ratio * conventions(model)["matmul"] * _flops_per_token(model)
    for tokens in study.budgets.tokens:
        yield tokens * _flops_per_token(model)


def _make_rung(study: Study, base: Config, corpus: Corpus, point: tuple, varied: tuple[float, int, int]) -> Rung:
    (shape, flops, held_out), (lr, batch, seed) = point, varied
    config = with_shape(base, shape)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_sequences=batch))
    per_step = _flops_per_token(config.model) * _tokens_per_step(config)
    steps = max(1, round(flops / per_step))
    warmup = config.optim.warmup_steps if study.warmup_frac is None else round(study.warmup_frac * steps)
    config = dataclasses.replace(
        config,
        seed=seed,
        workdir=None,
        optim=dataclasses.replace(config.optim, peak_lr=lr, warmup_steps=warmup),
        train=dataclasses.replace(config.train, total_steps=steps, eval_interval_steps=steps),
        checkpoint=dataclasses.replace(config.checkpoint, keep_last=1, keep_best=False),
    )
    if study.branches:
        cooldown = max(1, int(steps * (1 - config.optim.decay_frac)))
        kept = dataclasses.replace(config.checkpoint, save_interval_steps=cooldown, keep_last=2)
        config = dataclasses.replace(config, checkpoint=kept)
    return Rung(
        id=_rung_id(config, corpus.older_fingerprint),
        config=config,
        fingerprint=corpus.older_fingerprint,
        params=conventions(config.model),
        flops=steps * per_step,
        budget_flops=flops,
        epochs=steps * _tokens_per_step(config) / corpus.train_tokens,
        held_out=held_out,
    )


# Fields that decide how a rung runs, but not its result.
NOT_IN_ID = {*free_keys(Config), "data.path"} - {"init_from", "train.total_steps", "train.eval_sequences"}


def _rung_id(config: Config, fingerprint: str) -> str:
    """Return the hash of what decides a rung's result: not where its files lie, nor on how many devices it runs.

    A value that is the default's does not enter it, so that ids outlive a new key.
    """
    usual = plain_values(Config())
    decides = {
        original_key(key): value
        for key, value in plain_values(config).items()
        if value != usual[key] and not any(f"{key}.".startswith(f"{free}.") for free in NOT_IN_ID)
    }
    return hashlib.sha256(f"{json.dumps(decides, sort_keys=True)}{fingerprint}".encode()).hexdigest()[:12]


def warnings(study: Study, rungs: list[Rung]) -> list[str]:
    """Return what is likely to spoil the law, before anything has run."""
    found = []
    fitted = [rung for rung in rungs if not rung.held_out]
    for rung in rungs:
        steps, where = rung.config.train.total_steps, f"{rung.id} ({rung.name})"
        if steps < study.limits.min_steps:
            found.append(f"{where}: {steps} steps are few; use smaller batches or larger budgets")
        if (share := rung.config.optim.warmup_steps / steps) > LONG_WARMUP:
            found.append(f"{where}: warm-up takes {share:.0%} of the steps; make it shorter")
        if rung.epochs > study.limits.epochs:
            found.append(f"{where}: {rung.epochs:.1f} epochs; repeated data is worth less; add more")
        if abs(rung.flops / rung.budget_flops - 1) > 0.02:
            found.append(f"{where}: whole steps miss the budget by {rung.flops / rung.budget_flops - 1:+.1%}")
    if fitted[-1].flops < 10 * fitted[0].flops:
        found.append("budgets span less than a decade of FLOPs; exponents will be uncertain")
    for flops in study.budgets.flops:
        ratios = [r.tokens / r.params["matmul"] for r in fitted if r.budget_flops == flops]
        if not min(ratios) < USUAL_RATIO < max(ratios):
            spread = f"{power(flops)} FLOPs: {significant(min(ratios))} to {significant(max(ratios))} tokens a weight"
            size = "larger" if min(ratios) >= USUAL_RATIO else "smaller"
            found.append(f"{spread} do not straddle the usual {USUAL_RATIO}; add {size} shapes")
    return found


def plan_rows(rungs: list[Rung]) -> list[dict[str, Any]]:
    """Return each rung as plain values, for plan.json and `plan --json`."""
    rows = []
    for rung in rungs:
        model, train = rung.config.model, rung.config.train
        row = {"id": rung.id, "n_layers": model.n_layers, "d_model": model.d_model, "n_heads": model.n_heads}
        row |= {"params": rung.params, "groups": groups(model), "steps": train.total_steps, "tokens": rung.tokens}
        row |= {"flops": rung.flops, "flops_6nd": {name: 6 * N * rung.tokens for name, N in rung.params.items()}}
        row |= {"peak_lr": rung.config.optim.peak_lr, "batch_sequences": train.batch_sequences}
        rows.append(row | {"seed": rung.config.seed, "epochs": rung.epochs, "held_out": rung.held_out})
    return rows


def _cells(rung: Rung) -> list[str]:
    """Return a rung's row of the table: its sizes, and what it spends."""
    model, N = rung.config.model, rung.params
    return [
        rung.id,
        f"{model.n_layers}x{model.d_model}",
        *(count(N[name], 4) for name in ("matmul", "blocks", "total")),
        f"{rung.config.train.total_steps:,}",
        count(rung.tokens),
        power(rung.flops),
        f"{rung.tokens / N['matmul']:,.1f}",
        f"{rung.epochs:.2f}",
        "held out" if rung.held_out else "",
    ]


def describe_plan(
    study: Study, rungs: list[Rung], seconds: dict[str, float] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return a study's rungs with parameters, steps and FLOPs; hours and cost where they are measured or stated.

    Args:
        seconds: of a step, by `key_of`; None: the hours follow from the study's flops_per_s.
    """
    rows = plan_rows(rungs)
    lines = table(
        [_cells(rung) for rung in rungs],
        ("id", "shape", "params", "blocks", "total", "steps", "tokens", "FLOPs", "tok/param", "epochs", ""),
        left=(0, 1, -1),
    )
    flops = sum(rung.flops for rung in rungs)
    found = warnings(study, rungs)
    hours = None if study.flops_per_s is None else flops / study.flops_per_s / 3600
    if seconds is not None:
        hours = sum(steps_to_take(study, rung, rungs) * seconds[key_of(rung.config)] for rung in rungs) / 3600
    usd = None if hours is None or study.usd_per_hour is None else hours * study.usd_per_hour
    lines.append(f"{plural(len(rungs), 'rung')}, {power(flops)} FLOPs")
    measured = "" if seconds is None else " by the probe"
    lines[-1] += "" if hours is None else f", {duration(3600 * hours)}{measured}"
    lines[-1] += "" if usd is None else f", {usd:.2f} USD"
    if study.branches:
        share = 1 - sum(steps_to_take(study, r, rungs) * r.flops / r.config.train.total_steps for r in rungs) / flops
        lines.append(f"branches spare {share:.0%} of these FLOPs")
    lines += [f"warning: {warning}" for warning in found]
    return {"rungs": rows, "flops": flops, "hours": hours, "usd": usd, "warnings": found}, lines


def trunk_of(rung: Rung, rungs: list[Rung]) -> Rung | None:
    """Return the longest of the shorter rungs of the same kind, where a branch begins; None for the shortest."""
    steps = rung.config.train.total_steps
    shorter = [r for r in rungs if r.config.train.total_steps < steps and r.kind == rung.kind]
    return max(shorter, key=lambda r: r.config.train.total_steps, default=None)


def steps_to_take(study: Study, rung: Rung, rungs: list[Rung]) -> int:
    """Return a rung's own steps: all of them, or those after the point where it leaves its trunk."""
    trunk = trunk_of(rung, rungs) if study.branches else None
    return rung.config.train.total_steps - (trunk.cooldown_step if trunk else 0)


def key_of(config: Config) -> str:
    """Return what decides the duration of a step, as the key of probe.json."""
    m = config.model
    return f"{m.n_layers}x{m.d_model}x{m.n_heads} {config.train.batch_sequences}x{m.context_length}"
