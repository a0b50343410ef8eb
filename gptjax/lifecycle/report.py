"""Report the progress of a run: metrics.jsonl, trackers, and a progress bar or lines."""

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import jax
import yaml
from etils import epath
from tqdm import tqdm

from gptjax.configfile import config_to_yaml
from gptjax.data.corpus import Corpus
from gptjax.hosts import is_writer
from gptjax.metrics import append_record, make_trackers, plot_loss
from gptjax.nn.transformer import count_params
from gptjax.shell.console import LONGEST_REASON, one_line
from gptjax.step import Trainable, count_trained

SAMPLE_CHARACTERS = 400  # of a sample in samples.jsonl


class Report:
    """The output of a run: metrics.jsonl, trackers, and a progress bar, or lines if there is no terminal."""

    def __init__(self, t: Trainable, corpus: Corpus, start_step: int):
        cfg = self.cfg = t.cfg
        self.speaks = is_writer()
        self.tokens_per_step = cfg.train.batch_sequences * cfg.model.context_length
        plain = yaml.safe_load(config_to_yaml(cfg))
        names = (cfg.log.trackers, cfg.workdir, start_step, cfg.log.project, plain)
        self.trackers = make_trackers(*names) if self.speaks else []
        self.terminal = sys.stderr.isatty()
        total = cfg.train.total_steps
        size, trained = count_params(cfg.model)["total"], count_trained(cfg).trained
        active = count_params(cfg.model, active=True)["total"]
        passed = f" ({active:,} active for a token)" if active < size else ""
        adapted = f" and {trained:,} in adapters ({trained / size:.2%})" if cfg.lora.rank else ""
        self.say(
            f"{size:,} parameters{passed}{adapted}, {corpus.train_tokens:,} training tokens, "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, run {cfg.workdir}"
            + (f", resuming after step {start_step}" if start_step else "")
        )
        for note in corpus.notes:
            self.say(f"note: {note}")
        self.bar = tqdm(total=total, initial=start_step, unit="step", disable=not (self.terminal and self.speaks))
        self.began_at, self.start_step = time.perf_counter(), start_step
        self.val_loss: float | None = None
        if 0 < start_step < total and self.speaks:
            resumed = {"step": start_step, "event": "resume", "time": datetime.now(UTC).isoformat(timespec="seconds")}
            append_record(epath.Path(cfg.workdir) / "events.jsonl", resumed)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write a step's values to every tracker and to the terminal."""
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

    def keep_sample(self, step: int, text: str) -> None:
        """Add the start of a sample to samples.jsonl, and remove the samples that a resume has discarded."""
        row = {"step": step, "tokens": step * self.tokens_per_step, "text": text[:SAMPLE_CHARACTERS]}
        append_record(epath.Path(self.cfg.workdir) / "samples.jsonl", row, kept_until_step=step - 1)

    def say(self, text: str) -> None:
        """Print a line; one process does so for all."""
        if self.speaks:
            print(text, flush=True)

    def close(self) -> None:
        """Close the bar and the trackers, and draw the loss."""
        self.bar.close()
        for tracker in self.trackers:
            attempt(f"closing {type(tracker).__name__}", tracker.close)
        if self.speaks:
            attempt("drawing loss.png", lambda: plot_loss(self.cfg.workdir))


def attempt(what: str, call: Callable[[], Any]) -> None:
    """Call a function that a finished run does not depend on; if it raises, print a note.

    Args:
        what: what the call does, for the note.
    """
    try:
        call()
    except Exception as error:  # such as a full disk, or a tracker's server that is down
        reason = f"{type(error).__name__}: {one_line(str(error), LONGEST_REASON)}"
        print(f"note: {what} failed ({reason}); the run is done and its checkpoints are complete", file=sys.stderr)
