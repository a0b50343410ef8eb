"""What a finished run says last: its final losses, a sample, and the command that samples."""

import jax
from etils import epath

from gptjax.data.corpus import Corpus
from gptjax.generate import LanguageModel, Sampling
from gptjax.metrics import read_metrics
from gptjax.nn.backends import unstack
from gptjax.report import Report
from gptjax.step import Trainable, TrainState


def conclude(t: Trainable, state: TrainState, corpus: Corpus, report: Report) -> None:
    """Print the final losses, a sample of the live weights, and the command that samples."""
    if not report.speaks:
        return
    workdir = t.cfg.workdir
    last = {name: value for row in read_metrics(workdir) for name, value in row.items()}
    final = [f"{name} {last[name]:.4f}" for name in ("train/loss", "val/loss") if name in last]
    report.say("  ".join([f"done: {last['step']} steps", *final]))
    if jax.process_count() == 1:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        weights = unstack(jax.device_put(state.params if state.ema is None else state.ema, here))
        model = LanguageModel(t.cfg.model, weights, corpus.tokenizer)
        sample = model.complete([""], 700, Sampling(temperature=0.8), seed=t.cfg.seed)[0]
        report.say(f"\n{sample.text}\n")
    drawn = f"; the loss is drawn in {workdir}/loss.png" if (epath.Path(workdir) / "loss.png").exists() else ""
    report.say(f"python sample.py {workdir} --prompt '...'    samples more{drawn}")
