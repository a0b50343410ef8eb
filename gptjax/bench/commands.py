"""`gptjax bench`: the commands, and what they print."""

import importlib.util
import json as json_format
from typing import Literal

from gptjax.bench.pairs import compare, show
from gptjax.errors import UserError

Size = Literal["tiny", "baby", "gpt2"]
# (batch, context, steps a turn) of training, so that a turn takes about a second on two cores.
TRAINING = {"tiny": (12, 64, 20), "baby": (16, 256, 2), "gpt2": (2, 512, 1)}
# Tokens that a greedy turn draws: within the smallest context, and short enough for the peer.
DRAWN = {"tiny": 48, "baby": 128, "gpt2": 48}


def train(
    size: Size = "tiny",
    peer: Literal["hf", "hf-compile"] | None = None,
    pairs: int = 7,
    dtype: Literal["float32", "bfloat16"] = "float32",
    cpu_devices: int | None = None,
    json: bool = False,
) -> None:
    """Tokens a second of training steps, beside PyTorch's.

    Args:
        size: of GPT-2's shape: tiny (0.8M parameters, 12 x 64 tokens), baby (10.65M, 16 x 256), gpt2 (124M, 2 x 512).
        peer: hf is transformers in PyTorch, hf-compile the same through torch.compile; none measures ours alone.
        pairs: turns of each side.
        dtype: of the matmuls (for the peer, of the weights too).
        cpu_devices: virtual devices of ours, over which the batch is cut.
        json: print one JSON object.
    """
    batch, context, steps = TRAINING[size]
    job = {"work": "train", "size": size, "batch": batch, "context": context, "steps": steps}
    job |= {"dtype": dtype, "cpu_devices": cpu_devices}
    _report(f"training {size}, {batch} x {context} tokens a step", job, peer, pairs, batch * context * steps, json)


def sample(
    size: Size = "tiny",
    batch: int = 1,
    peer: Literal["hf"] | None = None,
    pairs: int = 7,
    dtype: Literal["float32", "bfloat16"] = "float32",
    json: bool = False,
) -> None:
    """Tokens a second of greedy decoding, beside transformers' generate.

    Args:
        size: of GPT-2's shape: tiny (0.8M parameters), baby (10.65M), gpt2 (124M).
        batch: sequences at once.
        peer: hf is transformers in PyTorch; none measures ours alone.
        pairs: turns of each side.
        dtype: of the matmuls (for the peer, of the weights too).
        json: print one JSON object.
    """
    job = {"work": "sample", "size": size, "batch": batch, "new_tokens": DRAWN[size], "dtype": dtype}
    title = f"greedy decoding of {size}, batch {batch}, {DRAWN[size]} tokens after 16"
    _report(title, job, peer, pairs, batch * DRAWN[size], json)


def _report(title: str, job: dict, peer: str | None, pairs: int, tokens: int, as_json: bool) -> None:
    if pairs < 1:
        raise UserError(f"pairs {pairs} must be at least 1")
    if peer is not None and importlib.util.find_spec("transformers") is None:
        raise UserError(f"peer {peer} needs PyTorch and transformers: pip install -e '.[peer]'")
    ours = {"side": "gptjax", **job}
    found = compare(ours, None if peer is None else {**ours, "side": peer}, pairs, "tokens", tokens)
    sides = ["gptjax"] if peer is None else ["gptjax", peer]
    print(json_format.dumps(found) if as_json else show(title, found, sides))
