"""Sample from the live weights, and print the conclusion of a finished run."""

import jax
from etils import epath

from gptjax.data.corpus import Corpus
from gptjax.generate import LanguageModel, Sampling
from gptjax.lifecycle.report import Report, attempt
from gptjax.metrics import read_metrics
from gptjax.nn.adapters import join_adapter
from gptjax.objectives import without_teacher
from gptjax.shell.paths import shell
from gptjax.step import Trainable, TrainState

CONCLUDING_TOKENS = 700


class LiveSampler:
    """Samples without a prompt from a run's weights (their average, if kept), where these lie on its devices.

    Its programs compile once, at the first sample.
    """

    def __init__(self, t: Trainable, corpus: Corpus):
        self.t, self.corpus = t, corpus
        self.model: LanguageModel | None = None

    def text(self, state: TrainState, tokens: int) -> str:
        """Return a text of so many tokens."""
        cfg, mesh = self.t.cfg, self.t.mesh
        weights = join_adapter(without_teacher(state.averaged), cfg.lora)
        if self.model is None:
            self.model = LanguageModel(cfg.model, weights, self.corpus.tokenizer, mesh if mesh.size > 1 else None)
        else:
            self.model.engine.load(weights)
        return self.model.complete([""], tokens, Sampling(temperature=0.8), seed=cfg.seed)[0].text


def conclude(t: Trainable, state: TrainState, sampler: LiveSampler, report: Report) -> None:
    """Print the final losses, a sample of the live weights, and the command that samples.

    The run is already complete, so an error here is printed as a note and not raised.
    """
    if not report.speaks:
        return
    attempt("reading the final losses", lambda: _say_losses(t, report))
    if jax.process_count() == 1:
        attempt("sampling", lambda: _say_sample(state, sampler, report))
    attempt("printing the command that samples", lambda: _say_command(t.cfg.workdir, report))


def _say_losses(t: Trainable, report: Report) -> None:
    last = {name: value for row in read_metrics(t.cfg.workdir) for name, value in row.items()}
    final = [f"{name} {last[name]:.4f}" for name in ("train/loss", "val/loss") if name in last]
    report.say("  ".join([f"done: {t.cfg.train.total_steps} steps", *final]))
    if t.cfg.init_from is not None:
        for line in changes_by_source(read_metrics(t.cfg.workdir)):
            report.say(line)


def changes_by_source(rows: list[dict[str, float]]) -> list[str]:
    """Return a line for each source of a mixture: its validation loss before the first step and after the last.

    Of a model that is taken on to new data, the line of the old data says what it has forgotten.
    """
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("val/loss/"))
    lines = []
    for name in names:
        values = [row[name] for row in rows if name in row]
        change = values[-1] - values[0]
        lines.append(f"{name} {values[0]:.4f} before, {values[-1]:.4f} after ({change:+.4f})")
    return lines


def _say_sample(state: TrainState, sampler: LiveSampler, report: Report) -> None:
    text = sampler.text(state, CONCLUDING_TOKENS)
    report.keep_sample(int(state.step), text)
    report.say(f"\n{text}\n")


def _say_command(workdir: str, report: Report) -> None:
    picture = epath.Path(workdir) / "loss.png"
    drawn = f"; the loss is drawn in {picture}" if picture.exists() else ""
    report.say(f"{shell('python', 'sample.py', workdir)} --prompt '...'    samples more{drawn}")
