"""The commands of `gptjax bench`, and what they print."""

import importlib.util
import json as json_format
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from gptjax.apps.bench.adapters import BATCH, CONTEXT, PRESET, STEPS
from gptjax.apps.bench.launched import seconds_to_first_step
from gptjax.apps.bench.pairs import Side, compare, is_checkout, machine, machine_line, show
from gptjax.apps.bench.worker import STRETCH
from gptjax.configfile import config_from_dict, load_config
from gptjax.errors import UserError, nearest
from gptjax.paths import UserPath

Size = Literal["tiny", "baby", "gpt2"]
# (batch, context, steps of a turn) of training, so that a turn takes about a second on two cores.
TRAINING = {"tiny": (12, 64, 20), "baby": (16, 256, 2), "gpt2": (2, 512, 1)}
# Tokens of a greedy completion, within the smallest context, and completions of a turn. A tiny model's completion
# takes milliseconds; many in a turn hide the cost of caches that the other side's turn has evicted.
SAMPLING = {"tiny": (48, 64), "baby": (128, 1), "gpt2": (48, 1)}


def train(
    size: Size = "tiny",
    peer: str | None = None,
    pairs: int = 7,
    dtype: Literal["float32", "bfloat16"] = "float32",
    cpu_devices: int | None = None,
    json: bool = False,
) -> None:
    """Measure training steps in tokens per second, alone or against PyTorch.

    Args:
        size: model and batch, in GPT-2's architecture: tiny (0.8M parameters, 12 x 64 tokens), baby (10.65M,
            16 x 256) or gpt2 (124M, 2 x 512).
        peer: what to compare with: hf (transformers in PyTorch), hf-compile (the same with torch.compile), or the
            path of another checkout of gptjax. Without it, only this checkout is measured.
        pairs: turns of each side; raise it on a noisy machine.
        dtype: data type of the matmuls (for the peer, also of the weights).
        cpu_devices: number of virtual devices that gptjax shards the batch over.
        json: print one JSON object instead of text.
    """
    _check_known(peer, ("hf", "hf-compile"))
    job = _training(size, dtype, cpu_devices)
    title = f"training {size}, {job['batch']} x {job['context']} tokens a step"
    _report(title, job, peer, pairs, job["batch"] * job["context"] * job["steps"], json)


def lora(
    rank: int = 4,
    base_dtype: Literal["float32", "bfloat16", "int8"] = "float32",
    peer: str | None = None,
    pairs: int = 7,
    json: bool = False,
) -> None:
    """Measure training of adapters on SmolLM2-135M's shape in tokens per second, alone or beside another way.

    Args:
        rank: rank of the adapters, on every matrix of the blocks.
        base_dtype: how the frozen weights are held.
        peer: what to compare with: peft (in PyTorch), full (our full fine-tuning of the same batch),
            or the path of another checkout of gptjax. Without it, only this checkout is measured.
        pairs: turns of each side; raise it on a noisy machine.
        json: print one JSON object instead of text.
    """
    _check_known(peer, ("peft", "full"))
    if rank < 1:
        raise UserError(f"rank {rank} must be at least 1")
    job = {"work": "lora", "side": "gptjax", "rank": rank, "base_dtype": base_dtype}
    title = f"adapters of rank {rank} on {PRESET}, {BATCH} x {CONTEXT} tokens a step"
    _report(title, job, peer, pairs, BATCH * CONTEXT * STEPS, json)


def sample(
    size: Size = "tiny",
    batch: int = 1,
    peer: str | None = None,
    pairs: int = 7,
    dtype: Literal["float32", "bfloat16"] = "float32",
    json: bool = False,
) -> None:
    """Measure greedy decoding in tokens per second, alone or against transformers' generate.

    Args:
        size: model, in GPT-2's architecture: tiny (0.8M parameters), baby (10.65M) or gpt2 (124M).
        batch: number of sequences decoded together.
        peer: what to compare with: hf (transformers in PyTorch), or the path of another checkout of gptjax. Without
            it, only this checkout is measured.
        pairs: turns of each side; raise it on a noisy machine.
        dtype: data type of the matmuls (for the peer, also of the weights).
        json: print one JSON object instead of text.
    """
    _check_known(peer, ("hf",))
    drawn, completions = SAMPLING[size]
    job = {
        "work": "sample",
        "side": "gptjax",
        "size": size,
        "batch": batch,
        "new_tokens": drawn,
        "completions": completions,
        "dtype": dtype,
    }
    title = f"greedy decoding of {size}, batch {batch}, {drawn} tokens after 16"
    _report(title, job, peer, pairs, batch * drawn * completions, json)


def data(tokenizer: str = "byte", path: UserPath = "shakespeare", pairs: int = 5, json: bool = False) -> None:
    """Measure tokenization in megabytes per second, and whether batches are loaded faster than training uses them.

    Args:
        tokenizer: the tokenizer, as in data.tokenizer: byte, char, gpt2, or the path of a tokenizer.json.
        path: the text, as in data.path.
        pairs: number of measurements, of which the median is reported.
        json: print one JSON object instead of text.
    """
    _check_pairs(pairs)
    from gptjax.data.batches import Batches, training_examples
    from gptjax.data.corpus import load_corpus

    batch, context, steps = TRAINING["tiny"]
    seconds, rates = [], []
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as cache:
            read = {"path": path, "tokenizer": tokenizer, "cache_dir": cache}
            cfg = config_from_dict({"workdir": "-", "data": read})
            began = time.perf_counter()
            corpus = load_corpus(cfg.data)
            seconds.append(time.perf_counter() - began)
            batches = Batches(training_examples(corpus, cfg.data, context, batch, 0), batch, range(batch))
            rates.append(_delivered(batches, 4000))
    source = corpus.sources[0]
    # Bytes of the whole text, from those of its validation part.
    text_bytes = source.val_bytes / len(source.val) * (source.train_tokens + len(source.val))
    delivered = statistics.median(rates)
    consumed = compare(_training("tiny", "float32", None), None, pairs, "batches", steps)["gptjax"]["median"]
    rate = text_bytes / statistics.median(seconds) / 1e6
    found = {"machine": machine(), "mb_per_s": rate, "delivered_per_s": delivered, "consumed_per_s": consumed}
    text = (
        f"{path} to ids by {tokenizer}: {rate:.1f} MB/s ({text_bytes / 1e6:.2f} MB, median of {pairs})\n"
        f"batches of {batch} x {context} tokens: {delivered:,.0f} a second delivered, {consumed:,.1f} consumed by "
        f"the tiny model: {delivered / consumed:,.0f}x"
    )
    _print(found, text, json)


def _delivered(batches: Any, count: int) -> float:
    """Return the batches per second that a run's data loader delivers without training."""
    incoming = batches.iterate(0, prefetch=8)
    next(incoming)
    began = time.perf_counter()
    for _ in range(count):
        next(incoming)
    incoming.close()
    return count / (time.perf_counter() - began)


def startup(config: UserPath, pairs: int = 3, json: bool = False) -> None:
    """Measure the seconds from the command to the end of the first step, without caches and with them.

    Args:
        config: a config file of train.py, such as configs/quickstart.yaml.
        pairs: number of measurements of each, of which the median is reported.
        json: print one JSON object instead of text.
    """
    _check_pairs(pairs)
    load_config([config])  # reports a mistake in the config before anything starts
    cold, warm = [], []
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(seconds_to_first_step(config, cache))
            warm.append(seconds_to_first_step(config, cache))
    found = {"machine": machine(), "cold_s": statistics.median(cold), "cached_s": statistics.median(warm)}
    text = (
        f"{config}: {found['cold_s']:.1f} s to the first step cold (neither tokens nor programs cached), "
        f"{found['cached_s']:.1f} s with both; medians of {pairs}"
    )
    _print(found | {"all": {"cold_s": cold, "cached_s": warm}}, text, json)


def loop(config: UserPath, steps: int = 500, pairs: int = 3, json: bool = False) -> None:
    """Measure the overhead of the training loop: the time of a run divided by that of its compiled steps alone.

    Args:
        config: a config file of train.py, such as configs/quickstart.yaml.
        steps: steps of a run, at least 100; evaluations and the first 50 steps are not counted.
        pairs: number of runs, each interleaved with as many steps alone.
        json: print one JSON object instead of text.
    """
    _check_pairs(pairs)
    if steps < 2 * STRETCH:
        raise UserError(
            f"steps {steps} must be at least {2 * STRETCH}: the first {STRETCH}, which compile, are left out"
        )
    rare = ["--train.eval_interval_steps", "1000000", "--train.eval_sequences", "12"]
    flags = [config, *rare, "--checkpoint.save_interval_steps", "1000000", "--train.total_steps", str(steps)]
    load_config(flags)  # reports a mistake in the config before anything starts
    side = Side({"work": "loop", "side": "gptjax", "flags": flags})
    turns = [side.turn() for _ in range(pairs)]
    side.close()
    ratios = [turn["ratio"] for turn in turns]
    median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    times = f"{1000 * median['run_step_s']:.2f} ms a step in a run, {1000 * median['step_s']:.2f} alone"
    ratio = f"{median['ratio']:.3f}x ({min(ratios):.3f} to {max(ratios):.3f} in {pairs} pairs)"
    text = f"{config}, {steps} steps\n{machine_line(machine())}\n  {times}: {ratio}"
    _print({"machine": machine(), **median, "all": turns}, text, json)


def reach(
    config: UserPath, text: UserPath, peer: Literal["nanoGPT"] | None = None, pairs: int = 1, json: bool = False
) -> None:
    """Measure the tokens and seconds that a run takes to its loss, alone or against nanoGPT's recipe in PyTorch.

    Args:
        config: a config file of train.py with a char tokenizer and the last tenth for validation, as in nanoGPT.
        text: the text file that both sides read, such as tinyshakespeare.txt.
        peer: nanoGPT trains its recipe for a CPU (2,000 steps of 12 x 64 tokens) in PyTorch. Without it, only gptjax
            is measured.
        pairs: runs of each side.
        json: print one JSON object instead of text.
    """
    _check_pairs(pairs)
    _check_peer(peer)
    if not Path(text).exists():
        raise UserError(f"there is no file {text}; give the path of a text such as tinyshakespeare.txt")
    load_config([config])
    job = {"work": "reach", "text": text, "flags": [config, "--data.path", text]}
    sides = [Side({**job, "side": name}) for name in ("gptjax", *([] if peer is None else [peer]))]
    turns = [[side.turn() for side in sides] for _ in range(pairs)]
    rows = {side.name: [turn[number] for turn in turns] for number, side in enumerate(sides)}
    for side in sides:
        side.close()
    lines = [f"{config} on {text}", machine_line(machine())]
    for name, runs in rows.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"  {name:12} validation loss {median['val/loss']:.4f} after {median['tokens']:12,.0f} tokens and "
            f"{median['seconds']:7.1f} s"
        )
    found: dict[str, Any] = {"machine": machine(), "runs": rows}
    if peer is not None:
        found["ratio"] = statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in turns)
        lines.append(f"  ratio        {found['ratio']:.3f} of its time")
    _print(found, "\n".join(lines), json)


def _training(size: str, dtype: str, cpu_devices: int | None) -> dict[str, Any]:
    batch, context, steps = TRAINING[size]
    job = {"work": "train", "side": "gptjax", "size": size, "batch": batch, "context": context, "steps": steps}
    return job | {"dtype": dtype, "cpu_devices": cpu_devices}


def _check_pairs(pairs: int) -> None:
    if pairs < 1:
        raise UserError(f"pairs {pairs} must be at least 1")


def _check_known(peer: str | None, names: Sequence[str]) -> None:
    if peer is not None and peer not in names and not is_checkout(peer):
        known = f"neither {' nor '.join(names)} nor a checkout of gptjax"
        raise UserError(f"--peer {peer!r} is {known}{nearest(peer, names)}")


def _check_peer(peer: str | None) -> None:
    package = {"full": "jax", "peft": "peft"}.get(peer or "", "transformers")
    if peer is not None and not is_checkout(peer) and importlib.util.find_spec(package) is None:
        raise UserError(f"peer {peer} needs PyTorch, transformers and peft: pip install -e '.[peer]'")


def _report(title: str, job: dict, peer: str | None, pairs: int, tokens: int, as_json: bool) -> None:
    _check_pairs(pairs)
    _check_peer(peer)
    found = compare(job, peer, pairs, "tokens", tokens)
    _print(found, show(title, found, ["gptjax"] if peer is None else ["gptjax", peer]), as_json)


def _print(found: dict[str, Any], text: str, as_json: bool) -> None:
    print(json_format.dumps(found) if as_json else text)


VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "lora": lora,
    "sample": sample,
    "data": data,
    "startup": startup,
    "loop": loop,
    "reach": reach,
}
