"""What `gptjax inspect` found as one HTML page without anything outside it."""

from typing import Any

import numpy as np

from gptjax.apps.inspection.report import shown
from gptjax.figures.inspection import draw_attention, draw_layers_by_tokens
from gptjax.pages.page import Cell, Facts, Paragraph, Picture, Section, Table, number, render
from gptjax.shell.paths import shell


def inspection_page(found: dict[str, Any], model: str) -> str:
    """Return the page of a report (`report.inspect_prompt`)."""
    sections = [
        Section("", [Paragraph(_finding(found), lead=True), Facts(_next(found), large=True)]),
        Section("Tokens", [_tokens(found)]),
        Section("Attention", [_attention(found)]),
        Section("Logit lens", [_lens(found)]),
    ]
    command = ["gptjax", "inspect", model, "--prompt", found["prompt"]]
    if "patching" in found:
        sections.append(Section("Activation patching", [_patching(found["patching"])]))
        command += ["--against", found["patching"]["against"]]
    return render(f"Inside {model}", sections, shell(*command))


def _finding(found: dict[str, Any]) -> str:
    """Say what the model expects after the prompt."""
    first = found["next"][0]
    return (
        f"After “{found['prompt']}” the likeliest next token is “{shown(first['text'])}”, "
        f"with a probability of {first['probability']:.3f}. A space is written as ·."
    )


def _next(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"next token “{shown(a['text'])}”", f"{a['probability']:.3f}") for a in found["next"]]


def _tokens(found: dict[str, Any]) -> Table:
    rows = []
    for token, value in zip(found["tokens"], found["attribution"]["values"], strict=True):
        alternatives = token.get("alternatives", ())
        likelier = "\u2003".join(f"“{shown(a['text'])}” {a['probability']:.2f}" for a in alternatives)
        figures = [number(token.get("probability")), number(token.get("rank")), number(value)]
        rows.append([Cell(shown(token["text"])), *figures, Cell(likelier)])
    towards = f"gradient × input for “{shown(found['attribution']['token'])}”"
    header = ["token", "probability", "rank", towards, "likeliest here"]
    return Table("Each token after those before it", header, rows)


def _attention(found: dict[str, Any]) -> Picture:
    weights = np.array(found["attention"])
    finding = f"Attention of {weights.shape[0]} layers with {weights.shape[1]} heads each"
    return Picture(lambda look: draw_attention(weights, finding, look=look), finding)


def _lens(found: dict[str, Any]) -> Table:
    rows = [
        [Cell(str(layer)), *(Cell(shown(cell["text"]), round(cell["probability"], 4)) for cell in row)]
        for layer, row in enumerate(found["lens"])
    ]
    header = ["layer", *(shown(token["text"]) for token in found["tokens"])]
    return Table("The likeliest next token after each token, by the residual stream after each layer", header, rows)


def _patching(patching: dict[str, Any]) -> Picture:
    effect = np.array(patching["effect"])
    names = f"“{shown(patching['answer'])}” less that of “{shown(patching['foil'])}”"
    finding = (
        f"The logit of {names} is {patching['clean_difference']:.2f} for the prompt, "
        f"{patching['other_difference']:.2f} for “{shown(patching['against'], 60)}”"
    )
    drawn = "what each activation of the prompt adds to the difference of logits when copied into the other run"
    tokens = [shown(text) for text in patching["tokens"]]
    label = "logit difference"
    return Picture(lambda look: draw_layers_by_tokens(effect, tokens, finding, drawn, label, look=look), finding)
