"""The bench: what it prints, and what it refuses. Its figures are for people: no test looks at a time."""

import json

import pytest
from conftest import ROOT, run_script

from gptjax import cpu
from gptjax.apps.bench import limits, pairs, worker
from gptjax.apps.bench.pairs import Side, choose_fastest, fastest_products
from gptjax.errors import UserError


def bench(*words):
    return run_script("-m", "gptjax", "bench", *words)


@pytest.mark.whole
def test_training_is_measured_and_reported_as_json():
    done = bench("train", "--pairs", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["unit"] == "tokens/s"
    assert found["gptjax"]["median"] > 0
    assert found["gptjax"]["peak_bytes"] > 2**27
    assert set(found["machine"]) == {"cpu", "cores", "python", "versions"}


@pytest.mark.whole
def test_reading_is_measured_beside_training(corpus_file):
    done = bench("data", "--path", str(corpus_file), "--pairs", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert min(found["mb_per_s"], found["delivered_per_s"], found["consumed_per_s"]) > 0


@pytest.mark.whole
def test_a_run_and_its_steps_alone_take_turns_on_the_configs_devices(tmp_path):
    config = tmp_path / "spread.yaml"
    config.write_text((ROOT / "configs" / "debug.yaml").read_text() + "mesh: {fsdp: 2, cpu_devices: 2}\n")
    done = bench("loop", str(config), "--steps", "150", "--pairs", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ratio"] == found["run_step_s"] / found["step_s"] > 0


@pytest.mark.slow
def test_every_run_of_the_peer_begins_anew(corpus_file, monkeypatch):
    torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
    monkeypatch.setitem(worker.NANOGPT, "steps", 20)
    monkeypatch.setitem(worker.NANOGPT, "warmup", 5)
    turn, losses = worker.reach_peer({"text": str(corpus_file)}), []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(turn()["val/loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["train", "--size", "huge"], "huge"),
        (
            ["train", "--peer", "hff"],
            "--peer 'hff' is neither hf nor hf-compile nor hf-bf16 nor hf-compile-bf16 nor hf-best nor a checkout",
        ),
        (["sample", "--pairs", "0"], "pairs 0 must be at least 1"),
        (["startup", "nowhere.yaml"], "nowhere.yaml"),
        (["loop", "configs/debug.yaml", "--steps", "50"], "steps 50 must be at least 100"),
        (["reach", "configs/debug.yaml", "nowhere.txt"], "there is no file nowhere.txt"),
        (["speed"], "unknown command 'speed'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_refused_in_one_line(words, error):
    done = bench(*words)
    assert done.returncode == 2
    assert error in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_two_checkouts_are_compared():
    done = bench("train", "--pairs", "1", "--peer", str(ROOT), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[str(ROOT)]["median"] > 0
    assert found["ratio"]["median"] == pytest.approx(found["gptjax"]["median"] / found[str(ROOT)]["median"])


def test_a_side_that_cannot_work_is_an_error_and_no_hang():
    with pytest.raises(UserError, match="the side nobody of the comparison ended with code 1"):
        Side({"work": "train", "side": "nobody"})


def test_the_fastest_peer_is_chosen_and_the_others_say_why_they_are_not(monkeypatch):
    class Peer:
        def __init__(self, job):
            self.seconds = {"hf": 3.0, "hf-bf16": 2.0, "slow": 4.0}.get(job["side"])
            if self.seconds is None:
                raise UserError(f"{job['side']} cannot run")

        def turn(self):
            return {"seconds": self.seconds}

        def close(self): ...

    monkeypatch.setattr(pairs, "Side", Peer)
    monkeypatch.setattr(pairs.shutil, "which", lambda name: None)
    best, tried = choose_fastest({}, ("hf", "hf-compile", "slow", "hf-bf16", "absent"))
    assert best == "hf-bf16"
    assert tried["hf"] == 3.0
    assert "C++ compiler" in tried["hf-compile"]
    assert tried["absent"] == "absent cannot run"
    with pytest.raises(UserError, match="none of absent could run"):
        choose_fastest({}, ("absent",))


def test_products_are_measured_by_each_backend_that_there_is(monkeypatch):
    absent = {"xla_no_such_option": True}
    monkeypatch.setattr(cpu, "PRODUCTS", {**{name: cpu.PRODUCTS[name] for name in ("xla", "ynnpack")}, "no": absent})
    shapes = limits.product_shapes({"d_model": 8, "vocab_size": 11}, 16)
    assert sum(m * k * n for m, k, n in shapes) == 3 * 16 * 8 * (12 * 8 + 11)
    rates = limits.measure_products(shapes, "float32")
    assert rates["no"] is None
    assert min(rates["xla"], rates["ynnpack"]) > 0
    assert fastest_products({"flops_per_s": {"float32": rates}}, "float32")[1] == max(rates["xla"], rates["ynnpack"])


def test_a_busy_machine_is_reported(monkeypatch):
    monkeypatch.setattr(limits.os, "getloadavg", lambda: (7.5, 0, 0))
    monkeypatch.setattr(limits, "_cpu_ticks", iter([(1000, 0), (2000, 100)]).__next__)
    load = limits.Load()
    warnings = "; ".join(load.warnings([1.0, 2.0]))
    assert "load of 7.5" in warnings and "10% of the time" in warnings and "2.0x apart" in warnings
    monkeypatch.setattr(limits.os, "getloadavg", lambda: (0.1, 0, 0))
    monkeypatch.setattr(limits, "_cpu_ticks", lambda: (1000, 0))
    assert limits.Load().warnings([1.0, 1.1]) == []


def test_both_sides_train_the_same_model():
    pytest.importorskip("transformers")
    from gptjax.configfile import config_from_dict
    from gptjax.nn.transformer import count_params

    for size, shape in worker.SIZES.items():
        ours = count_params(config_from_dict({"model": {**shape, "vocab_multiple": 1}}).model)["total"]
        theirs = worker._peer_model({"size": size, "dtype": "float32", "side": "hf"}, shape["context_length"])
        assert ours == theirs.num_parameters()
