"""Report a run of preference tuning: its held-out accuracy, and how far it has moved from the model it started from.

python studies/finetuning/divergence.py runs/dpo_smollm2
"""

import argparse

import numpy as np

import gptjax
from gptjax.configfile import config_from_dict, read_yaml
from gptjax.convert import open_model
from gptjax.data.batches import validation_batches
from gptjax.data.corpus import load_corpus
from gptjax.metrics import read_metrics

ROWS = 4  # of a batch: two pairs, of which two rows are chosen answers


def token_divergences(tuned: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return KL(tuned || start) of each position in nats, of logits [T, V]."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(tuned), log_softmax(start)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def main() -> None:
    """Print the step, the held-out accuracy and margin, and the divergence over the held-out chosen answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    run = parser.parse_args().run
    weights_step = open_model(run).meta["step"]
    cfg = config_from_dict(read_yaml(f"{run}/config.yaml"))
    evaluated = [row for row in read_metrics(run) if "val/reward_accuracy" in row and row["step"] <= weights_step]
    last = evaluated[-1]
    print(f"step {last['step']}: held-out accuracy {last['val/reward_accuracy']:.1%}, ", end="")
    print(f"margin {last['val/reward_margin']:.3f}, loss {last['val/loss']:.4f}")

    val = load_corpus(cfg.data).sources[0].val
    tuned, start = gptjax.load(run), gptjax.load(cfg.init_from)
    sums = []
    for batch in validation_batches(val, cfg.model.context_length, ROWS, None, range(ROWS)):
        for row in range(0, ROWS, 2):
            learnt = batch["weights"][row] > 0
            if not learnt.any():
                continue
            ids = batch["tokens"][row][None]
            both = [np.asarray(model.logits(ids)[0], np.float64)[learnt] for model in (tuned, start)]
            sums.append((token_divergences(*both).sum(), learnt.sum()))
    total, tokens = np.sum(sums, axis=0)
    print(f"step {weights_step}: KL(tuned || start) over {len(sums)} held-out chosen answers: ", end="")
    print(f"{total / tokens:.4f} nats a token, {total / len(sums):.3f} an answer")


if __name__ == "__main__":
    main()
