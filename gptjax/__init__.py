"""gptjax: the GPT trainer for JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptjax.generate import LanguageModel


def load(path: str) -> "LanguageModel":
    """The model in the directory of a run: `.generate(...)`, `.logits(ids)`, `.tokenizer`, `.config`.

    Raises:
        gptjax.errors.UserError: there is no readable checkpoint.
    """
    from gptjax.generate import load_run  # here, so that `import gptjax` does not wait for JAX

    return load_run(path)
