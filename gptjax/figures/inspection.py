"""Figures of what a model computes for a prompt: attention of every layer and head, and maps of layers by tokens."""

from collections.abc import Sequence

import numpy as np

from gptjax.figures.style import Sheet, axis, figure_kind


@figure_kind(5.2, 4.2)
def draw_attention(sheet: Sheet, weights: np.ndarray, finding: str) -> None:
    """Draw attention weights [L, H, T, T]: a row of maps for each layer, one for each head."""
    L, H, T, _ = weights.shape
    gap = max(1, T // 8)
    mosaic = np.full((L * (T + gap) - gap, H * (T + gap) - gap), np.nan)
    for layer in range(L):
        for head in range(H):
            top, left = layer * (T + gap), head * (T + gap)
            mosaic[top : top + T, left : left + T] = weights[layer, head]
    axes = sheet.figure.subplots()
    sheet.title(finding, "each square: a head; rows are queries, columns keys, from the first token; bright is 1")
    axes.imshow(np.sqrt(mosaic), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    heads, layers = _thinned(H, 8 if sheet.look.narrow else 20), _thinned(L, 20)
    axes.set_xticks(heads * (T + gap) + T / 2, heads)
    axes.set_yticks(layers * (T + gap) + T / 2, layers)
    axes.set(xlabel="head", ylabel="layer")
    axes.grid(visible=False)


@figure_kind(4.0, 3.4)
def draw_layers_by_tokens(
    sheet: Sheet, values: np.ndarray, tokens: Sequence[str], finding: str, drawn: str, label: str
) -> None:
    """Draw values [L + 1, T] as a map, with the tokens below; blue is negative, red positive."""
    axes = sheet.figure.subplots()
    sheet.title(finding, drawn)
    largest = float(np.abs(values).max()) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest", aspect="auto")
    places, layers = _thinned(len(tokens), 13 if sheet.look.narrow else 32), _thinned(len(values), 9)
    axes.set_xticks(places, [tokens[place] for place in places], rotation=90)
    axes.set_yticks(layers, layers)
    axes.set(ylabel="after layer")
    axes.grid(visible=False)
    bar = sheet.figure.colorbar(image, ax=axes)
    axis(bar.ax, "y", label, kind="plain")


def _thinned(n: int, most: int) -> np.ndarray:
    """Return the numbers below n that have a tick: every one, or every k-th where labels would touch."""
    return np.arange(0, n, max(1, -(-n // most)))
