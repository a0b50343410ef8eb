"""Restore, initialise and save the train state: from a checkpoint, another model's weights, or random ones."""

import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh

from gptjax.checkpoint import Checkpoints, Damaged, read_newest
from gptjax.config import Config
from gptjax.configfile import config_to_yaml
from gptjax.convert import Base, check_base, check_teacher, initial_model, read_base, read_teacher, teacher_config
from gptjax.data.corpus import Corpus
from gptjax.errors import UserError
from gptjax.fingerprint import hash_tree
from gptjax.nn.adapters import ADAPTER, without_adapter
from gptjax.nn.transformer import Params
from gptjax.objectives import TEACHER, without_teacher
from gptjax.optim import learning_rate
from gptjax.spikes import STATISTICS
from gptjax.step import Trainable, TrainState, init_state, make_trainable
from gptjax.tokenizers import same_ids, tokenizer_from_dict


class Fixed(NamedTuple):
    """The models that a run reads beside its own weights and does not change; a checkpoint names them.

    Attributes:
        base: that the run's adapters belong to; None without adapters.
        teacher: that the run learns from; None without one.
    """

    base: Base | None = None
    teacher: Base | None = None

    @property
    def facts(self) -> dict[str, dict[str, str]]:
        """What a checkpoint says of them, by the names of the fields."""
        return {name: model.facts for name, model in self._asdict().items() if model is not None}

    @property
    def params(self) -> Params:
        """Their weights, as a run's state holds them."""
        base = {} if self.base is None else self.base.params
        return base if self.teacher is None else {**base, TEACHER: self.teacher.params}


def make_run(cfg: Config, mesh: Mesh, corpus: Corpus) -> Trainable:
    """Return the shapes and shardings of a run, with the model that it learns from where its config names one.

    Raises:
        UserError: as `step.make_trainable` and `convert.teacher_config`.
    """
    return make_trainable(cfg, mesh, teacher_config(cfg, corpus.tokenizer))


def save(
    checkpoints: Checkpoints,
    cfg: Config,
    corpus: Corpus,
    fixed: Fixed,
    state: TrainState,
    val_loss: float | None,
) -> None:
    """Start to save a state with all that is needed to resume from it or to sample.

    Of a model with adapters, these alone are written; the checkpoint says which base they belong to, and which
    teacher the run has.
    """
    meta = {
        "config": yaml.safe_load(config_to_yaml(cfg)),
        "tokenizer": corpus.tokenizer.to_dict(),
        "corpus": corpus.fingerprint,
        "val/loss": val_loss,
        **fixed.facts,
    }
    meta["statistics"] = [float(value) for value in jax.device_get(state.statistics)]
    params, rest = for_disk(state)
    meta["weights_hash"] = int(hash_tree(params))
    checkpoints.save(int(state.step), params, rest, meta, val_loss)


class Rest(NamedTuple):
    """The rest of a state in a checkpoint. Its fields are those of the first versions, whose checkpoints are read."""

    step: jax.Array
    total_steps: jax.Array
    params: Params | None
    opt_state: Any
    ema: Params | None


def for_disk(state: TrainState) -> tuple[Any, Rest]:
    """Return the weights to sample from (their moving average, if kept), and the rest of the state.

    The statistics are plain numbers in the checkpoint's meta.

    Where there are adapters, the weights are these alone.
    """
    own = without_teacher(state.params)
    params = {ADAPTER: own[ADAPTER]} if ADAPTER in own else own
    kept = (state.step, state.total_steps)
    if state.ema is None:
        return params, Rest(*kept, None, state.opt_state, None)
    return state.ema, Rest(*kept, params, state.opt_state, None)


def restore(t: Trainable, corpus: Corpus, fixed: Fixed) -> TrainState | None:
    """Return the newest undamaged state of the run, on this mesh; None if nothing is saved."""
    checkpoints = Checkpoints(t.cfg.workdir)

    def read(step: int) -> TrainState:
        meta = checkpoints.meta(step)
        if not same_ids(tokenizer_from_dict(meta["tokenizer"]), corpus.tokenizer):
            raise UserError(
                "the corpus has another tokenizer than this run's checkpoint; use that one, or another --workdir"
            )
        followed = len(meta["config"]["data"].get("mixture", [])) if t.cfg.follow else None
        if not corpus.first(followed).is_that_of(meta["corpus"]) and not t.cfg.data.change_mixture:
            raise UserError(
                "the corpus is not the one that this run was trained on; use that corpus, or another --workdir"
            )
        if fixed.base is not None:
            check_base(meta["base"], fixed.base.facts, t.cfg.workdir)
        if fixed.teacher is not None:
            check_teacher(meta["teacher"], fixed.teacher.facts, t.cfg.workdir)
        weights, rest = checkpoints.restore(step, *for_disk(t.state))
        if meta.get("weights_hash") not in (None, int(hash_tree(weights))):
            raise Damaged("the weights are not those that the device held when it was written")
        rest = rest._replace(**{"params" if t.state.ema is None else "ema": weights})
        statistics = np.array(meta.get("statistics", []), np.float32)
        if len(statistics) != STATISTICS:  # of an earlier version
            statistics = np.zeros(STATISTICS, np.float32)
        state = TrainState(*rest, jax.device_put(statistics, t.state.statistics.sharding))
        return state._replace(params={**fixed.params, **state.params})

    found = read_newest(checkpoints, read)
    if found is not None:
        checkpoints.set_aside_after(found[0])
    checkpoints.close()
    if found is None:
        return None
    warn_of_another_rate(t.cfg, found[0], int(found[1].total_steps))
    total = jax.device_put(np.int32(t.cfg.train.total_steps), t.state.total_steps.sharding)
    return found[1]._replace(total_steps=total)


def warn_of_another_rate(cfg: Config, step: int, earlier_total: int) -> None:
    """Warn if a resume with another train.total_steps changes the learning rate abruptly.

    With schedule wsd it does not before the decay starts; after that the rate would rise again or drop.
    """
    totals = (earlier_total, cfg.train.total_steps)
    before, after = (float(learning_rate(cfg.optim, jnp.int32(step), jnp.int32(total))) for total in totals)
    if jax.process_index() == 0 and not math.isclose(before, after, rel_tol=0.01):
        print(
            f"warning: train.total_steps {totals[1]} instead of {totals[0]} moves the learning rate at step {step} "
            f"from {before:.3g} to {after:.3g}; to keep it, leave train.total_steps as it was, or resume from a "
            "checkpoint before the decay (optim.schedule wsd)",
            file=sys.stderr,
        )


def begin_or_resume(t: Trainable, corpus: Corpus) -> tuple[TrainState, Fixed]:
    """Return the run's newest state, or that before the first step; and the models that it does not change.

    Raises:
        UserError: the data do not belong to the objective or to the checkpoint, or `init_from` or `distill.teacher`
            cannot be used.
    """
    check_pairs(t, corpus)
    fixed = read_fixed(t, corpus)
    return restore(t, corpus, fixed) or first_state(t, corpus, fixed), fixed


def read_fixed(t: Trainable, corpus: Corpus) -> Fixed:
    """Return the base of a run's adapters and its teacher, where it has them.

    Raises:
        UserError: as `read_base_of_run`.
    """
    teacher = None
    if t.teacher is not None:
        teacher = read_teacher(t.cfg.distill.teacher, t.state.params[TEACHER])
    return Fixed(read_base_of_run(t, corpus), teacher)


def check_pairs(t: Trainable, corpus: Corpus) -> None:
    """Raise UserError where the data's rows come in other groups than the objective takes, or have no reference."""
    name, wanted = t.cfg.train.objective, "reference" in t.objective.arrays
    if wanted and t.cfg.init_from is None:
        raise UserError(
            f"train.objective {name} needs init_from: the model that training starts from is the reference"
        )
    for source in corpus.sources:
        group = getattr(source.train, "group_rows", 1)
        if wanted and not hasattr(source.train, "reference"):
            raise UserError(f"train.objective {name} learns from pairs; set data.kind preferences")
        if group > 1 and group != t.objective.group_rows:
            raise UserError(
                f"data.kind {t.cfg.data.kind} gives rows in groups of {group}, and train.objective {name} does not "
                "take them; set train.objective dpo"
            )


def read_base_of_run(t: Trainable, corpus: Corpus) -> Base | None:
    """Return the model of `init_from` in the form in which the run holds it; None for a run without adapters.

    Raises:
        UserError: there is no such model, or it has another shape or tokenizer.
    """
    cfg = t.cfg
    if not cfg.lora.rank:
        return None
    if cfg.init_from is None:
        raise UserError(
            f"lora.rank {cfg.lora.rank} needs init_from, the model that the adapters belong to; give it, or set "
            "lora.rank to 0"
        )
    own = without_adapter(without_teacher(t.state.params))
    return read_base(cfg, corpus.tokenizer, own, t.metadata)


def first_state(t: Trainable, corpus: Corpus, fixed: Fixed) -> TrainState:
    """Return a new state, with random weights or those of `init_from`; adapters start without effect.

    Args:
        fixed: a base that is a run with the same adapters brings these along.
    """
    base = fixed.base
    taught = fixed.params.get(TEACHER)
    if base is not None:
        state = init_state(t, base.params, taught)
        if base.adapter is None:
            return state
        adapters = base.adapter({ADAPTER: t.state.params[ADAPTER]})
        ema = None if t.state.ema is None else jax.tree.map(jnp.copy, adapters)
        return state._replace(params={**state.params, **adapters}, ema=ema)
    if t.cfg.init_from is None:
        return init_state(t, teacher=taught)
    model = initial_model(t.cfg.init_from, t.cfg.model, corpus.tokenizer)
    return init_state(t, model.read(without_teacher(t.state.params)), taught)
