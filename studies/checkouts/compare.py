"""Compare what two checkouts of this project make of the same configs: losses, tokens, plans and exports.

    python studies/checkouts/compare.py OLD NEW [--cases debug ring ...] [--steps 30]

Both run in this Python environment, one after the other, in a temporary folder. Prints one line a case, with the
largest relative difference of each metric, and exits with 1 where a loss differs by more than 1e-6 of it, or a token,
a plan or an exported tensor differs at all.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

TOLERANCE = 1e-6  # of a loss
TINY = ["--model.n_layers", "2", "--model.d_model", "64", "--model.n_heads", "4", "--model.context_length", "64"]
FAST = ["--train.eval_sequences", "32", "--train.log_interval_steps", "1", "--train.eval_interval_steps", "15"]
EIGHT = ["--mesh.cpu_devices", "8"]
# Name -> config file and flags, in keys that both checkouts know.
CASES: dict[str, list[str]] = {
    "debug": ["configs/debug.yaml"],
    "quickstart": ["configs/quickstart.yaml"],
    "shakespeare_char_cpu": ["configs/shakespeare_char_cpu.yaml", "--data.path", "shakespeare"],
    "gpt2_dropout": ["configs/debug.yaml", *TINY, "--model.dropout", "0.1", "--train.microbatches", "2"],
    "packed": ["configs/debug.yaml", *TINY, "--data.path", "PACKED"],
    "ring": ["configs/debug.yaml", *TINY, *EIGHT, "--mesh.context", "4", "--mesh.fsdp", "2", "--mesh.data", "1"],
    "fsdp": ["configs/debug.yaml", *TINY, *EIGHT, "--mesh.fsdp", "8", "--mesh.data", "1"],
    "tensor": ["configs/debug.yaml", *TINY, *EIGHT, "--mesh.fsdp", "4", "--mesh.tensor", "2", "--mesh.data", "1"],
    "completep": [
        *("configs/quickstart.yaml", "--model.n_layers", "2", "--train.batch_sequences", "8"),
        *("--model.parametrization", "completep", "--model.base_width", "64", "--model.base_layers", "1"),
    ],
}
PLANS = {
    "plan gpt2_1.5b": ["configs/gpt2_1.5b.yaml", "--topology", "v5e:16x16", "--analytic", "--json"],
    "plan llama3.1_8b": ["configs/llama3.1_8b.yaml", "--topology", "v5p:4x4x4", "--analytic", "--json"],
}


def run(checkout: Path, *command: str) -> str:
    """Return a command's standard output, run in a checkout with its package."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *command], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{checkout}: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def measure(checkout: Path, name: str, steps: int, folder: Path) -> dict[str, object]:
    """Return what a checkout makes of a case: losses by step, greedy tokens, and a hash of the exported weights."""
    if name in PLANS:
        return {"plan": json.loads(run(checkout, "-m", "gptjax", "plan", *PLANS[name]))}
    packed = folder / "packed"
    if "PACKED" in CASES[name] and not packed.exists():
        text = Path(__file__).read_text().split("\n")
        (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in text * 20 if line))
        prepare = ("data", "prepare", str(folder / "text.jsonl"), "--tokenizer", "byte", "--out", str(packed))
        run(checkout, "-m", "gptjax", *prepare, "--pack_length", "64", "--val_frac", "0.2")
    workdir = folder / name
    flags = [str(packed) if word == "PACKED" else word for word in CASES[name]]
    run(checkout, "train.py", *flags, *FAST, "--train.total_steps", str(steps), "--workdir", str(workdir))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = ("train/loss", "val/loss", "val/bpb", "grad_norm", "lr")
    losses = {f"{key} {row['step']}": row[key] for row in rows for key in kept if key in row}
    sampling = ("--max_new_tokens", "40", "--temperature", "0", "--format", "jsonl")
    greedy = json.loads(run(checkout, "sample.py", str(workdir), "--prompt", "the", *sampling))["tokens"]
    found: dict[str, object] = {"losses": losses, "tokens": greedy}
    if name == "debug":
        run(checkout, "-m", "gptjax", "convert", "to-hf", str(workdir), "--out", str(folder / "hf"))
        found["export"] = hashlib.sha256((folder / "hf" / "model.safetensors").read_bytes()).hexdigest()
    return found


def difference(old: dict[str, object], new: dict[str, object]) -> tuple[bool, str]:
    """Return whether two measurements agree, and a line that says how far."""
    if "plan" in old:
        changed = list(changes(old["plan"], new["plan"]))
        return not changed, ", ".join(changed) or "equal"
    if old["losses"].keys() != new["losses"].keys():
        return False, "other steps or names"
    worst: dict[str, float] = {}
    for key, value in old["losses"].items():
        name, gap = key.split()[0], abs(value - new["losses"][key]) / max(abs(value), 1e-30)
        worst[name] = max(worst.get(name, 0), gap)
    same_tokens, same_export = old["tokens"] == new["tokens"], old.get("export") == new.get("export")
    gaps = ", ".join(f"{name} {gap:.1e}" for name, gap in worst.items() if gap > 0)
    words = f"largest differences: {gaps}" if gaps else "bitwise equal"
    words += ", tokens equal" if same_tokens else ", TOKENS DIFFER"
    words += "" if same_export else ", EXPORT DIFFERS"
    return max(worst["train/loss"], worst["val/loss"]) <= TOLERANCE and same_tokens and same_export, words


def changes(old: dict[str, object], new: dict[str, object]) -> Iterator[str]:
    """Yield what of a plan another one states differently; what only the new one states does not count."""
    for key, value in old.items():
        if isinstance(value, dict):
            yield from (f"{key}.{change}" for change in changes(value, new[key]))
        elif value != new[key]:
            yield f"{key} {value} -> {new[key]}"


def main() -> int:
    """Print a line a case; return 1 where any differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--cases", nargs="*", default=[*CASES, *PLANS])
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    good = True
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for side, checkout in (("old", args.old), ("new", args.new)):
                (Path(folder) / side).mkdir()
                found.append(measure(checkout.resolve(), name, args.steps, Path(folder) / side))
        same, words = difference(*found)
        good &= same
        print(f"{name:22}{words}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
