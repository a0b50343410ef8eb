"""The commands of `gptjax bench`, and what they print."""

import importlib.util
import json as json_format
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from gptjax.apps.bench.adapters import BATCH, CONTEXT, PRESET, STEPS
from gptjax.apps.bench.corpora import encode_beside_tiktoken, measure_loading, prepare_beside_the_tokenizer
from gptjax.apps.bench.launched import seconds_to_first_step
from gptjax.apps.bench.limits import Load
from gptjax.apps.bench.pairs import (
    Side,
    busy,
    choose_fastest,
    compare,
    fastest_products,
    is_checkout,
    machine,
    machine_line,
    measure_limits,
    show,
)
from gptjax.apps.bench.worker import PYTORCH, SIZES, STRETCH
from gptjax.configfile import config_from_dict, load_config
from gptjax.errors import UserError, nearest
from gptjax.shell.display import table
from gptjax.shell.paths import UserPath

Size = Literal["tiny", "baby", "gpt2"]
# (batch, context, steps of a turn) of training, so that a turn takes about a second on two cores.
TRAINING = {"tiny": (12, 64, 20), "baby": (16, 256, 2), "gpt2": (2, 512, 1)}
# Tokens of a greedy completion, within the smallest context, and completions of a turn. A tiny model's completion
# takes milliseconds; many in a turn hide the cost of caches that the other side's turn has evicted.
SAMPLING = {"tiny": (48, 64), "baby": (128, 1), "gpt2": (48, 1)}
BEST = "hf-best"  # the fastest of PYTORCH
CACHED_BYTES = 2**28  # weights of fewer bytes may stay in the processor's caches


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
        peer: what to compare with: hf (transformers in PyTorch), hf-compile (the same with torch.compile), hf-bf16 or
            hf-compile-bf16 (under autocast to bfloat16), hf-best (the fastest of these four here), or the path of
            another checkout of gptjax. Without it, only this checkout is measured.
        pairs: turns of each side; raise it on a noisy machine.
        dtype: data type of the matmuls (for the peer, also of the weights).
        cpu_devices: number of virtual devices that gptjax shards the batch over.
        json: print one JSON object instead of text.
    """
    _check_known(peer, (*PYTORCH, BEST))
    job = _training(size, dtype, cpu_devices)
    title = f"training {size}, {job['batch']} x {job['context']} tokens a step"

    def share(rate: float) -> dict[str, Any]:
        backend, limit = fastest_products(measure_limits(size, job["batch"] * job["context"], [dtype]), dtype)
        needed = _flops_per_token(size, job["context"])
        limit_text = f"products' limit {limit / 1e9:,.0f} GFLOP/s ({backend}, {dtype})"
        return {"of": limit_text, "value": rate * needed / limit}

    _report(title, job, peer, pairs, job["batch"] * job["context"] * job["steps"], json, share)


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
        peer: what to compare with: hf, hf-compile, hf-bf16, hf-compile-bf16 or hf-best, as in `bench train`, or the
            path of another checkout of gptjax. Without it, only this checkout is measured.
        pairs: turns of each side; raise it on a noisy machine.
        dtype: data type of the matmuls (for the peer, also of the weights).
        json: print one JSON object instead of text.
    """
    _check_known(peer, (*PYTORCH, BEST))
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
    step_bytes = _bytes_per_step(size, dtype)

    def share(rate: float) -> dict[str, Any]:
        limit = measure_limits("tiny", 1, [])["bytes_per_s"]["read"]
        return {"of": f"memory's limit {limit / 1e9:,.1f} GB/s read", "value": rate / batch * step_bytes / limit}

    in_memory = step_bytes >= CACHED_BYTES  # a smaller model's weights stay in the processor's caches
    _report(title, job, peer, pairs, batch * drawn * completions, json, share if in_memory else None)


def machine_limits(size: Size = "baby", json: bool = False) -> None:
    """Measure what this machine can do: products at a model's shapes by each backend of XLA, and memory bandwidth.

    Args:
        size: whose products, with the batch of `bench train`: tiny, baby or gpt2.
        json: print one JSON object instead of text.
    """
    batch, context, _ = TRAINING[size]
    load = Load()
    found = measure_limits(size, batch * context, ["float32", "bfloat16"])
    found |= {"machine": machine(), "warnings": load.warnings()}
    rates = found["flops_per_s"]
    rows = [
        (
            backend,
            *("no" if rates[dtype][backend] is None else f"{rates[dtype][backend] / 1e9:,.0f}" for dtype in rates),
        )
        for backend in rates["float32"]
    ]
    lines = [
        f"{machine_line(found['machine'])}; {' '.join(found['instructions'])}",
        f"products of {size}, forward and backward, {batch * context:,} tokens, in GFLOP/s",
        *table(rows, ("", *rates)),
        "memory: " + ", ".join(f"{kind} {rate / 1e9:,.1f} GB/s" for kind, rate in found["bytes_per_s"].items()),
    ]
    _print(found, "\n".join([*lines, *busy(found["warnings"])]), json)


def _flops_per_token(size: str, context: int) -> float:
    from gptjax.nn.transformer import flops_per_token

    return flops_per_token(config_from_dict({"model": {**SIZES[size], "context_length": context}}).model)


def _bytes_per_step(size: str, dtype: str) -> int:
    """Return the bytes of the weights that a step of decoding reads: all but the positions; the head is tied."""
    from gptjax.nn.transformer import count_params

    counts = count_params(config_from_dict({"model": SIZES[size]}).model)
    return (counts["total"] - counts["positions"]) * (2 if dtype == "bfloat16" else 4)


def data(
    tokenizer: str = "byte",
    path: UserPath = "shakespeare",
    peer: Literal["tiktoken"] | None = None,
    pairs: int = 5,
    json: bool = False,
) -> None:
    """Measure tokenization in megabytes per second, and whether batches are loaded faster than training uses them.

    Args:
        tokenizer: the tokenizer, as in data.tokenizer: byte, char, gpt2, or the path of a tokenizer.json.
        path: the text, as in data.path.
        peer: tiktoken encodes the same documents by its own encode_ordinary_batch, on all cores. Without it, only
            gptjax is measured.
        pairs: number of measurements, of which the median is reported.
        json: print one JSON object instead of text.
    """
    _check_pairs(pairs)
    load = Load()
    batch, context, steps = TRAINING["tiny"]
    found: dict[str, Any] = {"machine": machine()}
    found |= measure_loading(tokenizer, path, pairs, batch, context)
    line = f"{path} to ids by {tokenizer}, written into the token cache: {found['mb_per_s']:.1f} MB/s"
    lines = [machine_line(found["machine"]), f"{line} ({found['text_mb']:.2f} MB, median of {pairs})"]
    if peer is not None:
        found |= {"ratio": encode_beside_tiktoken(tokenizer, path, pairs)}
        lines.append(f"the same beside tiktoken's encode_ordinary_batch: {_interval(found['ratio'])}")
    consumed = compare(_training("tiny", "float32", None), None, pairs, "batches", steps)["gptjax"]["median"]
    delivered = found["delivered_per_s"]
    lines.append(
        f"batches of {batch} x {context} tokens: {delivered:,.0f} a second delivered, {consumed:,.1f} consumed by "
        f"the tiny model: {delivered / consumed:,.0f}x"
    )
    found |= {"consumed_per_s": consumed, "warnings": load.warnings(found.get("ratio", {}).get("all", ()))}
    _print(found, "\n".join([*lines, *busy(found["warnings"])]), json)


def prepare(path: UserPath, tokenizer: str = "gpt2", pairs: int = 3, json: bool = False) -> None:
    """Measure `gptjax data prepare` in megabytes of text per second, beside its tokenizer alone on all cores.

    Args:
        path: the source, such as a large .jsonl file; all of its text must fit into memory.
        tokenizer: the tokenizer, as in data.tokenizer.
        pairs: number of measurements of each, of which the medians are reported.
        json: print one JSON object instead of text.
    """
    _check_pairs(pairs)
    load = Load()
    found = {"machine": machine(), **prepare_beside_the_tokenizer(tokenizer, path, pairs)}
    found["warnings"] = load.warnings(found["share"]["all"])
    lines = [
        machine_line(found["machine"]),
        f"{path}, {found['text_mb']:,.0f} MB of text: prepared at {found['prepare_mb_per_s']:.1f} MB/s, "
        f"encoded alone at {found['tokenizer_mb_per_s']:.1f} MB/s: {_interval(found['share'])}",
        *busy(found["warnings"]),
    ]
    _print(found, "\n".join(lines), json)


def _interval(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f} in {len(ratio['all'])} pairs)"


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


def _report(
    title: str,
    job: dict[str, Any],
    peer: str | None,
    pairs: int,
    tokens: int,
    as_json: bool,
    share: Callable[[float], dict[str, Any]] | None = None,
) -> None:
    """Compare, and print the result; `share` says how much of the machine's limit a rate of ours is."""
    _check_pairs(pairs)
    _check_peer(peer)
    tried = {}
    if peer == BEST:
        # One completion tells which is fastest; a turn of a slow peer takes half a minute.
        peer, tried = choose_fastest(job | ({"completions": 1} if "completions" in job else {}), PYTORCH)
    found = compare(job, peer, pairs, "tokens", tokens)
    if tried:
        found["tried"] = tried
    if share is not None:
        found["share"] = share(found["gptjax"]["median"])
    _print(found, show(title, found, ["gptjax"] if peer is None else ["gptjax", peer]), as_json)


def _print(found: dict[str, Any], text: str, as_json: bool) -> None:
    print(json_format.dumps(found) if as_json else text)


VERBS: dict[str, Callable[..., None]] = {
    "machine": machine_limits,
    "train": train,
    "lora": lora,
    "sample": sample,
    "data": data,
    "prepare": prepare,
    "startup": startup,
    "loop": loop,
    "reach": reach,
}
