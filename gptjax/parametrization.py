"""Roles: how a weight is treated, and how initial values, rates and multipliers follow the model's size.

A weight's role is stated where the weight is declared (`nn/layers.py:param`). Optimizer, decay, freezing and the
rules below follow from it.

A model of the config's base_width and base_layers is bitwise identical to the standard one. A model m times as wide
and l times as deep differs from it by the powers of m and l below. muP follows only the width: for it l is 1.

Sources: Yang et al. 2022 (arXiv 2203.03466), table 8, in which input and output weights may be tied; Dey et al. 2025
(CompleteP, arXiv 2505.01618), table 1 with alpha = 1, for depth, decay and eps; Yang et al. 2023 (arXiv 2310.17813),
condition 1, for Muon: its updates have the spectral norm that suits every width.
"""

from typing import Any, NamedTuple

from gptjax.config import ModelConfig
from gptjax.errors import nearest

Exponents = tuple[float, float]  # exponents of m and of l
Path = tuple[str, ...]  # the names that lead to a weight
Metadata = dict[Path, dict[str, Any]]  # what each weight's declaration says (`transformer.abstract_model`)


class Role(NamedTuple):
    """How the weights of a role are treated.

    Attributes:
        decays: whether weight decay applies.
        rule: the rule that updates them whatever the optimizer (`optim.RULES`); None: the optimizer's own.
        hidden: whether it is a matrix inside the network, whose update Muon orthogonalizes.
        lr: exponent of m in the learning rate of an entrywise optimizer (Adam).
        decay: exponent of m in the weight decay, which is multiplied by the rate.
        eps: exponent of m in Adam's eps; in a stack of layers eps is also divided by l.
    """

    decays: bool
    rule: str | None = None
    hidden: bool = False
    lr: float = 0
    decay: float = 0
    eps: float = -1


ROLES: dict[str, Role] = {
    "matrix": Role(decays=True, hidden=True, lr=-1, decay=1),
    "embed": Role(decays=True),
    "head": Role(decays=True),
    "position": Role(decays=False),
    "norm": Role(decays=False),
    "bias": Role(decays=False),
    "conv": Role(decays=False),
    "adapter": Role(decays=True, hidden=True),
    "router": Role(decays=True, lr=-1, decay=1),  # as an output: the experts are as many at every width
    "balance": Role(decays=False, rule="sign"),  # biases of the router, against an uneven load
}
# Kind of weight -> exponents of the factor of its initial standard deviation.
INIT_STDS = {
    "embed": (0, 0),
    "position": (0, 0),
    "matrix": (-0.5, 0),
    "residual": (-0.5, 0),
    "router": (-1, 0),
    "head": (0, 0),
}
# Exponents of the factors of the last hidden state, and of the output of a residual branch.
MULTIPLIERS = {"output": (-1, 0), "residual": (0, -1)}


def role_named(name: str) -> Role:
    """Return the role of this name.

    Raises:
        ValueError: the role is unknown; the message names the nearest.
    """
    if name not in ROLES:
        raise ValueError(f"role {name!r} is not in parametrization.ROLES{nearest(name, ROLES)}")
    return ROLES[name]


def growth(cfg: ModelConfig) -> tuple[float, float]:
    """Return m and l; 1 for a size that the parametrization does not follow."""
    base = cfg.parametrization
    m = 1.0 if base.kind == "standard" else cfg.d_model / base.base_width
    l = cfg.n_layers / base.base_layers if base.kind == "completep" else 1.0
    return m, l


def factor(cfg: ModelConfig, exponents: Exponents) -> float:
    """Return m and l to these powers, multiplied."""
    return growth(cfg)[0] ** exponents[0] * growth(cfg)[1] ** exponents[1]


def size_factors(cfg: ModelConfig, weight: dict[str, Any]) -> dict[str, float]:
    """Return the factors of a weight's `lr`, `decay` and `eps` under an entrywise optimizer.

    Args:
        weight: its `role` and `axes`, of its metadata (`transformer.abstract_model`).
    """
    role = role_named(weight["role"])
    if role.rule == "sign":  # an absolute step
        return {"lr": cfg.mlp.moe.balance_rate, "decay": 0.0, "eps": 1.0}
    depth = -1 if "layers" in weight["axes"] else 0
    exponents = {"lr": (role.lr, 0), "decay": (role.decay, 0), "eps": (role.eps, depth)}
    return {name: factor(cfg, powers) for name, powers in exponents.items()}


def attention_multiplier(cfg: ModelConfig) -> float:
    """Return the queries' factor: scores fall with the head's width, not its root (Yang et al. 2022, def. 4.1)."""
    base = cfg.parametrization
    wide = base.kind != "standard" and base.base_head_dim is not None
    return (base.base_head_dim / cfg.d_head) ** 0.5 if wide else 1.0
