"""The command `gptjax inspect`."""

import json as json_format

from gptjax.errors import UserError
from gptjax.process import prepare_process
from gptjax.shell import display
from gptjax.shell.paths import UserPath

MISSING = "pages need: pip install 'gptjax[report]'"


def inspect(
    model: UserPath,
    *,
    prompt: str | None = None,
    goodput: bool = False,
    against: str | None = None,
    top: int = 3,
    html: UserPath | None = None,
    json: bool = False,
) -> None:
    """Look inside a model at a prompt: probabilities, attention, logit lens, attribution, activation patching.
    With --goodput, show what a run spent its time on.

    Args:
        model: the directory of a run, a Hugging Face directory or id, or a .gguf file.
        prompt: the text to look at.
        goodput: show instead what a run spent its time on, in seconds, over all its attempts.
        against: another text of as many tokens; each activation of the prompt is copied into its run.
        top: alternatives to show for each token.
        html: also write one self-contained page to this file.
        json: print one JSON object, with all attention weights, instead of tables.
    """
    if top < 1:
        raise UserError(f"top {top} must be at least 1")
    if goodput == (prompt is not None):
        raise UserError("inspect needs either --prompt, a text to look at, or --goodput")
    prepare_process()
    if goodput:
        from gptjax.lifecycle.goodput import read_goodput, table_of

        found = read_goodput(str(model))
        print(json_format.dumps({"seconds": found[0], "attempts": found[1]}) if json else "\n".join(table_of(*found)))
        return
    from gptjax.apps.inspection.report import lines
    from gptjax.convert import load
    from gptjax.inspection import inspect_prompt

    lm = load(model)
    for name, text in (("prompt", prompt), ("against", against)):
        n = 0 if text is None else len(lm.prompt_ids(text))
        if n > lm.config.context_length:
            raise UserError(
                f"--{name} has {n} tokens, more than the context of {lm.config.context_length}; shorten it"
            )
    found = inspect_prompt(lm, prompt, against, top)
    print(json_format.dumps(found) if json else "\n".join(lines(found)))
    if html is not None:
        try:
            from gptjax.apps.inspection.page import inspection_page
            from gptjax.pages.page import write_page
        except ImportError:
            raise UserError(MISSING) from None
        page = inspection_page(found, str(model))
        write_page(html, page)
        if not json:
            print(f"{html}  {display.size(len(page))}")
