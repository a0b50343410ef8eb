"""Sample from the live weights, and print the conclusion of a finished run."""

import jax
from etils import epath

from gptjax.data.corpus import Corpus
from gptjax.generate import LanguageModel, Sampling
from gptjax.metrics import read_metrics
from gptjax.paths import shell
from gptjax.report import Report, attempt
from gptjax.step import Trainable, TrainState

CONCLUDING_TOKENS = 700


def sample_text(t: Trainable, state: TrainState, corpus: Corpus, tokens: int) -> str:
    """Sample `tokens` tokens without a prompt from the live weights (their average, if kept), on one device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = jax.device_put(state.params if state.ema is None else state.ema, here)
    model = LanguageModel(t.cfg.model, weights, corpus.tokenizer)
    return model.complete([""], tokens, Sampling(temperature=0.8), seed=t.cfg.seed)[0].text


def conclude(t: Trainable, state: TrainState, corpus: Corpus, report: Report) -> None:
    """Print the final losses, a sample of the live weights, and the command that samples.

    The run is already complete, so an error here is printed as a note and not raised.
    """
    if not report.speaks:
        return
    attempt("reading the final losses", lambda: _say_losses(t, report))
    if jax.process_count() == 1:
        attempt("sampling", lambda: _say_sample(t, state, corpus, report))
    attempt("printing the command that samples", lambda: _say_command(t.cfg.workdir, report))


def _say_losses(t: Trainable, report: Report) -> None:
    last = {name: value for row in read_metrics(t.cfg.workdir) for name, value in row.items()}
    final = [f"{name} {last[name]:.4f}" for name in ("train/loss", "val/loss") if name in last]
    report.say("  ".join([f"done: {t.cfg.train.total_steps} steps", *final]))


def _say_sample(t: Trainable, state: TrainState, corpus: Corpus, report: Report) -> None:
    text = sample_text(t, state, corpus, CONCLUDING_TOKENS)
    report.keep_sample(int(state.step), text)
    report.say(f"\n{text}\n")


def _say_command(workdir: str, report: Report) -> None:
    picture = epath.Path(workdir) / "loss.png"
    drawn = f"; the loss is drawn in {picture}" if picture.exists() else ""
    report.say(f"{shell('python', 'sample.py', workdir)} --prompt '...'    samples more{drawn}")
