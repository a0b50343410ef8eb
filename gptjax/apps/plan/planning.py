"""Plan a run: the costs of a config on a topology, from the compiler or by arithmetic, and whether it fits."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from gptjax.apps.plan import calibration
from gptjax.apps.plan.analytic import Costs, estimate, held_bytes, resolve_mesh
from gptjax.apps.plan.chips import Topology
from gptjax.apps.plan.compiler import compile_for, has_compiler
from gptjax.apps.plan.roofline import Roofline, roofline
from gptjax.checks import divisors
from gptjax.config import Config, override
from gptjax.errors import UserError

# Vocabulary sizes of the tokenizers that need no file.
VOCABULARIES = {"gpt2": 50257, "cl100k": 100277, "o200k": 200019}


def config_on_accelerators(cfg: Config) -> Config:
    """Return the config as a run on accelerators resolves it: the vocabulary's size filled in, layers scanned.

    Raises:
        UserError: the size of the vocabulary depends on files.
    """
    size = cfg.model.vocab_size or VOCABULARIES.get(cfg.data.tokenizer or "")
    if size is None:
        raise UserError(
            f"data.tokenizer {cfg.data.tokenizer!r} does not tell the size of the vocabulary; give --model.vocab_size"
        )
    scan = True if cfg.run.scan_layers is None else cfg.run.scan_layers
    return override(cfg, {"model.vocab_size": size, "run.scan_layers": scan})


def make_plan(cfg: Config, topology: Topology, analytic: bool = False) -> dict[str, Any]:
    """Return the plan of a run on a topology, as plain values: see docs/planning.md for its keys.

    Args:
        analytic: estimate only, without the compiler.

    Raises:
        UserError: the mesh does not fit the chips, or cannot shard the model.
    """
    costs = estimate(cfg, topology)
    answer, note = ask_compiler(cfg, topology, analytic)
    traffic = bytes_moved(costs, answer)
    line = roofline(
        topology,
        tokens=cfg.train.batch_sequences * cfg.model.context_length,
        model_flops=costs.model_flops,
        executed_flops=costs.executed_flops,
        **traffic,
    )
    return {
        **describe_layout(cfg, topology),
        "method": "compiled" if answer is not None and "memory" in answer else "analytic",
        "note": note,
        **memory_verdict(costs, answer, topology.chip.hbm_bytes),
        "model_flops": costs.model_flops,
        "executed_flops_per_chip": costs.executed_flops,
        **traffic,
        "collectives": sum_collectives((answer or {}).get("collectives", [])),
        "communication_theory": costs.collectives,
        **speeds(line, calibration.roofline_of(cfg, topology, costs)),
    }


def ask_compiler(cfg: Config, topology: Topology, analytic: bool) -> tuple[dict[str, Any] | None, str]:
    """Return the compiler's answer (see `compiler.compile_for`) or None, and why figures are not the compiler's."""
    if analytic or not has_compiler(topology):
        note = "by arithmetic, not by the compiler"
        if not analytic and topology.chip.kind == "tpu":
            note += ": pip install 'gptjax[tpu]' for the compiler's own figures"
        return None, note
    answer = compile_for(cfg, topology)
    if "error" in answer:
        return None, answer["error"]
    if "out_of_memory" in answer:
        return answer, "but for the temporaries: the compiler gave up for lack of memory"
    return answer, ""


def describe_layout(cfg: Config, topology: Topology) -> dict[str, Any]:
    """Return the part of a plan that says what runs where."""
    return {
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "chips": topology.n_chips,
        "mesh": resolve_mesh(cfg, topology),
        "remat": cfg.run.remat,
        "microbatches": cfg.train.microbatches,
        "batch_sequences": cfg.train.batch_sequences,
        "tokens_per_step": cfg.train.batch_sequences * cfg.model.context_length,
    }


def bytes_moved(costs: Costs, answer: dict[str, Any] | None) -> dict[str, float]:
    """Return the bytes that a chip moves in a step, by resource: the compiled program's, or else the estimate's."""
    if answer is None or "out_of_memory" in answer:
        return {"hbm_bytes": costs.hbm_bytes, "ici_bytes": costs.ici_bytes, "dcn_bytes": costs.dcn_bytes}
    sizes = {False: 0.0, True: 0.0}
    for collective in answer["collectives"]:
        sizes[collective["crosses"]] += collective["wire_bytes"] * collective["times"]
    return {"hbm_bytes": answer["hbm_bytes"], "ici_bytes": sizes[False], "dcn_bytes": sizes[True]}


def memory_verdict(costs: Costs, answer: dict[str, Any] | None, capacity: float) -> dict[str, Any]:
    """Return the part of a plan that says whether a chip's memory, of `capacity` bytes, is enough."""
    memory = memory_table(costs, answer)
    total = sum(memory.values())
    return {
        "memory": memory,
        "total_bytes": total,
        "capacity_bytes": capacity,
        "analytic_total_bytes": costs.total_bytes,
        "fits": total <= capacity and "out_of_memory" not in (answer or {}),
    }


def memory_table(costs: Costs, answer: dict[str, Any] | None) -> dict[str, float]:
    """Return the bytes of a chip by kind: the compiler's where it has answered, or else the estimate's.

    Temporaries are the compiler's peak less the arguments, since buffers that are never used together share a place.
    The compiler counts gradients among them; the table separates these. For a program that does not fit the compiler
    reports one number only, from which the temporaries are inferred.
    """
    table = dict(costs.memory)
    if answer is None:
        return table
    if "out_of_memory" in answer:
        arguments = table["params"] + table["optimizer"] + table["batch"]
        used = answer["out_of_memory"]["used_bytes"]
        used -= arguments if answer["out_of_memory"]["of"] == "all" else 0
        return {**table, "temporaries": max(used - table["gradients"], 0.0)}
    measured = answer["memory"]
    arguments = table["params"] + table["optimizer"]
    temporaries = measured["peak"] - measured["argument"] - table["gradients"]
    return {
        **table,
        "batch": measured["argument"] - arguments,
        "gradients": table["gradients"] + min(temporaries, 0),
        "temporaries": max(temporaries, 0),
        "code": measured["generated_code"],
    }


def sum_collectives(collectives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a step's collectives, summed by kind, dtype, and whether they leave the slice; the largest first."""
    sums: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for c in collectives:
        key = (c["kind"], c["dtype"], c["crosses"])
        row = sums.setdefault(
            key,
            {"kind": c["kind"], "dtype": c["dtype"], "crosses": c["crosses"], "operand_bytes": 0, "wire_bytes": 0.0}
            | {"times": 0},
        )
        row["operand_bytes"] += c["operand_bytes"] * c["times"]
        row["wire_bytes"] += c["wire_bytes"] * c["times"]
        row["times"] += c["times"]
    return sorted(sums.values(), key=lambda row: -row["wire_bytes"])


def speeds(line: Roofline, estimated: Roofline) -> dict[str, Any]:
    """Return the part of a plan that says how fast a step is: its ceiling, and what published runs make expected.

    Args:
        estimated: the roofline by arithmetic alone, which is what the factors of published runs multiply: with the
            compiler's figures they would say something else, and jump where a program does not compile.
    """
    expected_s = max(calibration.expected_step_s(estimated, calibration.factors()), line.step_s)
    share = line.step_s / expected_s
    return {
        "times_s": line.times_s,
        "bound": line.bound,
        "ceiling": {"step_s": line.step_s, "mfu": line.mfu, "tokens_per_s": line.tokens_per_s},
        "expected": {"step_s": expected_s, "mfu": line.mfu * share, "tokens_per_s": line.tokens_per_s * share},
    }


def suggest(cfg: Config, topology: Topology) -> dict[str, Any] | None:
    """Return the smallest change of the config that fits by arithmetic, with 10 % of the memory free; or None."""
    axes, limit = resolve_mesh(cfg, topology), 0.9 * topology.chip.hbm_bytes
    whole = {
        "mesh.data": topology.num_slices,
        "mesh.fsdp": topology.n_chips // topology.num_slices // axes["tensor"] // axes["expert"] // axes["pipeline"],
    }
    per_step = cfg.train.batch_sequences // (axes["data"] * axes["fsdp"] * axes["expert"] * axes["pipeline"])
    remats = [{}] if cfg.run.remat == "full" else [{}, {"run.remat": "full"}]
    parts = [2**k for k in range(int(math.log2(max(per_step, 1))) + 1) if per_step % 2**k == 0]
    microbatches = [{"train.microbatches": count} if count > 1 else {} for count in parts]
    meshes = ({}, whole if axes["context"] == 1 else {})
    for mesh, remat, chunks, count in itertools.product(meshes, remats, _loss_chunks(cfg), microbatches):
        overrides = mesh | remat | chunks | count
        try:
            if overrides and estimate(override(cfg, overrides), topology).total_bytes <= limit:
                return overrides
        except UserError:
            continue
    return None


def _loss_chunks(cfg: Config) -> list[dict[str, Any]]:
    """Return the overrides of `train.loss_chunks` to try: where a number is fixed, also the loss's own choice."""
    return [{}] if cfg.train.loss_chunks is None else [{}, {"train.loss_chunks": None}]


def meshes_to_try(topology: Topology, others: int) -> Iterator[dict[str, int]]:
    """Yield the meshes that a search tries, as overrides: every way to lay all chips on data, fsdp and tensor.

    Args:
        others: product of the axes that stay as they are.
    """
    chips, slices = topology.n_chips // others, topology.num_slices
    for tensor in (n for n in (1, 2, 4, 8) if chips % n == 0):
        for fsdp in divisors(chips // tensor):
            mesh = {"mesh.data": chips // tensor // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
            if mesh["mesh.data"] % slices == 0:
                yield mesh | ({"mesh.slices": slices} if slices > 1 else {})


def candidates(cfg: Config, topology: Topology) -> list[tuple[float, dict[str, Any], float]]:
    """Return every mesh x remat x microbatches x loss chunks that fits by arithmetic, best first.

    Each is (expected seconds of a step, overrides, bytes of a chip). It leaves 5 % of the memory free. The axes
    context, expert and pipeline are not changed.
    """
    found = []
    fixed = resolve_mesh(cfg, topology)
    for mesh in meshes_to_try(topology, fixed["context"] * fixed["expert"] * fixed["pipeline"]):
        try:
            whole = override(cfg, {**mesh, "train.microbatches": 1})
            held = held_bytes(whole, resolve_mesh(whole, topology), topology.chip.kind == "tpu")
        except UserError:
            continue
        rows = (
            cfg.train.batch_sequences
            // mesh["mesh.data"]
            // mesh["mesh.fsdp"]
            // fixed["expert"]
            // fixed["pipeline"]
        )
        for remat in ("none", "dots", "full"):
            counts = [2**k for k in range(rows.bit_length()) if rows % 2**k == 0]
            for count, chunks in itertools.product(counts, _loss_chunks(cfg)):
                overrides = {**mesh, "run.remat": remat, "train.microbatches": count, **chunks}
                tried = override(cfg, overrides)
                costs = estimate(tried, topology, held=held)
                if costs.total_bytes <= 0.95 * topology.chip.hbm_bytes:
                    line = calibration.roofline_of(tried, topology, costs)
                    expected_s = calibration.expected_step_s(line, calibration.factors())
                    found.append((expected_s, overrides, costs.total_bytes))
    return sorted(found, key=lambda one: (one[0], str(one[1])))


def search(
    cfg: Config, topology: Topology, analytic: bool = False, confirm: int = 3
) -> tuple[dict[str, Any], Any, Any]:
    """Return the best candidate's overrides, its plan, and all `candidates`.

    Args:
        analytic: rank by arithmetic only.
        confirm: number of candidates, the best first, that the compiler plans where there is one; the best plan wins.

    Raises:
        UserError: no candidate fits.
    """
    ranked = candidates(cfg, topology)
    if not ranked:
        raise UserError(
            f"no combination of mesh, remat and microbatches fits {topology.name}; use more chips, or a smaller batch"
        )
    compiled = has_compiler(topology) and not analytic
    best = None
    for _, overrides, _ in ranked[: confirm if compiled else 1]:
        plan = make_plan(override(cfg, overrides), topology, analytic)
        if best is None or (plan["fits"], -plan["expected"]["step_s"]) > (
            best[1]["fits"],
            -best[1]["expected"]["step_s"],
        ):
            best = overrides, plan
    return best[0], {**best[1], "candidates": len(ranked)}, ranked
