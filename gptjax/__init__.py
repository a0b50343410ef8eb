"""gptjax: the GPT trainer for JAX."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptjax.generate import LanguageModel


def load(path: str | os.PathLike[str]) -> "LanguageModel":
    """A model, ready to be asked: `.generate(...)`, `.logits(ids)`, `.tokenizer`, `.config`.

    Args:
        path: the directory of a run, a Hugging Face directory, a .gguf file, or an id of the Hugging Face hub.

    Raises:
        gptjax.errors.UserError: there is no model that can be read.
    """
    from gptjax.convert import load  # here, so that `import gptjax` does not wait for JAX

    return load(path)
