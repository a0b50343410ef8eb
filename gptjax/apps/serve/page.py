"""The page at `/`, and the curves of the runs that it shows."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.figures.series import column, thin
from gptjax.metrics import read_metrics, read_records

SHOWN = ("train/loss", "val/loss", "lr", "tokens_per_s")
POINTS = 300  # of a curve
MOST_RUNS = 20  # the ones that changed last
SAMPLE_CHARACTERS = 500


def read_page() -> tuple[bytes, str]:
    """Return the page, and the policy by which a browser runs its own script and style and nothing else."""
    page = (Path(__file__).parent / "page.html").read_bytes()

    def hashed(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1]).digest()).decode()}'"

    rules = {
        "default-src": "'none'",
        "script-src": hashed("script"),
        "style-src": "'unsafe-inline'",  # tokens carry their shade as a style
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, "; ".join(f"{name} {value}" for name, value in rules.items())


def read_curves(folder: str) -> list[dict[str, Any]]:
    """Return the curves of a run, or of the runs in a folder, those that changed last first.

    Returns:
        for each run: name; series, of SHOWN, each as lists of steps and values; and its latest sample.
    """
    paths = [path.parent for pattern in ("metrics.jsonl", "*/metrics.jsonl") for path in Path(folder).glob(pattern)]
    dated = sorted(paths, key=lambda path: (path / "metrics.jsonl").stat().st_mtime, reverse=True)
    return [found for path in dated[:MOST_RUNS] if (found := _curves(path)) is not None]


def _curves(path: Path) -> dict[str, Any] | None:
    try:
        rows = read_metrics(path)
        samples = read_records(path / "samples.jsonl") if (path / "samples.jsonl").exists() else []
    except (UserError, OSError):  # it is just being written
        return None
    series = {}
    for name in SHOWN:
        x, y = thin(*column(rows, name), POINTS)
        if np.isfinite(y).any():
            series[name] = [x.tolist(), [float(v) if np.isfinite(v) else None for v in y]]
    sample = str(samples[-1].get("text", ""))[:SAMPLE_CHARACTERS] if samples else ""
    return {"name": path.resolve().name, "series": series, "sample": sample}
