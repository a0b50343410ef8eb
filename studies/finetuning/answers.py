"""Report a run of data.kind sft: how many trained questions it answers as trained, and the loss of held-out answers.

python studies/finetuning/answers.py runs/sft_smollm2 [--also data/repeats.jsonl]

A question is everything before an answer of the assistant. It counts as answered where greedy decoding writes one of
its trained answers up to the token that ends it: each token is then the likeliest one after those before it.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

import gptjax
from gptjax.configfile import config_from_dict, read_yaml
from gptjax.convert import open_model
from gptjax.data.conversations import Conversations
from gptjax.data.corpus import load_corpus
from gptjax.decoding.scoring import Score, Scorer
from gptjax.generate import LanguageModel

Request = tuple[tuple[int, ...], tuple[int, ...]]  # ids of the question, and of its answer


def requests_of(half: Conversations, context_length: int) -> Iterator[Request]:
    """Yield each answer that fits the context, as it is trained, with what stands before it."""
    for number in range(len(half.array("ends"))):
        ids, learnt = half.conversation(number, half.fitting_length(number, context_length))
        edges = np.flatnonzero(np.diff(learnt.astype(int), prepend=0, append=0))
        for start, end in edges.reshape(-1, 2):
            yield tuple(ids[:start].tolist()), tuple(ids[start:end].tolist())


def score_all(lm: LanguageModel, requests: list[Request]) -> list[Score]:
    """Return the score of each request, in order."""
    return [score for _, score in sorted(Scorer(lm).score(requests), key=lambda pair: pair[0])]


def loss_of(scores: list[Score]) -> float:
    """Return the mean loss in nats a token."""
    return -float(np.mean(np.concatenate([score.logprobs for score in scores])))


def main() -> None:
    """Print the share of trained questions that are answered, and the held-out loss before and after the tuning."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--also", help="file whose held-out answers count too")
    args = parser.parse_args()
    run = args.run
    cfg = config_from_dict(read_yaml(f"{run}/config.yaml"))
    source, T = load_corpus(cfg.data).sources[0], cfg.model.context_length
    trained, held_out = (list(requests_of(half, T)) for half in (source.train, source.val))
    tuned, start = gptjax.load(run), gptjax.load(cfg.init_from)

    answered: dict[tuple[int, ...], bool] = defaultdict(bool)
    for (question, _), score in zip(trained, score_all(tuned, trained), strict=True):
        answered[question] |= score.greedy
    right = sum(answered.values())
    print(f"step {open_model(run).meta['step']}: {right} of {len(answered)} trained questions ", end="")
    print(f"({right / len(answered):.1%}) are answered with one of their trained answers")

    others = list(requests_of(load_corpus(replace(cfg.data, path=args.also)).sources[0].val, T)) if args.also else []
    known = np.array([question in answered for question, _ in held_out], bool)
    parts = {"all": known >= 0, "whose question is new": ~known, "whose question is trained": known}
    parts = {title: np.r_[chosen, np.zeros(len(others), bool)] for title, chosen in parts.items()}
    if others:
        parts[f"with those of {args.also}"] = np.ones(len(held_out) + len(others), bool)
    before, after = (score_all(lm, [*held_out, *others]) for lm in (start, tuned))
    for title, chosen in parts.items():
        losses = [
            loss_of([score for score, use in zip(scores, chosen, strict=True) if use]) for scores in (before, after)
        ]
        print(f"held-out answers, {title} ({chosen.sum()}): {losses[0]:.4f} nats a token before, ", end="")
        print(f"{losses[1]:.4f} after ({losses[1] / losses[0] - 1:+.1%})")


if __name__ == "__main__":
    main()
