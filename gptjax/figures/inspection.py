"""Figures of what a model computes for a prompt: attention of every layer and head, and maps of layers by tokens."""

from collections.abc import Sequence

import numpy as np

from gptjax.figures.style import Sheet, figure_kind


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
    places = (np.arange(max(L, H)) * (T + gap)) + T / 2
    axes.set_xticks(places[:H], [str(head) for head in range(H)])
    axes.set_yticks(places[:L], [str(layer) for layer in range(L)])
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
    axes.set_xticks(range(len(tokens)), tokens, rotation=90)
    axes.set(ylabel="after layer")
    axes.grid(visible=False)
    sheet.figure.colorbar(image, ax=axes, label=label)
