"""The planner: arithmetic against the project's own shardings, HLO that the TPU compiler wrote, verdicts."""

import itertools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from conftest import ROOT, run_script, trainable_on

from gptjax import cli
from gptjax.apps.plan import calibration, commands, planning
from gptjax.apps.plan.analytic import abstract_trainable, estimate, executed_flops_per_token, padded_bytes
from gptjax.apps.plan.chips import CHIPS, parse_topology
from gptjax.apps.plan.hlo import Program
from gptjax.apps.plan.report import report
from gptjax.apps.plan.worker import read_out_of_memory
from gptjax.config import Config, override
from gptjax.configfile import config_from_dict, load_config
from gptjax.step import make_train_step

HLO = Path(__file__).parent / "hlo"
LLAMA = {"preset": "llama-3.1-8b", "context_length": 2048, "rope_scaling": None, "dtype": "bfloat16"}


def llama(train: dict | None = None, **mesh: int) -> Config:
    train = {"batch_sequences": 256, **(train or {})}
    model = {**LLAMA, "remat": "full", "scan_layers": True}
    return config_from_dict({"model": model, "train": train, "mesh": mesh, "workdir": "-"})


def gpt2_xl(**overrides) -> Config:
    return override(planning.config_on_accelerators(load_config([str(ROOT / "configs/gpt2_1.5b.yaml")])), overrides)


# What compilers printed: memory_analysis() of jax 0.10.2 with libtpu 0.0.42, of the project's own step.


def test_arguments_are_the_bytes_that_the_tpu_compiler_reports():
    """GPT-2's weights and moments, cut over 8 and over 32 chips, where tiles of 8 x 128 pad a lot."""
    small = config_from_dict(
        {"model": {"preset": "gpt2"}, "train": {"batch_sequences": 64}, "mesh": {"fsdp": 8}, "workdir": "-"}
    )
    for cfg, topology, reported in [
        (small, "v5e:2x4", 203171328),
        (gpt2_xl(**{"mesh.fsdp": 32}), "v5e:16x16", 786814464),
    ]:
        memory = estimate(cfg, parse_topology(topology)).memory
        arguments = memory["params"] + memory["optimizer"] + memory["batch"]
        assert arguments == pytest.approx(reported, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "itemsize", "bytes_"),
    [((12, 96, 12, 64), 4, 12 * 128 * 12 * 64 * 4), ((768,), 4, 4096), ((), 4, 512), ((16, 128), 2, 4096)],
)
def test_arrays_are_padded_to_tiles(shape, itemsize, bytes_):
    assert padded_bytes(shape, itemsize) == bytes_


def test_estimated_state_is_what_devices_hold():
    """On GPUs, without tiles: the bytes of the shards that JAX itself would make."""
    cfg = llama(fsdp=8, tensor=2)
    memory = estimate(cfg, parse_topology("h100:2x8")).memory
    t = abstract_trainable(cfg, {"data": 1, "fsdp": 8, "tensor": 2, "context": 1})
    shards = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(t.state.params)]
    assert memory["params"] == 4 * sum(shards)
    assert memory["optimizer"] == pytest.approx(2 * memory["params"], rel=1e-6)


def test_a_frozen_base_costs_what_it_is_held_in_and_has_no_gradient():
    full = llama(fsdp=8)
    whole = estimate(full, parse_topology("h100:1x8"))
    params = whole.memory["params"]
    for dtype, share in (("float32", 1.0), ("bfloat16", 0.5), ("int8", 0.25)):
        adapted = override(full, {"lora.rank": 8, "lora.base_dtype": dtype})
        costs = estimate(adapted, parse_topology("h100:1x8"))
        base = costs.memory["params"] - costs.memory["gradients"]  # what is left are the adapters
        assert base == pytest.approx(share * params, rel=0.05)
        assert costs.memory["gradients"] + costs.memory["optimizer"] < 0.1 * params
        assert 0.6 < costs.model_flops / whole.model_flops < 0.75
    frozen = estimate(override(full, {"optim.freeze": ["matrix"]}), parse_topology("h100:1x8"))
    assert frozen.memory["optimizer"] == pytest.approx(2 * frozen.memory["gradients"], rel=1e-3)
    assert frozen.memory["gradients"] < whole.memory["gradients"] / 2


@pytest.mark.parametrize(("lora", "tolerance"), [({}, 0.15), ({"rank": 4}, 0.2)], ids=str)
def test_executed_flops_are_those_that_xla_counts_in_an_unrolled_step(lora, tolerance):
    """XLA counts right where nothing is scanned; it leaves out what no gradient needs of a recomputed layer."""
    sizes = {"n_layers": 2, "d_model": 256, "n_heads": 4, "context_length": 256, "vocab_size": 1024, "bias": False}
    model = {**sizes, "remat": "full", "scan_layers": False, "positions": "rope"}
    cfg = config_from_dict({"model": model, "train": {"batch_sequences": 2}, "workdir": "-", "lora": lora})
    t = trainable_on(cfg)
    kinds = {"tokens": "int32", "targets": "int32", "weights": "float32"}
    batch = {name: jax.ShapeDtypeStruct((2, 256), kind, sharding=t.batch_sharding) for name, kind in kinds.items()}
    with jax.set_mesh(t.mesh):
        counted = make_train_step(t).compiled.lower(t.state, batch).compile().cost_analysis()["flops"]
    assert executed_flops_per_token(cfg, False) * 512 == pytest.approx(counted, rel=tolerance)


# HLO: two small programs as the TPU compiler wrote them, without metadata (tests/hlo).


def test_a_loops_body_counts_as_often_as_it_runs():
    """Six layers of 1024 x 1024 bfloat16 weights over 8 chips: gathered forward, gradients scattered backward."""
    program = Program((HLO / "fsdp8.txt").read_text())
    moved: dict[str, float] = {}
    for c in program.collectives():
        moved[c.dtype] = moved.get(c.dtype, 0) + c.wire_bytes * c.times
    weights = 6 * 1024 * 1024 * 2
    assert moved["bf16"] == pytest.approx(3 * weights * 7 / 8, rel=0.2)


def test_transfers_between_slices_are_told_apart():
    """Two slices of four chips: each chip's quarter of the gradients crosses, the rest stays within a slice."""
    program = Program((HLO / "slices2.txt").read_text())
    found = program.collectives(chips_per_slice=4, num_slices=2)
    weights = 6 * 1024 * 1024 * 2
    crossing = [c for c in found if c.crosses]
    assert {c.kind for c in crossing} == {"all-reduce"}
    assert sum(c.operand_bytes * c.times for c in crossing) == weights / 4
    assert sum(c.wire_bytes * c.times for c in found if not c.crosses) == pytest.approx(3 * weights * 3 / 4, rel=0.05)


LOOP = """
%cond (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %end = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%body (p.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %two)
  %ar = f32[8,128]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %ar)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body
  %fast = f32[8,128]{1,0:T(8,128)S(1)} copy(%a)
  ROOT %y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("groups", "size", "crosses"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, False),
        ("[4,2]<=[2,4]T(1,0)", 2, True),
        ("mesh['a'=2,'b'=4] {'b'}", 4, False),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8, True),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4, False),
    ],
)
def test_groups_in_every_notation(groups, size, crosses):
    program = Program(LOOP.replace("GROUPS", groups))
    (only,) = program.collectives(chips_per_slice=4)
    assert (only.kind, only.operand_bytes, only.dtype, only.times) == ("all-reduce", 4096, "f32", 6)
    assert (only.group, only.crosses) == (size, crosses)
    assert only.wire_bytes == 2 * (size - 1) / size * 4096


def test_an_asynchronous_collective_counts_as_often_as_it_begins():
    """The compiler lets it go on beside a loop of other work, and writes it there again."""
    part = """
%NAME (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %ag = f32[8,128]{1,0:T(8,128)} all-reduce(%q), channel_id=7, replica_groups={{0,1}}, to_apply=%sum
}
"""
    fusion = "%ar = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2"
    text = re.sub(r"%ar = .*", fusion, LOOP) + part.replace("NAME", "async_collective_fusion.2")
    begin = "%begin = f32[8,128]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%fused_computation.1\n  %zero"
    text = text.replace("%zero", begin, 1) + part.replace("NAME", "fused_computation.1")
    (only,) = Program(text).collectives()
    assert (only.operand_bytes, only.times) == (4096, 1)


def test_on_chip_memory_is_not_hbm():
    """The copy reads 4,096 bytes and writes to on-chip memory; each all-reduce reads and writes them."""
    assert Program(LOOP.replace("GROUPS", "{{0,1}}")).hbm_bytes() == pytest.approx(4096 + 6 * 2 * 4096, abs=6 * 12)


# Verdicts.


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.88G) "
            "exceeds available HBM (15.75G).",
            {"of": "temporaries", "used_bytes": 27.88 * 2**30, "limit_bytes": 15.75 * 2**30},
        ),
        (
            "Ran out of memory in memory space hbm. Used 25.81G of 15.75G hbm. Exceeded hbm capacity by 10.06G.",
            {"of": "all", "used_bytes": 25.81 * 2**30, "limit_bytes": 15.75 * 2**30},
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_the_compilers_out_of_memory_is_read(message, expected):
    assert read_out_of_memory(message) == expected


def test_out_of_memory_becomes_a_verdict_with_a_suggestion_that_fits(monkeypatch):
    answer = {"out_of_memory": {"of": "temporaries", "used_bytes": 27.88 * 2**30, "limit_bytes": 15.75 * 2**30}}
    monkeypatch.setattr(planning, "has_compiler", lambda topology: True)
    monkeypatch.setattr(planning, "compile_for", lambda cfg, topology: answer)
    cfg, topology = gpt2_xl(**{"run.remat": "none"}), parse_topology("v5e:16x16")
    plan = planning.make_plan(cfg, topology)
    assert not plan["fits"] and plan["total_bytes"] > 28 * 2**30
    assert plan["method"] == "analytic" and "lack of memory" in plan["note"]  # its speed is no compiled program's
    suggestion = planning.suggest(cfg, topology)
    assert estimate(override(cfg, suggestion), topology).total_bytes < 15.75 * 2**30
    assert f"--{next(iter(suggestion))}" in "\n".join(report({**plan, "config": "-", "suggestion": suggestion}))


@pytest.mark.parametrize(("peak", "fits"), [(13.5, True), (15.74, False)])
def test_a_plan_fits_by_the_compilers_peak_and_its_code(monkeypatch, peak, fits):
    """GPT-2 124M, fsdp 4 x context 2 on v5e:2x4: 13.50 GiB at once, though its buffers sum to 16.95, of 15.75."""
    sizes = {"argument": 0.38, "peak": peak, "generated_code": 0.04}
    answer = {"memory": {name: size * 2**30 for name, size in sizes.items()}, "hbm_bytes": 1e9, "collectives": []}
    monkeypatch.setattr(planning, "has_compiler", lambda topology: True)
    monkeypatch.setattr(planning, "compile_for", lambda cfg, topology: answer)
    plan = planning.make_plan(gpt2_xl(), parse_topology("v5e:16x16"))
    assert (plan["method"], plan["fits"]) == ("compiled", fits)
    assert plan["total_bytes"] == pytest.approx((peak + 0.04) * 2**30)


def test_a_compiler_that_dies_leaves_an_estimate_that_says_so(monkeypatch):
    monkeypatch.setattr(planning, "has_compiler", lambda topology: True)
    monkeypatch.setattr(planning, "compile_for", lambda cfg, topology: {"error": "ended by signal 9"})
    plan = planning.make_plan(gpt2_xl(), parse_topology("v5e:16x16"))
    assert (plan["method"], plan["note"], plan["fits"]) == ("analytic", "ended by signal 9", True)


@pytest.mark.parametrize(
    ("key", "value", "kept"), [("remat", "named", True), ("remat", "offload", False), ("attention", "splash", False)]
)
def test_all_that_a_config_may_say_of_memory_can_be_planned(key, value, kept):
    """By default `named` keeps attention's output in every layer; what lies on the host costs the chip nothing."""
    topology = parse_topology("v5e:16x16")
    configs = gpt2_xl(), gpt2_xl(**{f"run.{key}": value})
    full, other = (planning.make_plan(cfg, topology, analytic=True)["memory"]["temporaries"] for cfg in configs)
    tokens, model = 1024 * 1024 / 256, configs[0].model
    assert other - full == pytest.approx(2 * tokens * model.n_layers * model.n_heads * model.d_head * kept)


@pytest.mark.parametrize(("remat", "attention", "code"), [("full", "auto", 0), ("none", "auto", 3)])
def test_the_verdict_is_the_exit_code(remat, attention, code):
    result = run_script(
        *("-m", "gptjax", "plan", "configs/gpt2_1.5b.yaml", "--topology", "v5e:16x16", "--analytic", "--json"),
        *("--tokens", "300e9", "--model.remat", remat, "--price_per_chip_hour=1.2", "--model.attention", attention),
    )
    assert result.returncode == code, result.stderr
    plan = json.loads(result.stdout)
    assert plan["fits"] == (code == 0)
    assert (plan["suggestion"] is None) == plan["fits"]
    seconds = 300e9 / plan["expected"]["tokens_per_s"]
    assert plan["expected"]["cost"] == pytest.approx(seconds / 3600 * 256 * 1.2)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--topology", "v5x:4x4"], "unknown chip in topology 'v5x:4x4'; did you mean"),
        (["--topology", "v5p:4x4"], "v5p needs 3 sizes"),
        (["--topology", "v5e:4x4", "--mesh.fsdp", "3"], "does not make the 16 chips"),
        (
            ["--topology", "v5e:4x4", "--num_slices", "2", "--mesh.data", "1", "--mesh.fsdp", "32"],
            "does not split over 2 slices",
        ),
        (["--topology", "v5e:4x4", "--out", "x.yaml"], "add --search"),
        (["--topology", "v5e:4x4", "--serch"], "unknown option --serch"),
        (["--topology", "v5e:4x4", "--run.remt", "full"], "did you mean '--run.remat'"),
        (["--topology", "v5e:4x4", "--data.tokenizer", "char", "--model.vocab_size", "null"], "--model.vocab_size"),
    ],
)
def test_mistakes_are_one_line(words, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.plan([str(ROOT / "configs/gpt2_124m.yaml"), "--analytic", *words])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_overrides_may_stand_anywhere(monkeypatch):
    called = {}

    def plan(config: str, flags: list[str], *, topology: str, analytic: bool = False, json: bool = False) -> None:
        """Plan."""
        called.update(locals())

    monkeypatch.setattr(commands, "plan", plan)
    args = ["--topology", "v5e:4x4", "--analytic", "true", "--model.remat", "full", "c.yaml", "--json"]
    assert cli.plan([*args, "--mesh.fsdp=4"]) == 0
    assert called["flags"] == ["--model.remat=full", "--mesh.fsdp=4"]
    assert [called[name] for name in ("config", "topology", "analytic", "json")] == ["c.yaml", "v5e:4x4", True, True]


# Ceilings and calibration against published MFU (MaxText's table; causal attention at half, as they count).


def test_ceilings_lie_above_and_expectations_near_every_published_run():
    rows = calibration.compare()
    assert len(rows) == 5
    for row in rows:
        assert row["ceiling"] > row["published"], row
        assert row["expected"] == pytest.approx(row["published"], rel=0.25), row
        assert row["expected"] <= row["ceiling"]


def test_factors_are_the_least_squares_of_published_times():
    """scipy's bounded least squares, on the same relative errors."""
    optimize = pytest.importorskip("scipy.optimize")
    times, target = [], []
    for row in calibration.PUBLISHED:
        line = calibration.line_of(row)
        measured = line.step_s * calibration.ceiling_of(row) / row.mfu
        times.append([line.times_s[name] / measured for name in calibration.RESOURCES])
        target.append(1.0)
    best = optimize.lsq_linear(np.array(times), target, bounds=([1, 0, 0], np.inf))
    np.testing.assert_allclose(calibration.factors(), best.x, rtol=1e-4)


@pytest.mark.whole
def test_search_ranks_what_fits_and_writes_a_config_that_plans(tmp_path):
    out = tmp_path / "best.yaml"
    own = ["--model.context_length", "512", "--optim.ema_decay=0.99", "--model.remat=full"]
    args = ["configs/gpt2_124m.yaml", *own, "--topology", "v5e:2x4", "--search", "--analytic", "--out", str(out)]
    result = run_script("-m", "gptjax", "plan", *args)
    assert result.returncode == 0, result.stderr
    values = yaml.safe_load(out.read_text())
    flags = re.search(r"the best of \d+ that fit by arithmetic: (--mesh\.fsdp.*|--mesh\.data.*)", result.stdout)[
        1
    ].split()
    assert f"--mesh.fsdp {values['mesh']['fsdp']}" in " ".join(flags)
    wanted = load_config(["configs/gpt2_124m.yaml", *own, *flags, "--workdir=runs/best"])
    assert load_config([str(out)]) == wanted
    assert math.prod(values["mesh"][name] for name in ("data", "fsdp", "tensor")) == 8
    cfg, topology = planning.config_on_accelerators(load_config([str(out)])), parse_topology("v5e:2x4")
    ranked = planning.candidates(cfg, topology)
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(ranked))
    best = calibration.roofline_of(cfg, topology, estimate(cfg, topology))
    assert calibration.expected_step_s(best, calibration.factors()) == pytest.approx(ranked[0][0])


def test_every_chip_has_a_source_and_its_roofline_is_in_order():
    for name, chip in CHIPS.items():
        assert chip.source, name
        assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth, name


def test_communication_theory_of_each_axis():
    """FSDP moves three times the weights; tensor parallelism about four activations a layer, five with full remat."""
    cfg = llama({"loss_chunks": 1}, fsdp=16)
    theory = estimate(cfg, parse_topology("v5e:4x4")).collectives
    blocks = 32 * (4096 * 128 * (32 + 8 + 8) + 128 * 32 * 4096 + 3 * 4096 * 14336) * 2
    assert theory["gradients scattered"] == pytest.approx(blocks * 15 / 16, rel=1e-3)
    assert theory["weights gathered"] > 2 * theory["gradients scattered"]
    over = estimate(llama({"loss_chunks": 1}, fsdp=2, tensor=8), parse_topology("v5e:4x4")).collectives
    activation = 128 * 2048 * 4096 * 2
    assert over["activations over tensor"] == pytest.approx(2 * 7 / 8 * activation * (5 * 32 + 2), rel=1e-6)
