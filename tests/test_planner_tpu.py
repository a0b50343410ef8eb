"""The planner beside the TPU compiler (`pip install 'gptjax[tpu]'`; no TPU): `pytest -m tpu -n 0 -s`.

Each case compiles the real step, which takes a core a minute or more.
"""

import json
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from gptjax.apps.plan import planning
from gptjax.apps.plan.chips import parse_topology
from gptjax.configfile import config_from_dict, load_config
from gptjax.shell.display import size

pytestmark = pytest.mark.tpu

SIZES = {
    "gpt2-medium": {"preset": "gpt2-medium"},
    "gpt2-xl": {"preset": "gpt2-xl"},
    "llama-3.1-8b": {"preset": "llama-3.1-8b", "context_length": 2048, "rope_scaling": None},
}
# Size, topology, and the sequences of a step with full remat and with dots; weights are cut over all chips.
PLACES = [
    ("gpt2-medium", "v5e:4x4", 64, 64),
    ("gpt2-medium", "v5p:2x2x4", 128, 128),
    ("gpt2-xl", "v5e:8x8", 256, 64),
    ("gpt2-xl", "v5p:4x4x4", 256, 256),
    ("llama-3.1-8b", "v5e:16x16", 256, 256),
    ("llama-3.1-8b", "v5p:4x4x4", 64, 64),
]
CASES = [(*place[:2], n, remat) for place in PLACES for n, remat in zip(place[2:], ("full", "dots"), strict=True)]

# A model whose widths divide well, so that what the compiler moves is what the algorithm needs.
LLAMA = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tie_embeddings": False}
SHAPE = {"n_layers": 8, "d_model": 2048, "n_heads": 16, "n_kv_heads": 8, "d_mlp": 8192, "context_length": 1024}
EVEN = {**LLAMA, **SHAPE, "vocab_size": 32768, "dtype": "bfloat16", "remat": "full"}
WHOLE_SLICE = {"fsdp": 64}  # one group of all chips: the compiler sums, where it should scatter
MESHES = [
    ("v5e:2x4", 16, {"data": 8}),
    ("v5e:2x4", 16, {"fsdp": 8}),
    ("v5e:2x4", 16, {"fsdp": 2, "tensor": 4}),
    ("v5e:8x8", 128, WHOLE_SLICE),
    ("v5e:8x8", 128, {"data": 2, "fsdp": 32}),
    ("v5e:8x8", 64, {"fsdp": 16, "tensor": 4}),
    ("v5p:4x4x4", 128, WHOLE_SLICE),
    ("v5p:4x4x4", 128, {"data": 2, "fsdp": 32}),
    ("v5p:4x4x4", 64, {"fsdp": 16, "tensor": 4}),
    ("v5e:16x16", 256, {"data": 4, "fsdp": 64}),
    ("v5e:16x16", 256, {"fsdp": 64, "tensor": 4}),
]


def plan_of(model: dict, topology: str, sequences: int, mesh: dict, loss_chunks: int = 8) -> dict:
    sections = {"train": {"batch_sequences": sequences, "loss_chunks": loss_chunks}, "mesh": {"data": 1, **mesh}}
    cfg = config_from_dict({"model": model, **sections, "workdir": "-"})
    plan = planning.make_plan(planning.config_on_accelerators(cfg), parse_topology(topology))
    assert plan["method"] == "compiled", plan["note"]
    return plan


@pytest.mark.parametrize(("model", "topology", "sequences", "remat"), CASES)
def test_truth_memory(model, topology, sequences, remat):
    """Arguments within 1 % of the compiler's (in `batch`, the rest of them), the total at most 25 % above it."""
    values = {**SIZES[model], "dtype": "bfloat16", "remat": remat, "attention": "reference"}
    plan = plan_of(values, topology, sequences, {"fsdp": -1})
    ratio = plan["analytic_total_bytes"] / plan["total_bytes"]
    print(f"\n{model:14}{topology:11}{sequences:>5} {remat:5}{size(plan['total_bytes']):>12} analytic {ratio:.3f}")
    known = plan["memory"]["params"] + plan["memory"]["optimizer"]
    assert abs(plan["memory"]["batch"]) <= 0.01 * known
    assert 0.95 <= ratio <= 1.25


@pytest.mark.parametrize(("topology", "sequences", "mesh"), MESHES)
def test_communication(topology, sequences, mesh):
    """What theory asks for, within 20 %; docs/planning.md says what the compiler moves besides."""
    plan = plan_of(EVEN, topology, sequences, mesh, loss_chunks=1)
    wire = sum(c["wire_bytes"] for c in plan["collectives"])
    theory = sum(plan["communication_theory"].values())
    print(f"\n{topology} {mesh}: on the wire {size(wire)}, theory {size(theory)}, {wire / theory:.2f}")
    for c in plan["collectives"]:
        print(f"    {c['kind']:20}{c['dtype']:6}{size(c['operand_bytes']):>14}{size(c['wire_bytes']):>14}")
    if mesh != WHOLE_SLICE:
        assert wire / theory == pytest.approx(1, abs=0.2)
        return
    # A sum sends twice what a scatter does, but of the same array: those that are gathered, scattered or summed.
    arrays = sum(c["operand_bytes"] + c["wire_bytes"] * (c["kind"] == "all-gather") for c in plan["collectives"])
    wanted = (theory - plan["communication_theory"]["embedding's gradient"] / 2) * 64 / 63
    print(f"    arrays {size(arrays)}, theory {size(wanted)}, {arrays / wanted:.2f}")
    assert arrays / wanted == pytest.approx(1, abs=0.2)


def test_muon_needs_hardly_more_of_the_wire_than_adamw():
    """GPT-2 1.5B over 64 chips: matrices are dealt to devices, and none is gathered for its update."""
    path = str(ROOT / "configs" / "gpt2_1.5b.yaml")
    sent = {}
    for name in ("adamw", "muon"):
        flags = ["--mesh.data", "1", "--mesh.fsdp", "64", "--optim.name", name, "--train.batch_sequences", "256"]
        cfg = planning.config_on_accelerators(load_config([path, *flags]))
        plan = planning.make_plan(cfg, parse_topology("v5e:8x8"))
        assert plan["method"] == "compiled", plan["note"]
        sent[name] = plan["ici_bytes"]
    print(f"\nmuon {size(sent['muon'])}, adamw {size(sent['adamw'])}, {sent['muon'] / sent['adamw']:.3f}")
    assert sent["muon"] <= 1.05 * sent["adamw"]


@pytest.mark.parametrize(("remat", "code"), [("full", 0), ("none", 3)])
def test_gpt2_xl_on_256_chips(remat, code):
    """Two plans may run at once, and a lock file that a killed process left does no harm."""
    Path("/tmp/libtpu_lockfile").touch()
    command = ("-m", "gptjax", "plan", "configs/gpt2_1.5b.yaml", "--topology", "v5e:16x16", "--json")
    beside = threading.Thread(target=run_script, args=("-m", "gptjax", *command[2:]), kwargs={"timeout": 1200})
    beside.start()
    result = run_script(*command, "--model.remat", remat, timeout=1200)
    beside.join()
    assert result.returncode == code, result.stderr
    plan = json.loads(result.stdout)
    assert plan["method"] == "compiled"
    assert (plan["suggestion"] is None) == (code == 0)


def test_65b_on_4096_chips():
    cfg = planning.config_on_accelerators(load_config([str(ROOT / "configs/dense_65b.yaml")]))
    plan = planning.make_plan(cfg, parse_topology("v5p:16x16x16"))
    print(f"\n{size(plan['total_bytes'])} a chip", file=sys.stderr)
    assert plan["method"] == "compiled" and plan["fits"]
