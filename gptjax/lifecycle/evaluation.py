"""Evaluate a run on its validation data."""

from collections.abc import Callable

import jax
import numpy as np

from gptjax.data.batches import validation_batches
from gptjax.data.corpus import Corpus, Source
from gptjax.hosts import global_batch, rows_of_this_host
from gptjax.step import Trainable, TrainState, make_eval_step


def make_evaluate(t: Trainable, corpus: Corpus) -> Callable[[TrainState], dict[str, float]]:
    """Return a function that evaluates a state's weights (their moving average, if kept) on the validation data.

    Raises:
        UserError: a source has fewer validation tokens than one sequence.
    """
    cfg, eval_step = t.cfg, make_eval_step(t)
    T, B = cfg.model.context_length, cfg.train.batch_sequences
    rows = rows_of_this_host(t.batch_sharding, (B, T))

    def batches_of(source: Source):
        return validation_batches(source.val, T, B, cfg.train.eval_sequences, rows, source.pack_length)

    for source in corpus.sources:
        batches_of(source)  # rejects a corpus that is too short before the first step

    def evaluate(state: TrainState) -> dict[str, float]:
        params = state.averaged
        means = []
        for source in corpus.sources:
            terms = [eval_step(params, global_batch(b, rows, t.batch_sharding, B)) for b in batches_of(source)]
            means.append(mean_terms(jax.device_get(terms)))
        return corpus.validation_metrics(means, bits_per_byte=t.objective.every_token)

    return evaluate


def mean_terms(batches: list[dict[str, tuple[np.ndarray, np.ndarray]]]) -> dict[str, float]:
    """Return the mean of each term over batches: its sums over its weights, added in float64."""
    totals = {name: np.sum([terms[name] for terms in batches], axis=0, dtype=np.float64) for name in batches[0]}
    return {name: float(total / weight) for name, (total, weight) in totals.items()}
