"""gptjax: the GPT trainer for JAX."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptjax.generate import LanguageModel


def load(
    path: str | os.PathLike[str], dtype: str | None = None, mesh: Mapping[str, int] | None = None
) -> "LanguageModel":
    """Return a model that is ready to generate: `.generate(...)`, `.logits(ids)`, `.tokenizer`, `.config`.

    Args:
        path: the directory of a run, a Hugging Face directory, a .gguf file, or an id of the Hugging Face hub.
        dtype: of the matrices: float32, bfloat16 or int8; None computes as the model was trained.
        mesh: devices on each axis to shard the model over, such as {"fsdp": 4, "tensor": 2}; None for one device.

    Raises:
        gptjax.errors.UserError: there is no model that can be read.
    """
    from gptjax.convert import load  # here, so that `import gptjax` does not wait for JAX

    return load(path, dtype, mesh)
