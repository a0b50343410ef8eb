"""Compare gptjax and lm-eval's Hugging Face backend on a task: scores item by item, and items per second.

python studies/mmlu_dev/compare.py FOLDER_OF_THE_TASK HUGGING_FACE_DIRECTORY [ROUNDS]

Both read the same exported weights in float32, in turns, as many times as ROUNDS says; the best time of each counts.
The Hugging Face backend has its default batch size of 1, at which it pads nothing.
"""

import sys
import time

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from gptjax.apps.evaluate.harness import GptjaxLM

TASK = "mmlu_dev"


def run(lm, manager: TaskManager) -> tuple[dict, list, float]:
    """Return a model's results, its log-likelihoods by item, and the seconds that they took."""
    seconds = []
    ask = lm.loglikelihood

    def timed(requests, **options):
        start = time.perf_counter()
        answers = ask(requests, **options)
        seconds.append(time.perf_counter() - start)
        return answers

    lm.loglikelihood = timed
    found = lm_eval.simple_evaluate(lm, tasks=[TASK], task_manager=manager, log_samples=True, bootstrap_iters=0)
    lm.loglikelihood = ask
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    return found["results"][TASK], [[float(r[0]) for r in s["filtered_resps"]] for s in samples], sum(seconds)


def main(folder: str, model: str, rounds: str = "3") -> None:
    """Print each model's accuracy and speed, and how far the two differ."""
    manager = TaskManager(include_path=folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    models = {
        "gptjax": GptjaxLM(model, dtype="float32"),
        "hf": HFLM(model, tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=1),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    found = {}
    for _ in range(int(rounds)):
        for name, lm in models.items():
            results, logprobs, seconds = run(lm, manager)
            found[name] = np.array(logprobs)
            times[name].append(seconds)
            n = len(logprobs)
            print(f"{name}: acc {results['acc,none']:.4f}, {n / seconds:.2f} items/s", flush=True)
    ours, theirs = found["gptjax"], found["hf"]
    print(f"items with another answer: {(ours.argmax(1) != theirs.argmax(1)).sum()} of {len(ours)}")
    print(f"largest difference of a log-likelihood: {np.abs(ours - theirs).max():.2e}")
    ratio = min(times["hf"]) / min(times["gptjax"])
    print(f"items per second, gptjax / hf, best rounds: {ratio:.2f} ({torch.get_num_threads()} threads of torch)")


if __name__ == "__main__":
    main(*sys.argv[1:])
