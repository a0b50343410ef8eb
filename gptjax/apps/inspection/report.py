"""What `gptjax inspect` found, as lines of a terminal."""

from typing import Any

from gptjax.shell import display

COLUMNS = 12  # of a token in a table


def shown(text: str, columns: int = COLUMNS) -> str:
    """Return a token as a table shows it: control characters escaped, spaces visible."""
    return display.shorten(repr(text)[1:-1].replace(" ", "·"), columns)


def lines(found: dict[str, Any]) -> list[str]:
    """Return the report for a terminal: tokens, what comes next, the logit lens, attribution, patching."""
    tokens, attribution = found["tokens"], found["attribution"]
    largest = max(map(abs, attribution["values"])) or 1.0
    rows = []
    for token, value in zip(tokens, attribution["values"], strict=True):
        likelier = "  ".join(f"{shown(a['text'])} {a['probability']:.2f}" for a in token.get("alternatives", ()))
        share = f"{token['probability']:.4f}" if "rank" in token else display.MISSING
        rows.append(
            [shown(token["text"]), share, str(token.get("rank", display.MISSING)), _bar(value / largest), likelier]
        )
    header = ["token", "probability", "rank", f"for {shown(attribution['token'])}", "likeliest here"]
    out = ["each token after those before it; a space is written as ·", *display.table(rows, header, left=(0, 3, 4))]
    answer = shown(attribution["token"])
    out += [f"(for {answer}: gradient x input, what a token adds to the logit of {answer} as the next token)"]
    out += [
        "",
        "likeliest next tokens: " + "  ".join(f"{shown(a['text'])} {a['probability']:.3f}" for a in found["next"]),
    ]
    out += ["", "logit lens: the likeliest next token after each token, by layer"]
    cells = [[f"{layer}", *(shown(cell["text"]) for cell in row[-8:])] for layer, row in enumerate(found["lens"])]
    out += display.table(cells, ["layer", *(shown(token["text"]) for token in tokens[-8:])], left=range(9))
    if "patching" in found:
        out += ["", *_patching_lines(found["patching"])]
    return out


def _bar(share: float) -> str:
    """Return a share in [-1, 1] as a signed bar of up to eight blocks."""
    return ("-" if share < 0 else "+") + "█" * round(8 * abs(share))


def _patching_lines(patching: dict[str, Any]) -> list[str]:
    about = (
        f"patching into {patching['against']!r}: logit of {shown(patching['answer'])} less that of "
        f"{shown(patching['foil'])} is {patching['clean_difference']:.3f} for the prompt, "
        f"{patching['other_difference']:.3f} for the other; each cell, what one activation of the prompt adds"
    )
    cells = [[f"{layer}", *(f"{value:+.2f}" for value in row[-8:])] for layer, row in enumerate(patching["effect"])]
    return [about, *display.table(cells, ["layer", *(shown(text) for text in patching["tokens"][-8:])])]
