"""The training loop: one straight loop over batches, a compiled step, and a list of hooks."""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import jax
import numpy as np

from gptjax.config import Config, override
from gptjax.data.batches import Batches, training_examples
from gptjax.data.corpus import Corpus, load_corpus
from gptjax.errors import DONE, STOPPED, UserError
from gptjax.hooks import Account, Evaluate, Hook, Measure, Profile, Sample, Save, StepEnd, Verify, Watch, Write
from gptjax.hosts import check_same, global_batch, rows_of_this_host, together, writer_first
from gptjax.lifecycle.closing import LiveSampler, conclude
from gptjax.lifecycle.evaluation import make_evaluate
from gptjax.lifecycle.faults import StopSignal, Watchdog
from gptjax.lifecycle.goodput import DATA, STEPS, Attempt, spend_on, table_of
from gptjax.lifecycle.reference import attach_reference
from gptjax.lifecycle.report import Report
from gptjax.lifecycle.rollback import Rollback
from gptjax.lifecycle.rundir import RunLock, check_workdir, open_workdir, write_outcome
from gptjax.lifecycle.start import begin_or_resume, make_run, save
from gptjax.lifecycle.verification import make_verify
from gptjax.presets import peak_flops
from gptjax.sharding import make_mesh
from gptjax.spikes import was_taken
from gptjax.step import (
    Trainable,
    TrainState,
    count_trained,
    make_train_step,
    training_flops_per_token,
)


def train(cfg: Config, hooks: Sequence[Hook] = ()) -> int:
    """Train a model, or resume what the run's directory holds.

    Args:
        hooks: called after the trainer's own at every step.

    Returns:
        exit code: `errors.DONE` after the last step, `errors.STOPPED` when a signal came and everything is saved.

    Raises:
        UserError: the config, the corpus or the run's directory does not allow the run.
        Diverged: steps were skipped repeatedly, and rollbacks did not help.
    """
    limit_s = cfg.distributed.stall_timeout_s
    with Watchdog(limit_s) as watchdog, RunLock(cfg.workdir) as lock, Attempt(cfg.workdir) as attempt:
        corpus = read_corpus(cfg, watchdog)
        cfg = with_vocabulary(cfg, corpus)
        t = make_run(cfg, make_mesh(cfg.mesh.axes, slices=cfg.mesh.slices), corpus)
        rows, batches = batches_of_this_host(t, corpus)
        train_step, evaluate = make_train_step(t), make_evaluate(t, corpus)
        check_workdir(cfg)
        lock.acquire()
        attempt.begin()
        with spend_on("restore"):
            state, fixed = begin_or_resume(t, corpus)
        checkpoints = open_workdir(cfg)
        attach_reference(t, corpus, state)
        start, total, reason = int(state.step), cfg.train.total_steps, None
        attempt.resume(start)
        report = together(lambda: Report(t, corpus, start))
        sampler = LiveSampler(t, corpus)
        saving = partial(save, checkpoints, cfg, corpus, fixed)
        rollback = Rollback(t, corpus, checkpoints, attempt, start)
        called = [*make_hooks(t, attempt, report, evaluate, saving, sampler), Watch(watchdog), *hooks]
        incoming = batches.iterate(start, cfg.data.prefetch_batches, cfg.data.workers)
        watchdog.start_phase()
        attempt.clock.turn_to(STEPS)
        with checkpoints, StopSignal() as stop, closing(incoming):
            if start == 0:
                run_hooks(called, StepEnd(0, last=False, complete=False, state=state))
            for step in range(start + 1, total + 1):
                for hook in called:
                    hook.before_step(step)
                with spend_on(DATA):
                    batch = global_batch(next(incoming), rows, t.batch_sharding, cfg.train.batch_sequences)
                state, metrics = train_step(state, batch)
                complete = step == total
                reason = None if complete else ending_reason(called, step)
                last = complete or stop.after(step) or reason is not None
                state, noted = rollback.after(step, complete, state)
                run_hooks(called, StepEnd(step, last, complete, state, batch, metrics, noted))
                del batch  # it may lie in memory that the data workers share and that they free when they end
                if last:
                    break
            attempt.clock.turn_to("save")  # the one that is under way
        watchdog.pause()
        for hook in called:
            hook.close()
        attempt.clock.turn_to("sample")
        return finish(t, state, sampler, report, attempt, reason)


def ending_reason(hooks: Sequence[Hook], step: int) -> str | None:
    """Return why a hook ends the run after a step, None if none does; all of them are asked."""
    return next((reason for reason in [hook.ends_run(step) for hook in hooks] if reason is not None), None)


def finish(
    t: Trainable, state: TrainState, sampler: LiveSampler, report: Report, attempt: Attempt, reason: str | None
) -> int:
    """Record how a run has ended, print its conclusion, and return its exit code.

    Args:
        reason: why a hook ended it before its last step.
    """
    step, total = int(state.step), t.cfg.train.total_steps
    for line in table_of(attempt.totals(), len(attempt.earlier) + 1):
        report.say(line)
    if step < total:
        write_outcome(t.cfg.workdir, "stopped", step)
        is_saved = was_taken(jax.device_get(state.statistics), step)
        kept = "everything is saved" if is_saved else "all but the last steps, which were skipped, is saved"
        report.say(f"stopped at step {step} of {total}; {kept}: {reason or 'run again to resume'}")
        return STOPPED
    write_outcome(t.cfg.workdir, "done", total)
    conclude(t, state, sampler, report)
    return DONE


def read_corpus(cfg: Config, watchdog: Watchdog) -> Corpus:
    """Return the corpus, which the writer's process tokenizes first; each process is watched while it reads.

    Raises:
        UserError: the corpus cannot be read, or is another one on another process.
    """

    def load() -> Corpus:
        watchdog.start_phase()
        try:
            return load_corpus(cfg.data)
        finally:
            watchdog.pause()

    corpus = writer_first(load)
    check_same("the corpus (data.path and data.tokenizer)", corpus.fingerprint)
    watchdog.start_phase()
    return corpus


def batches_of_this_host(t: Trainable, corpus: Corpus) -> tuple[np.ndarray, Batches]:
    """Return the rows of the global batch that this host reads, and its part of each step's batch."""
    B, T = t.cfg.train.batch_sequences, t.cfg.model.context_length
    rows = rows_of_this_host(t.batch_sharding, (B, T))
    return rows, Batches(training_examples(corpus, t.cfg.data, T, B, t.cfg.seed), B, rows)


def make_hooks(
    t: Trainable,
    attempt: Attempt,
    report: Report,
    evaluate: Callable[[TrainState], dict[str, float]],
    saving: Callable[[TrainState, float | None], None],
    sampler: LiveSampler,
) -> list[Hook]:
    """Return the trainer's own hooks, in the order in which a step's values pass through them."""
    cfg, clock = t.cfg, attempt.clock
    tokens_per_step = cfg.train.batch_sequences * cfg.model.context_length
    called: list[Hook] = [Profile(cfg.run.profile_steps, os.path.join(cfg.workdir, "profile"))]
    if cfg.run.verify_interval_steps is not None:
        called.append(Verify(cfg.run.verify_interval_steps, clock, make_verify(t)))
    called += [
        Measure(cfg.train.log_interval_steps, clock, tokens_per_step, mfu_per_token_rate(t)),
        Evaluate(cfg.train.eval_interval_steps, clock, evaluate),
        Account(cfg.train.eval_interval_steps, attempt),
        Write(report),
        Save(cfg.checkpoint.save_interval_steps, clock, saving),
    ]
    if cfg.log.sample_tokens and jax.process_count() == 1:
        sample = partial(sampler.text, tokens=cfg.log.sample_tokens)
        called.append(Sample(cfg.train.eval_interval_steps, clock, sample, report))
    return called


def run_hooks(hooks: Sequence[Hook], end: StepEnd) -> None:
    """Call every hook after a step, in order."""
    for hook in hooks:
        hook.after_step(end)


def with_vocabulary(cfg: Config, corpus: Corpus) -> Config:
    """The config with the tokenizer's vocabulary filled in; raises UserError where the model's is too small."""
    size = cfg.model.vocab_size or corpus.tokenizer.vocab_size
    if size < corpus.tokenizer.vocab_size:
        raise UserError(f"model.vocab_size {size} is less than the tokenizer's {corpus.tokenizer.vocab_size}")
    return override(cfg, {"model.vocab_size": size})


def mfu_per_token_rate(t: Trainable) -> float | None:
    """Return the model FLOPs utilisation of one token a second; None where the devices' peak is unknown."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    teacher = None if t.teacher is None else t.teacher.cfg
    return training_flops_per_token(t.cfg, count_trained(t.cfg), teacher) / (peak * jax.device_count())
