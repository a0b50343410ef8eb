"""How first values, rates and multipliers follow a model's size, so that what suits a small one suits a large one.

A model of `model.base_width` and `model.base_layers` is the standard one, bit for bit. One m times as wide and l
times as deep departs from it by the powers of m and l below. muP follows the width alone: for it l is 1.

Sources: Yang et al. 2022 (arXiv 2203.03466), table 8, in which input and output weights may be tied; Dey et al. 2025
(CompleteP, arXiv 2505.01618), table 1 with alpha = 1, for depth, decay and eps; Yang et al. 2023 (arXiv 2310.17813),
condition 1, for Muon: its updates have the spectral norm that suits every width.
"""

import re
from typing import NamedTuple

from gptjax.config import ModelConfig

Exponents = tuple[float, float]  # of m and of l


class Rule(NamedTuple):
    """What multiplies learning rate, decay (which acts times the rate) and Adam's eps."""

    lr: Exponents = (0, 0)
    decay: Exponents = (0, 0)
    eps: Exponents = (0, 0)


# Optimizer -> pattern of a weight's path -> rule; the first match counts.
RULES: dict[str, dict[str, Rule]] = {
    "adam": {
        r"^blocks/.*(norm/|bias|conv)": Rule(eps=(-1, -1)),
        r"^blocks/": Rule(lr=(-1, 0), decay=(1, 0), eps=(-1, -1)),
        r"^(embed|positions|final_norm/.*|head)$": Rule(eps=(-1, 0)),
    },
    "muon": {r".*": Rule()},
}
# Kind of weight -> what multiplies the standard deviation of its first value.
INIT_STDS = {"embed": (0, 0), "position": (0, 0), "matrix": (-0.5, 0), "residual": (-0.5, 0), "head": (0, 0)}
# What multiplies the last hidden state, and what a residual branch adds.
MULTIPLIERS = {"output": (-1, 0), "residual": (0, -1)}


def growth(cfg: ModelConfig) -> tuple[float, float]:
    """m and l; 1 for what the parametrization does not follow."""
    wide, deep = cfg.parametrization != "standard", cfg.parametrization == "completep"
    return cfg.d_model / cfg.base_width if wide else 1.0, cfg.n_layers / cfg.base_layers if deep else 1.0


def factor(cfg: ModelConfig, exponents: Exponents) -> float:
    """A power of m times one of l."""
    return growth(cfg)[0] ** exponents[0] * growth(cfg)[1] ** exponents[1]


def treatment_factors(cfg: ModelConfig, path: str) -> dict[str, dict[str, float]]:
    """Optimizer -> what multiplies a weight's `lr`, `decay` and `eps` under it."""
    rules = {name: next(r for p, r in table.items() if re.search(p, path)) for name, table in RULES.items()}
    return {name: {k: factor(cfg, e) for k, e in rule._asdict().items()} for name, rule in rules.items()}


def attention_multiplier(cfg: ModelConfig) -> float:
    """Of the queries: scores fall with the head's width, not with its root (Yang et al. 2022, definition 4.1)."""
    wide = cfg.parametrization != "standard" and cfg.base_head_dim is not None
    return (cfg.base_head_dim / cfg.d_head) ** 0.5 if wide else 1.0
