"""The coordinate check: do a few steps change the activations of a wide model as much as those of a narrow one?

Yang et al. 2022 (arXiv 2203.03466), appendix D.1. Where the change grows or shrinks with the width, the learning rate
shifts with it; under a correct muP, it is constant.
"""

import dataclasses
import json as json_format
from typing import Any, Literal

from gptjax.config import Config, override
from gptjax.configfile import load_config
from gptjax.errors import UserError
from gptjax.process import prepare_process
from gptjax.shell.display import significant, table
from gptjax.shell.paths import UserPath, writing

TOLERANCE = 0.25  # of a slope; a wrong exponent makes it half a power of the width, or a whole one


def coord_check(
    config: UserPath,
    widths: str = "64,128,256,512",
    steps: int = 6,
    parametrization: Literal["standard", "mup", "completep"] | None = None,
    json: bool = False,
    out: UserPath | None = None,
) -> None:
    """Measure how the change of the activations over a few steps grows with the width.

    Args:
        config: a config file of train.py; its heads keep their width and grow in number, its MLP grows in proportion.
        widths: values of model.d_model, separated by commas.
        steps: number of steps at the full learning rate, all on one sequence.
        parametrization: replaces the config's; without base_width the narrowest width is the base.
        json: print one JSON object.
        out: file of a picture to draw, such as check.png.
    """
    values = [int(width) if width.strip().isdecimal() else 0 for width in widths.split(",")]
    if len(set(values)) < 2 or min(values) < 1 or steps < 1:
        raise UserError(f"--widths {widths!r} --steps {steps}: give two widths or more, such as 64,128, and a step")
    cfg = load_config([config])
    given = cfg.model.parametrization
    name = parametrization or given.kind
    base = {
        "base_width": given.base_width or min(values),
        "base_layers": given.base_layers or cfg.model.n_layers,
    }
    cfg = override(cfg, {"model.parametrization": dataclasses.replace(given, kind=name, **base)})
    sizes = [at_width(cfg, width) for width in values]
    prepare_process()
    found = describe(values, [change_of_activations(size, steps) for size in sizes])
    if out is not None:
        draw(found, name, out)
    rows = [[layer, *map(significant, x["rms"]), f"{x['slope']:+.2f}"] for layer, x in found["layers"].items()]
    lines = table(rows, ["change at width", *map(str, values), "slope"])
    verdict = "keep" if found["flat"] else "do not keep"
    lines.append(f"{name}: changes {verdict} their size with the width (slopes within {TOLERANCE} of 0)")
    print(json_format.dumps({"parametrization": name, **found}) if json else "\n".join(lines))


def at_width(cfg: Config, width: int) -> Config:
    """Return the config with another d_model, heads and MLP in proportion; raise UserError for a part of a head."""
    m = cfg.model
    if width * m.n_heads % m.d_model or width * m.kv_heads % m.d_model or width * m.mlp_width % m.d_model:
        raise UserError(f"--widths {width} does not hold whole heads of {m.d_head}; give multiples of it")
    heads, kv_heads, mlp = (n * width // m.d_model for n in (m.n_heads, m.kv_heads, m.mlp_width))
    wide = {"d_model": width, "n_heads": heads, "n_kv_heads": kv_heads, "mlp.width": mlp, "head_dim": m.d_head}
    return dataclasses.replace(cfg, model=override(m, wide))


def change_of_activations(cfg: Config, steps: int) -> dict[str, float]:
    """Return the root mean square change of a sequence's activations over some steps on it, by kind of layer."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gptjax.data.batches import Batches, training_examples
    from gptjax.nn.transformer import Inputs, bind, logits
    from gptjax.sharding import make_mesh
    from gptjax.step import init_state, make_train_step, make_trainable
    from gptjax.trainer import load_corpus, with_vocabulary

    class Recorded(nnx.Module):
        """A block that returns what it adds in place of its cache."""

        def __init__(self, block: Any):
            self.block = block

        def __call__(self, x, ctx, cache):
            after, _, aux = self.block(x, ctx, cache)
            return after, {"embedding": x, **added_by(self.block, x, after, ctx), "residual stream": after}, aux

    # Few tokens, so that the width exceeds their number in narrow models, too: the limit that muP describes.
    train = dataclasses.replace(cfg.train, batch_sequences=1, microbatches=1)
    optim = dataclasses.replace(cfg.optim, schedule="constant", warmup_steps=0, ema_decay=None)
    corpus = load_corpus(cfg.data)
    cfg = with_vocabulary(dataclasses.replace(cfg, optim=optim, train=train), corpus)
    trainable = make_trainable(cfg, make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1]))
    batch = Batches(training_examples(corpus, cfg.data, cfg.model.context_length, 1, cfg.seed), 1, range(1))[0]

    def activations(params):
        model = bind(trainable.graphdef, params)
        model.blocks = Recorded(model.blocks)
        inputs = Inputs(batch["tokens"], batch.get("positions"), batch.get("segments"))
        x, layers, _ = model.apply_blocks(model.embed_inputs(inputs), inputs)
        layers |= {"embedding": layers["embedding"][0], "residual stream": layers["residual stream"][-1]}
        return {**layers, "logits": logits(model, model.readout(x))}

    state = init_state(trainable)
    step = make_train_step(trainable)
    record = jax.jit(activations)
    before = record(state.params)
    for _ in range(steps):
        state, _ = step(state, batch)
    changes = jax.tree.map(lambda a, b: jnp.sqrt(jnp.mean(jnp.square(a - b))), record(state.params), before)
    return {name: float(value) for name, value in changes.items()}


def added_by(block: Any, x: Any, after: Any, ctx: Any) -> dict[str, Any]:
    """Return what a block's attention and its MLP add to the residual stream, before the parametrization scales them.

    Args:
        block: an `nn.layers.Block`, without dropout.
        x: [B, T, D], the block's input.
        after: [B, T, D], the block's output.
        ctx: the context of the positions.
    """
    h, _ = block.convolve(block.attention_norm(x), block.attention_conv, ctx, None)
    attention, _ = block.attention(h, ctx, None)
    return {"attention": attention, "mlp": (after - x) / block.multiplier - attention}


def describe(widths: list[int], changes: list[dict[str, float]]) -> dict[str, Any]:
    """Return the changes by kind of layer, the slopes of their logs over the log width, and whether all are flat."""
    import numpy as np

    rms = {name: [change[name] for change in changes] for name in changes[0]}
    if not np.all(np.array(list(rms.values())) > 0):  # nan too
        raise UserError(
            "activations did not change, or are not finite any more; give another optim.peak_lr or --steps"
        )
    slopes = {name: float(np.polyfit(np.log(widths), np.log(values), 1)[0]) for name, values in rms.items()}
    layers = {name: {"rms": values, "slope": slopes[name]} for name, values in rms.items()}
    return {"widths": widths, "layers": layers, "flat": max(map(abs, slopes.values())) <= TOLERANCE}


def draw(found: dict[str, Any], name: str, out: str) -> None:
    """Draw the change against the width; raises UserError where the picture cannot be written."""
    try:
        from gptjax.figures.scaling import draw_coordinates
        from gptjax.figures.style import to_bytes
    except ImportError:
        raise UserError("--out needs matplotlib: pip install 'gptjax[plot]'") from None
    kind = "svg" if out.lower().endswith(".svg") else "png"
    layers = {layer: values["rms"] for layer, values in found["layers"].items()}
    slopes = {layer: values["slope"] for layer, values in found["layers"].items()}
    finding = f"{name}: the changes {'keep' if found['flat'] else 'do not keep'} their size with the width"
    with writing(out) as path:
        path.write_bytes(to_bytes(draw_coordinates(found["widths"], layers, slopes, finding), kind))
