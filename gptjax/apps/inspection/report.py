"""What `gptjax inspect` found, as plain values and as lines of a terminal."""

from typing import Any

import jax
import numpy as np

from gptjax import display
from gptjax.apps.inspection.measure import Inspector, Patching, Trace
from gptjax.generate import LanguageModel

COLUMNS = 12  # of a token in a table


def inspect_prompt(lm: LanguageModel, prompt: str, against: str | None, top: int) -> dict[str, Any]:
    """Return what a model computes for a prompt, as plain values.

    Args:
        against: a prompt of the same length to patch from the first; None for none.
        top: alternatives of each token.
    """
    inspector = Inspector(lm)
    ids = np.array(lm.prompt_ids(prompt), np.int32)
    trace = inspector.trace(ids)
    best = int(np.asarray(trace.lens[-1, -1]).argmax())
    found = {
        "prompt": prompt,
        "tokens": _tokens(lm, ids, trace, top),
        "next": _alternatives(lm, jax.nn.log_softmax(trace.lens[-1, -1]), top),
        "lens": _lens(lm, trace),
        "attribution": {"token": _text(lm, best), "values": _floats(inspector.attribute(ids, best))},
        "attention": np.round(np.asarray(trace.attention, float), 6).tolist(),
    }
    if against is not None:
        other = np.array(lm.prompt_ids(against), np.int32)
        foil = int(np.asarray(inspector.trace(other).lens[-1, -1]).argmax())
        if foil == best:  # the two prompts continue alike: compare with the second choice
            foil = int(np.asarray(trace.lens[-1, -1]).argsort()[-2])
        found["patching"] = _patching(lm, inspector.patch(ids, other, best, foil), against, other)
    return found


def _text(lm: LanguageModel, id: int) -> str:
    names = {id: name for name, id in lm.tokenizer.special_tokens.items()}
    return names.get(id) or lm.tokenizer.decode([id])


def _floats(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]


def _tokens(lm: LanguageModel, ids: np.ndarray, trace: Trace, top: int) -> list[dict[str, Any]]:
    """Return each token with its probability, its rank from 1, and what was likelier; the first token has none."""
    log_p = np.asarray(jax.nn.log_softmax(trace.lens[-1]))
    rows: list[dict[str, Any]] = [{"id": int(ids[0]), "text": _text(lm, int(ids[0]))}]
    for before, id in zip(log_p[:-1], ids[1:].tolist(), strict=True):
        rank = int((before > before[id]).sum()) + 1
        row = {"id": id, "text": _text(lm, id), "probability": float(np.exp(before[id])), "rank": rank}
        rows.append({**row, "alternatives": _alternatives(lm, before, top)})
    return rows


def _alternatives(lm: LanguageModel, log_p: np.ndarray, top: int) -> list[dict[str, Any]]:
    log_p = np.asarray(log_p)
    best = log_p.argsort()[::-1][:top].tolist()
    return [{"id": id, "text": _text(lm, id), "probability": float(np.exp(log_p[id]))} for id in best]


def _lens(lm: LanguageModel, trace: Trace) -> list[list[dict[str, Any]]]:
    """Return the likeliest next token after every position, by each state of the residual stream."""
    shares = np.asarray(jax.nn.softmax(trace.lens))
    best = shares.argmax(-1)
    return [
        [{"text": _text(lm, int(id)), "probability": float(share[id])} for id, share in zip(row, states, strict=True)]
        for row, states in zip(best, shares, strict=True)
    ]


def _patching(lm: LanguageModel, found: Patching, against: str, ids: np.ndarray) -> dict[str, Any]:
    return {
        "against": against,
        "tokens": [_text(lm, int(id)) for id in ids],
        "answer": _text(lm, found.answer),
        "foil": _text(lm, found.foil),
        "clean_difference": found.clean,
        "other_difference": found.other,
        "full_effect": found.full,
        "effect": [_floats(row) for row in found.effect],
    }


def shown(text: str, columns: int = COLUMNS) -> str:
    """Return a token as a table shows it: control characters escaped, spaces visible."""
    return display.shorten(repr(text)[1:-1].replace(" ", "·"), columns)


def lines(found: dict[str, Any]) -> list[str]:
    """Return the report for a terminal: tokens, what comes next, the logit lens, attribution, patching."""
    tokens, attribution = found["tokens"], found["attribution"]
    largest = max(map(abs, attribution["values"])) or 1.0
    rows = []
    for token, value in zip(tokens, attribution["values"], strict=True):
        likelier = " ".join(f"{shown(a['text'])} {a['probability']:.2f}" for a in token.get("alternatives", ()))
        share = f"{token['probability']:.4f}" if "rank" in token else display.MISSING
        rows.append(
            [shown(token["text"]), share, str(token.get("rank", display.MISSING)), _bar(value / largest), likelier]
        )
    header = ["token", "probability", "rank", f"for {shown(attribution['token'])}", "likeliest here"]
    out = display.table(rows, header)
    out += ["", "next: " + "  ".join(f"{shown(a['text'])} {a['probability']:.3f}" for a in found["next"])]
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
