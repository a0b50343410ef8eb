"""Train as train.py does, and do to this process what the variable GPTJAX_FAULT says, an object of JSON:

    {"kill": [PHASE, N, SECONDS]}   send SIGKILL so many seconds after the N-th time that PHASE begins
    {"fill": [PHASE, N, FOLDER]}    fill the file system of a folder at that moment
    {"limit": BYTES}                let no file become longer
    {"flip": STEP}                  flip a bit of a weight on one device of process 1 after this step
    {"disturb": [HOW, FIRST, LAST]} disturb the batches of these steps: see `DISTURBANCES`

PHASE is a name of gptjax.lifecycle.goodput.NAMES, or "prepare" (the token cache). A phase that does not
come changes nothing.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gptjax.step
from gptjax.cli import train
from gptjax.data import corpus
from gptjax.data.batches import Batches
from gptjax.lifecycle import goodput

# How the weights of the loss are multiplied. A power of two changes no number of a step; `mark_gradient` sees it.
DISTURBANCES = {"nan batch": float("nan"), "nan gradient": 2.0, "spike": 4.0}
SPIKE = 10.0


def kill_soon(after_s: float) -> None:
    """Send SIGKILL to this process after a time."""

    def kill() -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def fill_disk(folder: str) -> None:
    """Write to a file until its file system is full."""
    with Path(folder, "filler").open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)):
                pass
        except OSError:
            return


def act_in(phase: str, number: int, act: Callable[[], None]) -> None:
    """Call a function when a phase begins for the `number`-th time."""
    begun: list[str] = []

    def note() -> None:
        begun.append(phase)
        if len(begun) == number:
            act()

    if phase == "prepare":
        tokenize = corpus._tokenize
        corpus._tokenize = lambda *args: (note(), tokenize(*args))[1]
        return
    change = goodput.Clock._change

    def watched(clock: goodput.Clock, alter: Any) -> None:
        before = clock.names[-1]
        change(clock, alter)
        if clock.names[-1] == phase and before != phase:
            note()

    goodput.Clock._change = watched
    if phase == "start":
        note()


def disturb(how: str, first: int, last: int) -> None:
    """Multiply the weights of the loss in the batches of some steps."""
    iterate = Batches.iterate

    def disturbed(batches: Batches, start: int, *args: Any) -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(iterate(batches, start, *args), start + 1):
            factor = np.float32(DISTURBANCES[how] if first <= step <= last else 1)
            yield batch | {"weights": batch["weights"] * factor}

    Batches.iterate = disturbed
    gptjax.step.make_gradient = mark_gradient(gptjax.step.make_gradient)


def mark_gradient(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return `make_gradient` with gradients that are not finite, or loss and gradient SPIKE times as large, where the
    weights of the loss say so.
    """

    def make_marked(t: Any) -> Any:
        gradient = make(t)

        def marked(trained: Any, frozen: Any, batch: Any, key: Any) -> Any:
            mark = batch["weights"].max()
            (weight, terms), grads = gradient(trained, frozen, batch, key)
            nothing = jnp.where(mark == DISTURBANCES["nan gradient"], jnp.nan, 0.0)
            factor = jnp.where(mark == DISTURBANCES["spike"], SPIKE, 1.0)
            name = next(iter(terms))
            terms = terms | {name: (terms[name][0] * factor, terms[name][1])}
            return (weight, terms), jax.tree.map(lambda g: g * factor + nothing, grads)

        return marked

    return make_marked


def flip_bit(at_step: int) -> None:
    """Flip a bit of the first weight, as the first device of process 1 holds it, after a step."""
    make = gptjax.step.make_train_step

    def make_faulty(t: Any) -> Any:
        step = make(t)

        def faulty(state: Any, batch: Any) -> Any:
            state, metrics = step(state, batch)
            if int(state.step) == at_step and jax.process_index() == 1:
                leaves, tree = jax.tree.flatten(state.params)
                leaves[0] = with_flipped_bit(leaves[0])
                state = state._replace(params=jax.tree.unflatten(tree, leaves))
            return state, metrics

        return faulty

    gptjax.step.make_train_step = make_faulty


def with_flipped_bit(x: jax.Array) -> jax.Array:
    """Return an array of which one device holds other bits."""
    parts = [np.array(shard.data) for shard in x.addressable_shards]
    parts[0].view(np.uint32).flat[5] ^= 1 << 3
    placed = [jax.device_put(part, shard.device) for part, shard in zip(parts, x.addressable_shards, strict=True)]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    fault = json.loads(os.environ.get("GPTJAX_FAULT", "{}"))
    if "kill" in fault:
        phase, number, after_s = fault["kill"]
        act_in(phase, number, lambda: kill_soon(after_s))
    if "fill" in fault:
        phase, number, folder = fault["fill"]
        act_in(phase, number, lambda: fill_disk(folder))
    if "limit" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
    if "flip" in fault:
        flip_bit(fault["flip"])
    if "disturb" in fault:
        disturb(*fault["disturb"])
    sys.exit(train(sys.argv[1:]))
