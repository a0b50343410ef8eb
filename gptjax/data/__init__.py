"""Corpora to batches: `load_corpus` gives token arrays, `Batches` cuts them into what a step reads."""

from gptjax.data.batches import Batches, validation_batches, window_examples
from gptjax.data.corpus import Corpus, load_corpus

__all__ = ["Batches", "Corpus", "load_corpus", "validation_batches", "window_examples"]
