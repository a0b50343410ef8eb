"""Does the learning rate that suits width 64 suit width 256? Standard against muP.

python studies/lr_transfer/run.py            runs what has no result yet with AdamW (--muon: with Muon), and reports
python studies/lr_transfer/run.py --report   reports

One line of results.jsonl a run; a run whose line is there is not repeated. The loop is this script's own, with the
learning rate as an argument of the step: one compilation serves every rate and seed.
"""

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gptjax.apps.scaling.coordinates import at_width
from gptjax.config import Config
from gptjax.configfile import load_config
from gptjax.process import prepare_process

HERE = Path(__file__).parent
WIDTHS, SEEDS = (64, 128, 256), (1, 2, 3)
RATES = tuple(2.0**n for n in range(-11, -5))
T_95 = 4.303  # two-sided, two degrees of freedom: of a mean over three seeds
RESULTS = HERE / "results.jsonl"


def read_results(optimizer: str) -> list[dict]:
    """The rows of results.jsonl."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [row for row in map(json.loads, lines) if row["optimizer"] == optimizer]


def run_all(optimizer: str) -> None:
    """Every run that has no result yet, a seed after the other."""
    prepare_process()
    done = {(r["parametrization"], r["width"], r["rate"], r["seed"]) for r in read_results(optimizer)}
    trainers = {}
    for seed, width, name, rate in itertools.product(SEEDS, WIDTHS, ("standard", "mup"), RATES):
        # The base model is, bit for bit, the standard one (tests/test_parametrization.py): it runs once.
        if (name, width, rate, seed) in done or (name, width) == ("mup", WIDTHS[0]):
            continue
        if (name, width) not in trainers:
            trainers[name, width] = make_train(configure(optimizer, name, width))
        began = time.perf_counter()
        loss = trainers[name, width](seed, rate)
        row = {"optimizer": optimizer, "parametrization": name, "width": width, "rate": rate, "seed": seed}
        row |= {"loss": loss, "wall_s": round(time.perf_counter() - began, 1)}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def configure(optimizer: str, parametrization: str, width: int) -> Config:
    """The config of a run but for rate and seed."""
    cfg = load_config([str(HERE / "base.yaml")])
    model = dataclasses.replace(cfg.model, parametrization=parametrization)
    optim = dataclasses.replace(cfg.optim, name=optimizer, peak_lr=1.0)
    return at_width(dataclasses.replace(cfg, model=model, optim=optim), width)


def make_train(cfg: Config) -> Callable[[int, float], float | None]:
    """(seed, rate) -> validation loss in nats a byte after the last step; None where it is not finite."""
    import jax

    from gptjax.data.batches import Batches, training_examples, validation_batches
    from gptjax.data.corpus import load_corpus
    from gptjax.nn.transformer import init_params
    from gptjax.optim import learning_rate
    from gptjax.sharding import make_mesh
    from gptjax.step import make_eval_step, make_gradient, make_trainable
    from gptjax.trainer import with_vocabulary

    corpus = load_corpus(cfg.data)
    cfg = with_vocabulary(cfg, corpus)
    t = make_trainable(cfg, make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}))
    gradient, evaluate = make_gradient(t), make_eval_step(t)
    B, T, total = cfg.train.batch_sequences, cfg.model.context_length, cfg.train.total_steps

    @jax.jit
    def init(key):
        params = init_params(cfg.model, key)
        return params, t.optimizer.init(params)

    @jax.jit
    def step(params, opt_state, batch, number, rate):
        _, grads = gradient(params, {}, batch, None)
        directions, opt_state = t.optimizer.update(grads, opt_state, params)
        lr = rate * learning_rate(cfg.optim, number, np.int32(total))
        return jax.tree.map(lambda p, d: p - lr * d, params, directions), opt_state

    def train(seed: int, rate: float) -> float | None:
        batches = Batches(training_examples(corpus, cfg.data, T, B, seed), B, range(B))
        params, opt_state = init(jax.random.key(seed))
        for number in range(total):
            params, opt_state = step(params, opt_state, batches[number], np.int32(number), np.float32(rate))
        windows = validation_batches(corpus.sources[0].val, T, 32, 128, range(32))
        sums = np.sum([jax.device_get(evaluate(params, batch)["loss"]) for batch in windows], axis=0)
        loss = float(sums[0] / sums[1])
        return loss if math.isfinite(loss) else None

    return train


def best_rate(losses: dict[float, float | None]) -> float | None:
    """log2 of the rate at the vertex of the parabola through the lowest loss and its neighbours; None at an edge."""
    rates = sorted(losses)
    values = [math.inf if losses[rate] is None else losses[rate] for rate in rates]
    i = int(np.argmin(values))
    if i in (0, len(rates) - 1) or not math.isfinite(values[i - 1] + values[i + 1]):
        return None
    left, low, right = values[i - 1 : i + 2]
    return math.log2(rates[i]) + 0.5 * (left - right) / (left - 2 * low + right)  # the rates are powers of 2


def report(optimizer: str) -> None:
    """Print losses and optima, and draw them."""
    from gptjax.figures.scaling import Sweep, draw_sweeps
    from gptjax.figures.style import to_bytes

    rows = [row for row in read_results(optimizer) if row["rate"] in RATES]
    wanted = len(SEEDS) * len(RATES) * (2 * len(WIDTHS) - 1)
    if len(rows) < wanted:
        raise SystemExit(f"{len(rows)} of {wanted} runs have a result; the same command without --report goes on")
    print(f"{optimizer}: {len(rows)} runs, {sum(row['wall_s'] for row in rows) / 60:.0f} minutes")
    rows += [{**r, "parametrization": "mup"} for r in rows if r["width"] == WIDTHS[0]]
    panels, drift = {}, {}
    for parametrization in ("standard", "mup"):
        optima = {}
        for width in WIDTHS:
            mine = [r for r in rows if (r["parametrization"], r["width"]) == (parametrization, width)]
            by_seed = {s: {r["rate"]: r["loss"] for r in mine if r["seed"] == s} for s in SEEDS}
            means = [np.mean([by_seed[s][rate] or math.nan for s in SEEDS]) for rate in RATES]
            optima[width] = [best_rate(by_seed[s]) for s in SEEDS]
            known = [o for o in optima[width] if o is not None]
            best = 2.0 ** float(np.mean(known)) if known else None
            panels.setdefault(parametrization, []).append(
                Sweep(f"width {width}", np.array(RATES), np.array(means), best)
            )
            losses = "  ".join(f"{mean:.3f}" for mean in means)
            found = ", ".join("edge" if o is None else f"{o:.2f}" for o in optima[width])
            print(f"{parametrization:9} width {width:3}  loss by rate {losses}  log2 of the best rate {found}")
        ends = list(zip(optima[WIDTHS[0]], optima[WIDTHS[-1]], strict=True))
        if all(a is not None and b is not None for a, b in ends):
            drifts = np.array([b - a for a, b in ends])
            drift[parametrization] = drifts.mean()
            half = T_95 * drifts.std(ddof=1) / math.sqrt(len(drifts))
            print(
                f"{parametrization:9} drift from width {WIDTHS[0]} to {WIDTHS[-1]}: {drifts.mean():+.2f} "
                f"octaves, 95 % interval {drifts.mean() - half:+.2f} to {drifts.mean() + half:+.2f}"
            )
    moved = [f"{octaves:+.2f} octaves ({name})" for name, octaves in drift.items()]
    finding = f"From width {WIDTHS[0]} to {WIDTHS[-1]} the best rate moves by {' and '.join(moved)}"
    (HERE / f"{optimizer}.png").write_bytes(to_bytes(draw_sweeps(panels, finding)))


if __name__ == "__main__":
    chosen = "muon" if "--muon" in sys.argv else "adamw"
    if "--report" not in sys.argv:
        run_all(chosen)
    report(chosen)
