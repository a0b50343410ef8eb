"""A plan: a config on a topology, with its costs from the compiler or by arithmetic, and the verdict."""

import math
from collections.abc import Iterator
from typing import Any

from gptjax.apps.plan import calibration
from gptjax.apps.plan.analytic import Costs, estimate, held_bytes, resolve_mesh
from gptjax.apps.plan.chips import Topology
from gptjax.apps.plan.compiler import compile_for, has_compiler
from gptjax.apps.plan.roofline import roofline
from gptjax.checks import divisors
from gptjax.config import Config, override
from gptjax.errors import UserError

# Ids of the tokenizers that need no file.
VOCABULARIES = {"gpt2": 50257, "cl100k": 100277, "o200k": 200019}


def prepared(cfg: Config) -> Config:
    """The config as a run on accelerators has it: vocabulary filled in, layers scanned.

    Raises:
        UserError: the vocabulary depends on files.
    """
    size = cfg.model.vocab_size or VOCABULARIES.get(cfg.data.tokenizer or "")
    if size is None:
        raise UserError(
            f"data.tokenizer {cfg.data.tokenizer!r} says nothing of the vocabulary's size; give --model.vocab_size"
        )
    scan = True if cfg.run.scan_layers is None else cfg.run.scan_layers
    return override(cfg, {"model.vocab_size": size, "run.scan_layers": scan})


def make_plan(cfg: Config, topology: Topology, analytic: bool = False) -> dict[str, Any]:
    """The plan, as plain values: see docs/planning.md for its keys.

    Args:
        analytic: never ask the compiler.

    Raises:
        UserError: the mesh does not fit the chips, or cannot cut the model.
    """
    costs = estimate(cfg, topology)
    answer = None if analytic or not has_compiler(topology) else compile_for(cfg, topology)
    method, note = "compiled", ""
    if answer is None or "error" in answer:
        method = "analytic"
        note = answer["error"] if answer else "by arithmetic, not by the compiler"
        if answer is None and not analytic and topology.chip.kind == "tpu":
            note += ": pip install 'gptjax[tpu]' for the compiler's own figures"
        answer = {"memory": None, "hbm_bytes": costs.hbm_bytes, "collectives": []}
        ici, dcn = costs.ici_bytes, costs.dcn_bytes
    elif "out_of_memory" in answer:
        ici, dcn = costs.ici_bytes, costs.dcn_bytes
    else:
        wire = [(c["wire_bytes"] * c["times"], c["crosses"]) for c in answer["collectives"]]
        ici, dcn = (float(sum(size for size, crosses in wire if crosses == over)) for over in (False, True))

    memory = memory_table(costs, answer)
    total, capacity = sum(memory.values()), topology.chip.hbm_bytes
    fits = "out_of_memory" not in answer and (total <= capacity or method == "compiled")
    tokens = cfg.train.batch_sequences * cfg.model.context_length
    line = roofline(
        topology,
        tokens=tokens,
        model_flops=costs.model_flops,
        executed_flops=costs.executed_flops,
        hbm_bytes=answer.get("hbm_bytes", costs.hbm_bytes),
        ici_bytes=ici,
        dcn_bytes=dcn,
    )
    expected_s = calibration.expected_step_s(line, calibration.factors())
    share = line.step_s / expected_s
    return {
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "chips": topology.n_chips,
        "mesh": resolve_mesh(cfg, topology),
        "method": method,
        "note": note,
        "remat": cfg.run.remat,
        "microbatches": cfg.train.microbatches,
        "batch_sequences": cfg.train.batch_sequences,
        "tokens_per_step": tokens,
        "memory": memory,
        "total_bytes": total,
        "capacity_bytes": capacity,
        "analytic_total_bytes": costs.total_bytes,
        "fits": fits,
        "model_flops": costs.model_flops,
        "executed_flops_per_chip": costs.executed_flops,
        "hbm_bytes": answer.get("hbm_bytes", costs.hbm_bytes),
        "ici_bytes": ici,
        "dcn_bytes": dcn,
        "collectives": summed(answer.get("collectives", [])),
        "communication_theory": costs.collectives,
        "times_s": line.times_s,
        "bound": line.bound,
        "ceiling": {"step_s": line.step_s, "mfu": line.mfu, "tokens_per_s": line.tokens_per_s},
        "expected": {"step_s": expected_s, "mfu": line.mfu * share, "tokens_per_s": line.tokens_per_s * share},
    }


def memory_table(costs: Costs, answer: dict[str, Any]) -> dict[str, float]:
    """Bytes of a chip by kind: the compiler's where it has answered, else the estimate's.

    The compiler counts gradients among its temporaries; the table takes them out. Of a program that does not fit it
    tells one number, which stands in place of the temporaries.
    """
    table = dict(costs.memory)
    if "out_of_memory" in answer:
        arguments = table["params"] + table["optimizer"] + table["batch"]
        used = answer["out_of_memory"]["used_bytes"]
        used -= arguments if answer["out_of_memory"]["of"] == "all" else 0
        return {**table, "temporaries": max(used - table["gradients"], 0.0)}
    measured = answer["memory"]
    if measured is None:
        return table
    arguments = table["params"] + table["optimizer"]
    temporaries = measured["temp"] + measured["output"] - measured["alias"] - table["gradients"]
    return {
        **table,
        "batch": measured["argument"] - arguments,
        "gradients": table["gradients"] + min(temporaries, 0),
        "temporaries": max(temporaries, 0),
        "code": measured["generated_code"],
    }


def summed(collectives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collectives of a step, added up by kind, dtype, and whether they leave the slice."""
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


def suggest(cfg: Config, topology: Topology) -> dict[str, Any] | None:
    """The smallest change of the config that fits by arithmetic, a tenth of the memory left free; None: none does."""
    axes, limit = resolve_mesh(cfg, topology), 0.9 * topology.chip.hbm_bytes
    whole = {"mesh.data": topology.num_slices, "mesh.fsdp": topology.n_chips // topology.num_slices // axes["tensor"]}
    per_step = cfg.train.batch_sequences // (axes["data"] * axes["fsdp"])
    remats = [{}] if cfg.run.remat == "full" else [{}, {"run.remat": "full"}]
    parts = [2**k for k in range(int(math.log2(max(per_step, 1))) + 1) if per_step % 2**k == 0]
    for mesh in ({}, whole if axes["context"] == 1 else {}):
        for remat in remats:
            for count in parts:
                overrides = {**mesh, **remat, **({"train.microbatches": count} if count > 1 else {})}
                try:
                    if overrides and estimate(override(cfg, overrides), topology).total_bytes <= limit:
                        return overrides
                except UserError:
                    continue
    return None


def meshes_to_try(topology: Topology, context: int) -> Iterator[dict[str, int]]:
    """Yield the meshes that a search tries, as overrides: every way to lay all chips on data, fsdp and tensor."""
    chips, slices = topology.n_chips // context, topology.num_slices
    for tensor in (n for n in (1, 2, 4, 8) if chips % n == 0):
        for fsdp in divisors(chips // tensor):
            mesh = {"mesh.data": chips // tensor // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
            if mesh["mesh.data"] % slices == 0:
                yield mesh | ({"mesh.slices": slices} if slices > 1 else {})


def candidates(cfg: Config, topology: Topology) -> list[tuple[float, dict[str, Any], float]]:
    """Return every mesh x remat x microbatches that fits by arithmetic, best first.

    Each is (expected seconds a step, overrides, bytes of a chip).

    A twentieth of the memory is left free. The context axis stays as it is.
    """
    found = []
    for mesh in meshes_to_try(topology, resolve_mesh(cfg, topology)["context"]):
        try:
            whole = override(cfg, {**mesh, "train.microbatches": 1})
            held = held_bytes(whole, resolve_mesh(whole, topology), topology.chip.kind == "tpu")
        except UserError:
            continue
        rows = cfg.train.batch_sequences // mesh["mesh.data"] // mesh["mesh.fsdp"]
        for remat in ("none", "dots", "full"):
            for count in (2**k for k in range(rows.bit_length()) if rows % 2**k == 0):
                overrides = {**mesh, "run.remat": remat, "train.microbatches": count}
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
    """Return the best candidate, its plan, and all `candidates`; with a compiler, the best few that it confirms.

    Raises:
        UserError: nothing fits.
    """
    ranked = candidates(cfg, topology)
    if not ranked:
        raise UserError(
            f"no mesh, remat or microbatches fit {topology.name}; take more chips, or fewer tokens a step"
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
