"""What each part of the recipe is worth: every variant under one budget of tokens, with three seeds.

    python studies/recipe/run.py eighth tinyshakespeare.txt     # 192,000 tokens a run: an eighth of nanoGPT's budget
    python studies/recipe/run.py whole tinyshakespeare.txt      # all 1,536,000, for the few that are worth it

Results are lines of BUDGET.jsonl beside this file; what is there already is not run again. Ends with the table.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from gptjax.configfile import load_config
from gptjax.process import prepare_process

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
COMMON = "--train.eval_interval_steps 100000 --checkpoint.save_interval_steps 100000 --train.log_interval_steps 100"
# What the study of an eighth began from, and what the config has taken over from the winners since.
BEFORE = (
    "--model.norm rmsnorm --model.norm_weights false --model.mlp relu2 --model.d_mlp null --model.conv_width null "
    "--optim.schedule wsd --optim.decay_frac 0.5"
)
ADAMW = "--optim.name adamw --optim.lr_scales {} --optim.b1 0.9 --optim.b2 0.99 --optim.weight_decay 0.1"

# Budget -> flags of the recipe under it, and the variants: name -> flags that change it.
BUDGETS: dict[str, tuple[str, dict[str, str]]] = {
    "eighth": (
        f"{BEFORE} --train.total_steps 500 --train.batch_sequences 6 --optim.peak_lr 0.03",
        {
            "the recipe": "",
            "AdamW, rate 0.003": f"{ADAMW} --optim.peak_lr 0.003",
            "AdamW, rate 0.001": f"{ADAMW} --optim.peak_lr 0.001",
            "no QK-norm": "--model.qk_norm false",
            "learned positions": "--model.positions learned",
            "rotary theta 10,000": "--model.rope_theta 10000",
            "GELU": "--model.mlp gelu",
            "SwiGLU, two thirds as wide": "--model.mlp swiglu --model.d_mlp 344",
            "LayerNorm with weights": "--model.norm layernorm --model.norm_weights true",
            "a convolution of width 2": "--model.conv_width 2",
            "a convolution of width 3": "--model.conv_width 3",
            "a convolution of width 4": "--model.conv_width 4",
            "GPT-2's first values": "--model.init gpt2",
            "tied head": "--model.tie_embeddings true",
            "no cap on logits": "--model.logit_softcap null",
            "cosine schedule": "--optim.schedule cosine",
            "linear schedule": "--optim.schedule linear",
            "momentum 0.95": "--optim.momentum 0.95",
            "Adam's b1 0.9": "--optim.b1 0.9",
            "rate 0.02": "--optim.peak_lr 0.02",
            "rate 0.045": "--optim.peak_lr 0.045",
            "twice the batch": "--train.total_steps 250 --train.batch_sequences 12",
            "half the batch": "--train.total_steps 1000 --train.batch_sequences 3 --optim.peak_lr 0.02",
        },
    ),
    "whole": (
        "--train.total_steps 2000 --train.batch_sequences 12",
        {
            "the recipe": "",
            "no convolution": "--model.conv_width null",
            "its width 3": "--model.conv_width 3",
            "ReLU squared, RMSNorm without weights": "--model.mlp relu2 --model.d_mlp null --model.norm rmsnorm "
            "--model.norm_weights false",
        },
    ),
}


def carry_out(flags: str, corpus: str, seed: int) -> dict[str, float]:
    """One run in a temporary directory: its validation loss and its seconds."""
    from gptjax.trainer import train

    with tempfile.TemporaryDirectory() as workdir:
        words = f"configs/shakespeare_char_cpu.yaml --data.path {corpus} --workdir {workdir} --seed {seed} {flags}"
        began = time.perf_counter()
        train(load_config(words.split()))
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    return {"val/loss": losses[-1], "seconds": time.perf_counter() - began}


def table(results: list[dict], variants: dict[str, str]) -> str:
    """Mean validation loss and its spread over the seeds, best first."""
    rows = []
    for name in variants:
        losses = [r["val/loss"] for r in results if r["variant"] == name]
        if losses:
            spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
            rows.append((statistics.mean(losses), spread, len(losses), name))
    base = next((mean for mean, *_, name in rows if name == "the recipe"), float("nan"))
    lines = ["| variant | validation loss | against the recipe | sd of the seeds | seeds |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {mean:.4f} | {mean - base:+.4f} | {sd:.4f} | {n} |" for mean, sd, n, name in sorted(rows)]
    return "\n".join(lines)


def main(budget: str, corpus: str) -> None:
    prepare_process()
    recipe, variants = BUDGETS[budget]
    path = HERE / f"{budget}.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["variant"], r["seed"]) for r in results}
    for seed in SEEDS:
        for name, flags in variants.items():
            if (name, seed) not in done:
                result = {"variant": name, "seed": seed, **carry_out(f"{COMMON} {recipe} {flags}", corpus, seed)}
                results.append(result)
                with path.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print(table(results, variants))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
