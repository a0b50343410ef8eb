"""The reference of preference tuning: how likely the model that a run starts from finds each answer.

These numbers are computed once, before the first step, and kept in the run's directory, so that no second model is in
memory while training and a resume reads them back.
"""

import json
from typing import Any

import numpy as np
from etils import epath

from gptjax.data.batches import examples_of, validation_batches
from gptjax.data.corpus import Corpus
from gptjax.hosts import from_writer, global_batch, is_writer, rows_of_this_host
from gptjax.lifecycle.start import first_state, read_fixed
from gptjax.nn.transformer import Params
from gptjax.shell.files import write_atomically
from gptjax.step import Trainable, TrainState, make_row_log_probabilities

FILE = "reference.json"  # in the run's directory


def attach_reference(t: Trainable, corpus: Corpus, state: TrainState) -> None:
    """Give the corpus what its pairs' log-probabilities are under the model of `init_from`, where they are needed.

    Args:
        corpus: as `start.check_pairs` allows it.
        state: of the run; before the first step its weights are the reference.
    """
    if "reference" not in t.objective.arrays:
        return
    path = epath.Path(t.cfg.workdir) / FILE
    key = f"{corpus.fingerprint} {t.cfg.model.context_length} {t.cfg.init_from}"
    found = json.loads(from_writer(lambda: json.dumps(read_reference(path, key) if int(state.step) else None)))
    if found is None:
        found = {"key": key, "rows": compute_reference(t, corpus, state)}
        if is_writer():
            write_atomically(path, json.dumps(found))
    halves = [half for source in corpus.sources for half in (source.train, source.val)]
    for half, rows in zip(halves, found["rows"], strict=True):
        half.reference = np.array(rows, np.float32)


def read_reference(path: epath.Path, key: str) -> dict[str, Any] | None:
    """Return what `attach_reference` wrote for the same data and model; None where there is nothing."""
    try:
        found = json.loads(path.read_text())
        return found if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compute_reference(t: Trainable, corpus: Corpus, state: TrainState) -> list[list[float]]:
    """Return the log-probability of what is learnt in each row, of each half of each source."""
    params = state.params if int(state.step) == 0 else reference_params(t, corpus)
    row_log_p, (B, T) = make_row_log_probabilities(t), (t.cfg.train.batch_sequences, t.cfg.model.context_length)
    rows = rows_of_this_host(t.batch_sharding, (B, T))
    found = []
    for source in corpus.sources:
        for half in (source.train, source.val):
            batches = validation_batches(half, T, B, None, rows)
            sums = [np.asarray(row_log_p(params, global_batch(b, rows, t.batch_sharding, B))) for b in batches]
            found.append(np.concatenate(sums)[: len(examples_of(half, T, "training"))].tolist())
    return found


def reference_params(t: Trainable, corpus: Corpus) -> Params:
    """Return the weights of `init_from`, as before the first step."""
    return first_state(t, corpus, read_fixed(t, corpus)).params
