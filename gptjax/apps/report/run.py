"""Write one run as a page: final figures, curves, samples, config, environment, and next commands."""

from typing import Any

import numpy as np

from gptjax.apps.report.runs import Run, defaults
from gptjax.figures.runs import METRICS, Metric, draw_loss, draw_metric
from gptjax.figures.series import column
from gptjax.pages.page import Cell, Commands, Facts, Paragraph, Picture, Section, Table, Text, render
from gptjax.shell import display
from gptjax.shell.paths import shell

MOST_SAMPLES = 12
MOST_OTHERS = 24  # of a run's own metrics that are drawn


def run_page(run: Run) -> str:
    """Return the page of a run."""
    sections = [
        Section("", [Paragraph(summary(run), lead=True), Facts(final_figures(run), large=True)]),
        Section("Loss", [_loss(run)]),
        Section("Curves", _curves(run)),
        Section("Samples", _samples(run)),
        Section("Config", [_config_table(run)] if run.config else [Paragraph("The run has no config.yaml.")]),
        Section("Environment and provenance", [Facts(provenance(run))]),
        Section("What to do next", [Commands(commands(run))]),
    ]
    return render(f"Run {run.name}", sections, shell("gptjax", "report", run.path))


def summary(run: Run) -> str:
    """Return one or two sentences on the run's outcome."""
    if not run.rows:
        return "The run has logged nothing yet."
    steps, total = run.rows[-1]["step"], run.config.get("train.total_steps")
    tokens = run.last("tokens")
    said = f"{display.plural(int(steps), 'step')}"
    said += f" of {total:,}" if isinstance(total, int) and total > steps else ""
    said += f" on {display.count(tokens)} tokens" if tokens else ""
    best = run.best("val/loss")
    if best is None:
        loss = run.last("train/loss")
        ending = f", training loss {loss:.4f} nats per token." if loss is not None else "."
        return f"{said}; no finite validation loss is logged{ending}{_interruptions(run)}"
    last = run.last("val/loss")
    said += f" to a validation loss of {last:.4f} nats per token"
    said += "." if best[0] >= last else f"; the best, {best[0]:.4f}, came at step {best[1]:,}."
    return said + _interruptions(run)


def _interruptions(run: Run) -> str:
    """Return sentences on skipped steps, rollbacks and resumes; empty where there were none."""
    skipped = int(np.nansum(column(run.rows, "skipped")[1]))
    said = (
        f" It skipped {display.plural(skipped, 'step')} whose gradient was not finite or spiked." if skipped else ""
    )
    for kind, verb in (("rollback", "rolled back"), ("resume", "resumed")):
        times = sum(event.get("event") == kind for event in run.events)
        said += f" It was {verb} {display.plural(times, 'time')}." if times else ""
    return said


def final_figures(run: Run) -> list[tuple[str, str]]:
    """Return the final figures that head the page."""
    seconds = run.seconds()
    spent = seconds[np.isfinite(seconds)]
    shown = [
        ("validation loss (nats)", run.last("val/loss"), lambda v: f"{v:.4f}"),
        ("bits per byte", run.last("val/bpb"), lambda v: f"{v:.4f}"),
        ("training loss (nats)", run.last("train/loss"), lambda v: f"{v:.4f}"),
        ("tokens", run.last("tokens"), display.count),
        ("tokens/s (median)", _median(run, "tokens_per_s"), display.count),
        ("MFU (median)", _median(run, "mfu"), lambda v: f"{100 * v:.1f} %"),
        ("training time", float(spent[-1]) if len(spent) else None, display.duration),
    ]
    return [(name, write(value)) for name, value, write in shown if value is not None]


def _median(run: Run, key: str) -> float | None:
    values = column(run.rows, key)[1]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _loss(run: Run) -> Picture:
    return Picture(
        lambda look: draw_loss(run.rows, run.name, run.events, look=look), f"Loss over steps. {summary(run)}"
    )


def _curves(run: Run) -> list[Any]:
    others = [Metric(key, key, noisy=key.startswith("train/"), falls=True) for key in _other_metrics(run)]
    shown = [metric for metric in METRICS if run.last(metric.key) is not None] + others[:MOST_OTHERS]
    pictures: list[Any] = [
        Picture(
            lambda look, metric=metric: draw_metric(run.rows, metric, look=look),
            f"{metric.label} over steps; at the end {display.significant(float(run.last(metric.key)))}",
        )
        for metric in shown
    ]
    missing = [metric.label.partition(" (")[0] for metric in METRICS if metric not in shown]
    note = f"Not logged by this run: {', '.join(missing)}. " if missing else ""
    note += f"Not drawn: {', '.join(metric.key for metric in others[MOST_OTHERS:])}." if others[MOST_OTHERS:] else ""
    return pictures + ([Paragraph(note)] if note else [])


def _other_metrics(run: Run) -> list[str]:
    """Return the other keys of train/ and val/ with a finite value: of sources, auxiliary losses, accuracies."""
    known = {"train/loss", "val/loss", *(metric.key for metric in METRICS)}
    keys = {key for key in set().union(*run.rows) - known if key.startswith(("train/", "val/"))}
    return sorted(key for key in keys if run.last(key) is not None)


def _samples(run: Run) -> list[Any]:
    if not run.samples:
        return [Paragraph("No samples are stored; --log.sample_tokens 200 stores one at each evaluation.")]
    chosen = np.unique(np.linspace(0, len(run.samples) - 1, min(MOST_SAMPLES, len(run.samples))).astype(int))
    losses = {row["step"]: row["val/loss"] for row in run.rows if display.finite(row.get("val/loss"))}
    blocks: list[Any] = [Paragraph("Sampled without a prompt at temperature 0.8 during the run.")]
    for row in (run.samples[i] for i in chosen):
        step = row.get("step")
        heading = f"Step {step:,}" if isinstance(step, int) else "A step"
        heading += f", validation loss {losses[step]:.4f}" if step in losses else ""
        blocks.append(Text(heading, row["text"]))
    return blocks


def _config_table(run: Run) -> Table:
    known = defaults()
    rows = [
        [Cell(key), Cell(_value(value)), Cell(_value(known[key]) if key in known else display.MISSING)]
        for key, value in sorted(run.config.items())
        if known.get(key) != value
    ]
    return Table("What differs from the defaults", ["key", "this run", "default"], rows)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def provenance(run: Run) -> list[tuple[str, str]]:
    """Return the provenance of the run: commit, versions, devices, data, tokenizer."""
    env, tokenizer = run.environment, run.meta.get("tokenizer")
    versions = env.get("versions") if isinstance(env.get("versions"), dict) else {}
    devices = env.get("devices") if isinstance(env.get("devices"), list) else []
    kinds = {str(device).rsplit(" ", 1)[0] for device in devices}
    pairs = [
        ("directory", str(run.path)),
        ("git commit", env.get("git_commit")),
        ("Python", env.get("python")),
        *((name, version) for name, version in versions.items()),
        ("devices", f"{len(devices)} × {', '.join(sorted(kinds))}" if devices else None),
        ("processes", env.get("processes")),
        ("data", run.config.get("data.path")),
        ("data fingerprint", run.meta.get("corpus")),
        ("tokenizer", _tokenizer(tokenizer)),
        ("seed", run.config.get("seed")),
    ]
    return [(name, str(value)) for name, value in pairs if value is not None]


def _tokenizer(tokenizer: Any) -> str | None:
    if not isinstance(tokenizer, dict):
        return None
    parts = [str(tokenizer[key]) for key in ("kind", "type", "name") if isinstance(tokenizer.get(key), str)]
    return ", ".join(parts) or "in the checkpoint"


def commands(run: Run) -> list[tuple[str, str]]:
    """Return the commands that sample from, resume and export the run, with what each does."""
    return [
        (f"{shell('python', 'sample.py', run.path)} --prompt '...'", "Sample from it:"),
        (
            shell("python", "train.py", run.path / "config.yaml", "--workdir", run.path),
            "Resume it if it has steps left:",
        ),
        (shell("gptjax", "convert", "to-hf", run.path, "--out", "my-model"), "Export it for transformers:"),
    ]
