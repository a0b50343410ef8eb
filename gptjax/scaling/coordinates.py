"""The coordinate check: do a few steps change the activations of a wide model as much as those of a narrow one?

Yang et al. 2022 (arXiv 2203.03466), appendix D.1. Where the change grows or shrinks with the width, the learning rate
that suits shifts with it; under muP, right to the last line of code, it keeps its size.
"""

import dataclasses
import json as json_format
import math
from typing import Any, Literal

from gptjax.config import Config
from gptjax.configfile import load_config
from gptjax.errors import UserError
from gptjax.process import prepare_process

TOLERANCE = 0.25  # of a slope; what a wrong exponent does is half a power of the width, or a whole one
SEQUENCES = 1  # of the one batch that every step sees: few tokens, so that small widths too are wide beside them


def coord_check(
    config: str,
    widths: str = "64,128,256,512",
    steps: int = 5,
    parametrization: Literal["standard", "mup", "completep"] | None = None,
    json: bool = False,
    out: str | None = None,
) -> None:
    """Measure how the change of the activations over a few steps grows with the width.

    Args:
        config: a config file of train.py; its heads keep their width and grow in number, its MLP grows in proportion.
        widths: values of model.d_model, with commas between them.
        steps: at the full learning rate, all on one batch.
        parametrization: instead of the config's; without model.base_width the narrowest width is the base.
        json: print one JSON object.
        out: a picture to draw, such as check.png.
    """
    values = [int(width) if width.strip().isdecimal() else 0 for width in widths.split(",")]
    if len(set(values)) < 2 or min(values) < 1:
        raise UserError(f"--widths {widths!r} must be two widths or more, such as 64,128,256")
    cfg = load_config([config])
    model = dataclasses.replace(cfg.model, base_width=cfg.model.base_width or min(values))
    model = dataclasses.replace(model, base_layers=model.base_layers or model.n_layers)
    model = dataclasses.replace(model, parametrization=parametrization or model.parametrization)
    sizes = [at_width(dataclasses.replace(cfg, model=model), width) for width in values]
    prepare_process()
    changes = [change_of_activations(size, steps) for size in sizes]
    found = describe(values, changes, model.parametrization)
    if out is not None:
        draw(found, out)
    print(json_format.dumps(found) if json else "\n".join(as_lines(found)))


def at_width(cfg: Config, width: int) -> Config:
    """The config with another d_model: as many times the heads and the MLP's width.

    Raises:
        UserError: heads of this width do not fill it.
    """
    model = cfg.model
    if width * model.n_heads % model.d_model or width * model.kv_heads % model.d_model:
        raise UserError(f"--widths {width} does not hold whole heads of {model.d_head}; give multiples of it")
    times = width / model.d_model
    heads, kv_heads, mlp = (round(n * times) for n in (model.n_heads, model.kv_heads, model.mlp_width))
    wide = {"n_heads": heads, "n_kv_heads": kv_heads, "d_mlp": mlp, "head_dim": model.d_head}
    return dataclasses.replace(cfg, model=dataclasses.replace(model, d_model=width, **wide))


def change_of_activations(cfg: Config, steps: int) -> dict[str, float]:
    """Root mean square, by kind of layer, of what so many steps change in the activations of the batch they see."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gptjax.data.batches import Batches, training_examples
    from gptjax.data.corpus import load_corpus
    from gptjax.nn.transformer import bind, logits
    from gptjax.sharding import make_mesh
    from gptjax.step import init_state, make_train_step, make_trainable
    from gptjax.trainer import with_vocabulary

    class Recorded(nnx.Module):
        """A block that hands out what it adds, in the place of its keys and values."""

        def __init__(self, block: Any):
            self.block = block

        def __call__(self, x, ctx, cache):
            attention, _ = self.block.attention(self.block.attention_norm(x), ctx, cache)
            after, _ = self.block(x, ctx, cache)
            mlp = (after - x) / self.block.multiplier - attention
            return after, {"embedding": x, "attention": attention, "mlp": mlp, "residual stream": after}

    corpus = load_corpus(cfg.data)
    constant = dataclasses.replace(cfg.optim, schedule="constant", warmup_steps=0, ema_decay=None)
    train = dataclasses.replace(cfg.train, batch_sequences=SEQUENCES, microbatches=1)
    cfg = with_vocabulary(dataclasses.replace(cfg, optim=constant, train=train), corpus)
    t = make_trainable(cfg, make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1]))
    examples = training_examples(corpus, cfg.data, cfg.model.context_length, SEQUENCES, cfg.seed)
    batch = Batches(examples, SEQUENCES, range(SEQUENCES))[0]

    def activations(params):
        model = bind(t.graphdef, params)
        model.blocks = Recorded(model.blocks)
        inputs = {name: batch[name] for name in ("positions", "segments") if name in batch}
        hidden, layers = model(jnp.asarray(batch["tokens"]), **inputs)
        first = {"embedding": layers.pop("embedding")[0], "residual stream": layers.pop("residual stream")[-1]}
        return {**first, **layers, "logits": logits(model, hidden)}

    state, step, record = init_state(t), make_train_step(t), jax.jit(activations)
    before = record(state.params)
    for _ in range(steps):
        state, _ = step(state, batch)
    moved = jax.tree.map(lambda a, b: jnp.sqrt(jnp.mean(jnp.square(a - b))), record(state.params), before)
    return {name: float(value) for name, value in moved.items()}


def describe(widths: list[int], changes: list[dict[str, float]], parametrization: str) -> dict[str, Any]:
    """The changes by kind of layer, the slope of their logs against the width's, and whether all are near 0."""
    import numpy as np

    layers = {}
    for name in changes[0]:
        rms = [change[name] for change in changes]
        finite = all(0 < value < math.inf for value in rms)
        slope = float(np.polyfit(np.log(widths), np.log(rms), 1)[0]) if finite else None
        layers[name] = {"rms": rms, "slope": slope}
    flat = all(layer["slope"] is not None and abs(layer["slope"]) <= TOLERANCE for layer in layers.values())
    return {"parametrization": parametrization, "widths": widths, "layers": layers, "flat": flat}


def as_lines(found: dict[str, Any]) -> list[str]:
    """A table for people, and the verdict."""
    lines = ["change at width  " + "".join(f"{width:10}" for width in found["widths"]) + "     slope"]
    for name, layer in found["layers"].items():
        slope = "      none" if layer["slope"] is None else f"{layer['slope']:+10.2f}"
        lines.append(f"{name:17}" + "".join(f"{value:10.3g}" for value in layer["rms"]) + slope)
    verdict = "keep their size with the width" if found["flat"] else "do not keep their size with the width"
    return [*lines, f"{found['parametrization']}: changes {verdict} (slopes within {TOLERANCE} of 0)"]


def draw(found: dict[str, Any], out: str) -> None:
    """Change against width, a line for each kind of layer; raises UserError where the picture cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, layer in found["layers"].items():
        axes.loglog(found["widths"], layer["rms"], "o-", base=2, label=name)
    axes.set(xlabel="width", ylabel="RMS of the change", title=found["parametrization"])
    axes.legend()
    try:
        figure.savefig(out, dpi=120, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {out!r}: {error}") from None
