"""One side of a comparison: build the job, then do one turn of it for every line of standard input.

python -m gptjax.apps.bench.worker '{"side": "gptjax", "work": "train", "size": "tiny", ...}'
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.apps.bench.adapters import train_adapters, train_in_peft
from gptjax.apps.bench.limits import instructions, measure_memory, measure_products, product_shapes

# GPT-2's shape throughout, so that both sides are the same model. tiny: nanoGPT's for a CPU; baby: its "baby GPT".
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layers": 4, "n_heads": 4, "d_model": 128, "context_length": 64, "vocab_size": 65},
    "baby": {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": 256, "vocab_size": 65},
    "gpt2": {"n_layers": 12, "n_heads": 12, "d_model": 768, "context_length": 1024, "vocab_size": 50257},
}
ADAMW = {"peak_lr": 6e-4, "b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0, "schedule": "constant"}
PROMPT_TOKENS = 16
# nanoGPT's flags for a CPU (its README): steps, sequences a step, warm-up, peak and final rate.
NANOGPT = {"steps": 2000, "batch": 12, "context": 64, "warmup": 100, "peak_lr": 1e-3, "final_lr": 1e-4}

STRETCH = 50  # steps of a run, and of its compiled step alone, that alternate
Turn = Callable[[], dict[str, Any] | None]  # its own figures; None: its seconds are measured


def random_ids(job: dict[str, Any], length: int) -> np.ndarray:
    """Return random token ids, [batch, length] int32, the same for both sides."""
    return np.random.default_rng(0).integers(0, SIZES[job["size"]]["vocab_size"], (job["batch"], length), np.int32)


def train_ours(job: dict[str, Any]) -> Turn:
    """Return a turn of the trainer's compiled step, with batches put on the device as its loop does."""
    from gptjax.configfile import config_from_dict
    from gptjax.process import prepare_process

    model = {**SIZES[job["size"]], "context_length": job["context"], "vocab_multiple": 1, "dtype": job["dtype"]}
    chunks = 4 if job["size"] == "gpt2" else 1  # half of those in configs/gpt2_124m.yaml, as is the context
    train = {"batch_sequences": job["batch"], "loss_chunks": chunks}
    values = {"workdir": "-", "model": model, "train": train, "optim": ADAMW}
    cfg = config_from_dict({**values, "mesh": {"cpu_devices": job["cpu_devices"]}})
    prepare_process(cfg.mesh.cpu_devices)
    return _steps(cfg, job["steps"])


def _steps(cfg: Any, count: int) -> Turn:
    import jax

    from gptjax.sharding import make_mesh
    from gptjax.step import init_state, make_train_step, make_trainable

    t = make_trainable(cfg, make_mesh(cfg.mesh.axes))
    step, state = make_train_step(t), init_state(t)
    shape = (cfg.train.batch_sequences, cfg.model.context_length + 1)
    ids = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones_like(ids[:, 1:], np.float32)}

    def turn() -> None:
        nonlocal state
        for _ in range(count):
            state, _ = step(state, jax.device_put(batch, t.batch_sharding))
        jax.block_until_ready(state)

    return turn


def _peer_model(job: dict[str, Any], context: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    size = SIZES[job["size"]]
    config = GPT2Config(
        n_layer=size["n_layers"],
        n_head=size["n_heads"],
        n_embd=size["d_model"],
        n_positions=context,
        vocab_size=size["vocab_size"],
        bos_token_id=None,
        eos_token_id=None,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return GPT2LMHeadModel(config).to(getattr(torch, "float32" if _autocasts(job) else job["dtype"]))


def _autocasts(job: dict[str, Any]) -> bool:
    """Return whether the peer keeps float32 weights and multiplies in bfloat16, as PyTorch's users do on a CPU."""
    return job["side"].endswith("-bf16")


def _autocast(job: dict[str, Any]) -> Any:
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=_autocasts(job))


def train_peer(job: dict[str, Any]) -> Turn:
    """Return a turn of the same steps by transformers and PyTorch's AdamW."""
    import torch

    model = _peer_model(job, job["context"])
    model = torch.compile(model) if "compile" in job["side"] else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=ADAMW["peak_lr"], betas=(ADAMW["b1"], ADAMW["b2"]), weight_decay=ADAMW["weight_decay"]
    )
    ids = torch.from_numpy(random_ids(job, job["context"]).astype(np.int64))

    def turn() -> None:
        for _ in range(job["steps"]):
            with _autocast(job):
                loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["clip_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return turn


def sample_ours(job: dict[str, Any]) -> Turn:
    """Return a turn of greedy completions by LanguageModel.complete, from text to text."""
    from gptjax.configfile import config_from_dict
    from gptjax.process import prepare_process

    prepare_process()
    import jax

    from gptjax.generate import LanguageModel, Sampling
    from gptjax.nn.transformer import init_params
    from gptjax.tokenizers import CharTokenizer

    cfg = config_from_dict({"model": {**SIZES[job["size"]], "dtype": job["dtype"]}}).model
    alphabet = "".join(chr(0x10000 + i) for i in range(cfg.vocab_size))  # one character a token, whatever the size
    params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    lm = LanguageModel(cfg, params, CharTokenizer(alphabet), delete=True)
    prompts = [lm.tokenizer.decode(row) for row in random_ids(job, PROMPT_TOKENS).tolist()]

    def turn() -> None:
        for _ in range(job["completions"]):
            lm.complete(prompts, job["new_tokens"], Sampling(temperature=0))

    return turn


def sample_peer(job: dict[str, Any]) -> Turn:
    """Return a turn of the same completions by transformers' generate, from ids to ids."""
    import torch
    from transformers.generation.configuration_utils import CompileConfig

    model = _peer_model(job, SIZES[job["size"]]["context_length"]).eval()
    ids = torch.from_numpy(random_ids(job, PROMPT_TOKENS).astype(np.int64))
    ones, how = torch.ones_like(ids), {"max_new_tokens": job["new_tokens"], "do_sample": False, "pad_token_id": 0}
    if "compile" in job["side"]:
        # transformers compiles the step of generate over a cache of fixed size, by default on GPUs alone.
        compiling = CompileConfig(fullgraph=False, mode="default")
        compiling._compile_all_devices = True
        how |= {"cache_implementation": "static", "compile_config": compiling}

    def turn() -> None:
        for _ in range(job["completions"]):
            with _autocast(job):
                model.generate(ids, attention_mask=ones, **how)

    return turn


class Alternating:
    """A hook that pauses its run every STRETCH steps for as many steps of the compiled step alone.

    Changes in the machine's speed then affect both alike. While the run is paused, the data loader fills no more than
    its buffer. It is no subclass of `hooks.Hook`, which imports JAX before this process has set its devices up.
    """

    def __init__(self, alone: Turn):
        self.alone, self.turned, self.resumed_at = alone, 0, time.perf_counter()
        self.pairs: list[tuple[float, float]] = []  # seconds a step, in the run and alone

    def before_step(self, step: int) -> None: ...

    def after_step(self, end: Any) -> None:
        if end.step >= self.turned + STRETCH:
            end.state.step.block_until_ready()
            began = time.perf_counter()
            self.alone()
            ended = time.perf_counter()
            run_s = (began - self.resumed_at) / (end.step - self.turned)
            self.pairs.append((run_s, (ended - began) / STRETCH))
            self.turned, self.resumed_at = end.step, time.perf_counter()

    def ends_run(self, step: int) -> None: ...

    def close(self) -> None: ...


def loop(job: dict[str, Any]) -> Turn:
    """Return a turn of a whole run by the trainer, without its first stretch, which compiles."""
    cfg, train = _run(job["flags"])
    from gptjax.data.corpus import load_corpus
    from gptjax.trainer import with_vocabulary

    alone = _steps(with_vocabulary(cfg, load_corpus(cfg.data)), STRETCH)

    def turn() -> dict[str, float]:
        alternating = Alternating(alone)
        train(cfg, [alternating])
        run, pure = (statistics.mean(side) for side in zip(*alternating.pairs[1:], strict=True))
        return {"run_step_s": run, "step_s": pure, "ratio": run / pure}

    return turn


def _run(flags: list[str]) -> tuple[Any, Callable[..., list[dict[str, float]]]]:
    """Return a command line's config, and a function that trains it in a new directory and returns its metrics."""
    from gptjax.configfile import load_config
    from gptjax.process import prepare_process

    loaded = load_config(flags)
    prepare_process(loaded.mesh.cpu_devices)
    from dataclasses import replace

    from gptjax.trainer import train

    def train_in_new_directory(cfg: Any, hooks: Sequence[Any] = ()) -> list[dict[str, float]]:
        with tempfile.TemporaryDirectory() as workdir:
            train(replace(cfg, workdir=workdir), hooks)
            return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]

    return loaded, train_in_new_directory


def reach_ours(job: dict[str, Any]) -> Turn:
    """Return a turn of a whole run: seconds of its steps, tokens, and the loss over all validation windows."""
    cfg, train = _run(job["flags"])

    def turn() -> dict[str, float]:
        lines, interval = train(cfg), cfg.train.log_interval_steps
        seconds = sum(line["step_time_s"] * interval for line in lines if "step_time_s" in line)
        loss = next(line["val/loss"] for line in reversed(lines) if "val/loss" in line)
        return {"seconds": seconds, "tokens": lines[-1]["tokens"], "val/loss": loss}

    return turn


def reach_peer(job: dict[str, Any]) -> Turn:
    """Return a turn of nanoGPT's recipe in PyTorch: AdamW (.9, .99), decay on matrices, warm-up, cosine."""
    import torch

    text = Path(job["text"]).read_text()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[c] for c in text])
    cut, T, B = int(len(data) * 0.9), NANOGPT["context"], NANOGPT["batch"]
    train, val = data[:cut], data[cut:]
    rise, fall = NANOGPT["warmup"], NANOGPT["steps"] - NANOGPT["warmup"]
    floor = NANOGPT["final_lr"] / NANOGPT["peak_lr"]

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * (step - rise) / fall))

    def turn() -> dict[str, float]:
        model = _peer_model({"side": "hf", "size": "tiny", "dtype": "float32"}, T)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=NANOGPT["peak_lr"], betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        began = time.perf_counter()
        for _ in range(NANOGPT["steps"]):
            rows = torch.randint(len(train) - T, (B,)).tolist()
            batch = torch.stack([train[i : i + T + 1] for i in rows])
            logits = model(batch[:, :-1]).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        count = (len(val) - 1) // T
        inputs, targets = (val[i : i + count * T].view(count, T) for i in (0, 1))
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum")
                for x, y in zip(inputs.split(128), targets.split(128), strict=True)
            ]
        tokens = NANOGPT["steps"] * B * T
        return {"seconds": seconds, "tokens": tokens, "val/loss": float(sum(losses)) / (count * T)}

    return turn


def measure_machine(job: dict[str, Any]) -> Turn:
    """Return a turn that measures this machine's limits for a model and data types."""
    from gptjax.process import prepare_process

    prepare_process()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    shapes = product_shapes(SIZES[job["size"]], job["rows"])

    def turn() -> dict[str, Any]:
        rates = {dtype: measure_products(shapes, dtype) for dtype in job["dtypes"]}
        return {"instructions": instructions(), "flops_per_s": rates, "bytes_per_s": measure_memory()}

    return turn


# Ways to run transformers in PyTorch: eager or compiled, in one data type or under autocast to bfloat16.
PYTORCH = ("hf", "hf-compile", "hf-bf16", "hf-compile-bf16")
WORK = {
    ("machine", "gptjax"): measure_machine,
    ("train", "gptjax"): train_ours,
    **{("train", name): train_peer for name in PYTORCH},
    ("sample", "gptjax"): sample_ours,
    **{("sample", name): sample_peer for name in PYTORCH},
    ("loop", "gptjax"): loop,
    ("lora", "gptjax"): lambda job: train_adapters(job, _steps),
    ("lora", "full"): lambda job: train_adapters(job, _steps),
    ("lora", "peft"): train_in_peft,
    ("reach", "gptjax"): reach_ours,
    ("reach", "nanoGPT"): reach_peer,
}


def main() -> None:
    """Answer each line of standard input with the figures of a turn, and its end with the peak memory."""
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what libraries print is not taken for an answer

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    turn = WORK[job["work"], job["side"]](job)
    answer(ready=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        figures = turn()
        answer(**(figures or {"seconds": time.perf_counter() - began}))
    answer(peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    os._exit(0)  # freeing what is left may abort: see limits.KEPT


if __name__ == "__main__":
    main()
