"""The loop: read a batch, take a step, and now and then measure, save and say so."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from etils import epath
from tqdm import tqdm

from gptjax.checkpoint import Checkpoints, newest_readable
from gptjax.config import Config
from gptjax.configfile import config_from_dict, config_to_yaml, differing_keys, read_yaml
from gptjax.convert import initial_model, load
from gptjax.data.batches import Batches, training_examples, validation_batches
from gptjax.data.corpus import Corpus, Source, load_corpus
from gptjax.data.reading import readable
from gptjax.errors import DIVERGED, UserError
from gptjax.faults import StopSignal, Watchdog
from gptjax.generate import Sampling
from gptjax.hosts import global_batch, rows_of_this_host
from gptjax.metrics import make_trackers, plot_loss, read_metrics, write_whole
from gptjax.nn.transformer import count_params, flops_per_token
from gptjax.presets import peak_flops
from gptjax.sharding import make_mesh
from gptjax.step import Trainable, TrainState, init_state, make_eval_step, make_train_step, make_trainable
from gptjax.tokenizers import same_ids, tokenizer_from_dict

STOPPED = 75  # exit code of a run that a signal ended with everything saved (EX_TEMPFAIL of sysexits.h)


def train(cfg: Config) -> int:
    """Carry out a run, or what is left of it.

    Returns:
        exit code: 0 when the last step is done, 75 when a signal came and everything is saved.

    Raises:
        UserError: the config, the corpus or the run's directory does not allow it, or no step is finite any more.
    """
    corpus = load_corpus(cfg.data)
    cfg = with_vocabulary(cfg, corpus)
    t = make_trainable(cfg, make_mesh(cfg.mesh.axes, slices=cfg.mesh.slices))
    sizes = (cfg.model.context_length, cfg.train.batch_sequences)
    rows = rows_of_this_host(t.batch_sharding, sizes[::-1])
    batches = Batches(training_examples(corpus, cfg.data, *sizes, cfg.seed), sizes[1], rows)
    train_step, evaluate = make_train_step(t), make_evaluate(t, corpus)
    check_workdir(cfg)
    state = restore(t, corpus) or first_state(t, corpus)
    checkpoints = open_workdir(cfg)

    start, total = int(state.step), cfg.train.total_steps
    report = Report(t, corpus, start)
    incoming = batches.iterate(start, cfg.data.prefetch_batches, cfg.data.workers)
    with StopSignal() as stop, Watchdog(cfg.distributed.stall_timeout_s) as watchdog, closing(incoming):
        if start == 0:
            report.write(0, evaluate(state))
        for step in range(start + 1, total + 1):
            if step in cfg.profile_steps[:1]:
                jax.profiler.start_trace(os.path.join(cfg.workdir, "profile"))
            state, metrics = train_step(state, global_batch(next(incoming), rows, t.batch_sharding, sizes[1]))
            report.note(metrics)
            if step in cfg.profile_steps[-1:]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()

            last = step == total or stop.after(step)
            values = report.measure(step) if last or step % cfg.train.log_interval_steps == 0 else {}
            if step == total or step % cfg.train.eval_interval_steps == 0:
                values |= evaluate(state)
            if values:
                report.write(step, values)
            if last or step % cfg.checkpoint.save_interval_steps == 0:
                save(checkpoints, state, cfg, corpus, values.get("val/loss"))
            watchdog.step_done()
            if last:
                break
        checkpoints.close()
        report.close()
    if state.step < total:
        report.say(f"stopped at step {int(state.step)} of {total}; all is saved, and the same command goes on")
        return STOPPED
    conclude(t, report)
    return 0


def with_vocabulary(cfg: Config, corpus: Corpus) -> Config:
    """The config with the tokenizer's vocabulary filled in; raises UserError where the model's is too small."""
    size = cfg.model.vocab_size or corpus.tokenizer.vocab_size
    if size < corpus.tokenizer.vocab_size:
        raise UserError(f"model.vocab_size {size} is less than the tokenizer's {corpus.tokenizer.vocab_size}")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=size))


def make_evaluate(t: Trainable, corpus: Corpus):
    """state -> metrics of mean cross-entropy over the validation windows; of the average weights, if kept."""
    cfg, eval_step = t.cfg, make_eval_step(t)
    T, B = cfg.model.context_length, cfg.train.batch_sequences
    rows = rows_of_this_host(t.batch_sharding, (B, T))

    def batches_of(source: Source):
        return validation_batches(source.val, T, B, cfg.train.eval_sequences, rows, source.pack_length)

    for source in corpus.sources:
        batches_of(source)  # so that a corpus too short is refused before the first step

    def evaluate(state: TrainState) -> dict[str, float]:
        params = state.params if state.ema is None else state.ema
        losses = []
        for source in corpus.sources:
            sums = [eval_step(params, global_batch(b, rows, t.batch_sharding, B)) for b in batches_of(source)]
            loss, weight = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
            losses.append(float(loss / weight))
        return corpus.validation_metrics(losses)

    return evaluate


def check_workdir(cfg: Config) -> None:
    """Raise UserError where the run's directory belongs to a run of another config. Nothing is written."""
    workdir = epath.Path(cfg.workdir)
    with readable(cfg.workdir):
        workdir.exists()  # a bucket may be out of reach
    checkpoints = Checkpoints(cfg.workdir)
    saved = newest_readable(checkpoints, checkpoints.meta)
    checkpoints.close()
    metrics, path = workdir / "metrics.jsonl", workdir / "config.yaml"
    if saved is not None:
        earlier = config_from_dict(saved[1]["config"])
    elif path.exists() and metrics.exists() and metrics.stat().length:
        try:
            earlier = config_from_dict(read_yaml(path))
        except UserError as error:
            raise UserError(f"{path}: {error}; give another --workdir") from None
    else:
        return
    if keys := differing_keys(earlier, cfg):
        listed = ", ".join("{} ({} there, {} here)".format(key, *map(json.dumps, both)) for key, both in keys.items())
        hint = ", or --data.change_mixture true" if "data.mixture" in keys else ""
        raise UserError(f"{workdir} holds a run of another config: {listed}; give another --workdir{hint}")


def open_workdir(cfg: Config) -> Checkpoints:
    """The run's directory, made or found again; its checkpoints. Raises UserError where it cannot be written."""
    workdir = epath.Path(cfg.workdir)
    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_whole(workdir / "config.yaml", config_to_yaml(cfg))
            (workdir / "env.json").write_text(json.dumps(environment(), indent=1))
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror or error}; give another") from None
    return Checkpoints(cfg.workdir, cfg.checkpoint)


def environment() -> dict[str, Any]:
    """Versions, devices and the git commit, for a run's env.json."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "devices": [f"{d.device_kind} {d.id}" for d in jax.devices()],
        "processes": jax.process_count(),
        "git_commit": commit.stdout.strip() or None,
    }


def save(checkpoints: Checkpoints, state: TrainState, cfg: Config, corpus: Corpus, val_loss: float | None) -> None:
    """Begin to save a state, with all that is needed to go on from it or to sample."""
    meta = {
        "config": yaml.safe_load(config_to_yaml(cfg)),
        "tokenizer": corpus.tokenizer.to_dict(),
        "corpus": corpus.fingerprint,
        "val/loss": val_loss,
    }
    checkpoints.save(int(state.step), *for_disk(state), meta, val_loss)


def for_disk(state: TrainState) -> tuple[Any, TrainState]:
    """The weights to sample from (their average where there is one), and the rest of the state."""
    if state.ema is None:
        return state.params, state._replace(params=None)
    return state.ema, state._replace(ema=None)


def restore(t: Trainable, corpus: Corpus) -> TrainState | None:
    """The newest readable state of the run, on this mesh; None where nothing is saved yet."""
    checkpoints = Checkpoints(t.cfg.workdir)

    def read(step: int) -> TrainState:
        meta = checkpoints.meta(step)
        if not same_ids(tokenizer_from_dict(meta["tokenizer"]), corpus.tokenizer):
            raise UserError("the corpus has another tokenizer than this run began with; give another --workdir")
        if meta["corpus"] != corpus.fingerprint and not t.cfg.data.change_mixture:
            raise UserError("the corpus is not the one this run began with; give another --workdir")
        weights, rest = checkpoints.restore(step, *for_disk(t.state))
        return rest._replace(**{"params" if t.state.ema is None else "ema": weights})

    found = newest_readable(checkpoints, read)
    if found is not None:
        checkpoints.set_aside_after(found[0])
    checkpoints.close()
    if found is None:
        return None
    total = jax.device_put(np.int32(t.cfg.train.total_steps), t.state.total_steps.sharding)
    return found[1]._replace(total_steps=total)


def first_state(t: Trainable, corpus: Corpus) -> TrainState:
    """A new state, from random weights or from the weights of `init_from`."""
    if t.cfg.init_from is None:
        return init_state(t)
    model = initial_model(t.cfg.init_from, t.cfg.model, corpus.tokenizer)
    state = init_state(t)._replace(params=None, ema=None)  # the random weights make room
    params = model.read(t.state.params)
    return state._replace(params=params, ema=None if t.state.ema is None else jax.tree.map(jnp.copy, params))


class Report:
    """What a run says: metrics.jsonl and trackers, and a progress bar, or lines where there is no terminal."""

    def __init__(self, t: Trainable, corpus: Corpus, start_step: int):
        cfg = self.cfg = t.cfg
        self.speaks = jax.process_index() == 0
        self.tokens_per_step = cfg.train.batch_sequences * cfg.model.context_length
        peak = peak_flops(jax.devices()[0].device_kind)
        self.mfu_per_rate = None if peak is None else flops_per_token(cfg.model) / (peak * jax.device_count())
        plain = yaml.safe_load(config_to_yaml(cfg))
        names = (cfg.log.trackers, cfg.workdir, start_step, cfg.log.project, plain)
        self.trackers = make_trackers(*names) if self.speaks else []
        self.terminal = sys.stderr.isatty()
        total = cfg.train.total_steps
        self.say(
            f"{count_params(cfg.model)['total']:,} parameters, {corpus.train_tokens:,} training tokens, "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, run {cfg.workdir}"
            + (f", going on after step {start_step}" if start_step else "")
        )
        self.bar = tqdm(total=total, initial=start_step, unit="step", disable=not (self.terminal and self.speaks))
        self.unmeasured: list[dict[str, jax.Array]] = []
        self.measured_at = time.perf_counter()
        self.began_at, self.start_step = self.measured_at, start_step
        self.val_loss: float | None = None

    def note(self, metrics: dict[str, jax.Array]) -> None:
        """Keep a step's metrics for `measure`; nothing waits for the device."""
        self.unmeasured.append(metrics)

    def measure(self, step: int) -> dict[str, float]:
        """This step's metrics, and the speed since the last call; waits for the device.

        Raises:
            UserError: none of the steps since the last call had a finite gradient.
        """
        values = {name: float(value) for name, value in self.unmeasured[-1].items()}
        values["skipped"] = sum(float(metrics["skipped"]) for metrics in self.unmeasured)
        steps, now = len(self.unmeasured), time.perf_counter()
        if values["skipped"] == steps > 1:
            raise UserError(f"{DIVERGED} from step {step - steps + 1} to {step}; lower optim.peak_lr")
        values["step_time_s"] = (now - self.measured_at) / steps
        values["tokens_per_s"] = self.tokens_per_step / values["step_time_s"]
        if self.mfu_per_rate is not None:
            values["mfu"] = values["tokens_per_s"] * self.mfu_per_rate
        self.unmeasured = []
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        """Send a step's values to every tracker and to the screen."""
        if "val/loss" in values:
            self.val_loss = values["val/loss"]
        for tracker in self.trackers:
            tracker.write(step, {"tokens": step * self.tokens_per_step, **values})
        shown = {"loss": values.get("train/loss"), "val": self.val_loss, "tok/s": values.get("tokens_per_s")}
        texts = {k: f"{v:,.0f}" if k == "tok/s" else f"{v:.4f}" for k, v in shown.items() if v is not None}
        self.bar.set_postfix(texts, refresh=False)
        self.bar.update(step - self.bar.n)
        if not self.terminal:
            done, total = step - self.start_step, self.cfg.train.total_steps
            left = (time.perf_counter() - self.began_at) / done * (total - step) if done else None
            texts |= {} if left is None else {"left": f"{int(left) // 60}:{int(left) % 60:02d}"}
            self.say(f"step {step}/{total}  " + "  ".join(f"{k} {v}" for k, v in texts.items()))
        self.measured_at = time.perf_counter()  # evaluating is not stepping

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.speaks:
            print(text, flush=True)

    def close(self) -> None:
        """Let go of bar and trackers; draw the loss."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        if self.speaks:
            plot_loss(self.cfg.workdir)


def conclude(t: Trainable, report: Report) -> None:
    """Print the final losses, a sample, and the command that samples."""
    if not report.speaks:
        return
    workdir = t.cfg.workdir
    last = {name: value for row in read_metrics(workdir) for name, value in row.items()}
    final = [f"{name} {last[name]:.4f}" for name in ("train/loss", "val/loss") if name in last]
    report.say("  ".join([f"done: {last['step']} steps", *final]))
    if jax.process_count() == 1:
        sample = load(workdir).complete([""], 700, Sampling(temperature=0.8), seed=t.cfg.seed)[0]
        report.say(f"\n{sample.text}\n")
    drawn = f"; the loss is drawn in {workdir}/loss.png" if (epath.Path(workdir) / "loss.png").exists() else ""
    report.say(f"python sample.py {workdir} --prompt '...'    samples more{drawn}")
