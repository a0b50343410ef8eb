"""Canaries: where they are planted, and what their exposure says."""

import json
import math

import jax
import numpy as np
import pytest
from conftest import GPT2_LIKE, make_config, run_script

import gptjax
from gptjax.apps.evaluate import commands
from gptjax.apps.evaluate.items import Answers
from gptjax.apps.evaluate.memorization import exposure, memorization, plant
from gptjax.generate import LanguageModel
from gptjax.nn.transformer import init_params
from gptjax.tokenizers import ByteTokenizer

TEXT = "\n".join(f"line {i} of the text" for i in range(50)) + "\n"


def test_planting_adds_each_canary_as_often_as_asked_and_changes_nothing_else():
    planted, canaries = plant(TEXT, [1, 4], 3, seed=0)
    assert [c["repeats"] for c in canaries] == [1, 1, 1, 4, 4, 4]
    for canary in canaries:
        assert planted.splitlines().count(canary["prefix"] + canary["secret"]) == canary["repeats"]
    assert [line for line in planted.splitlines() if not line.startswith("The secret")] == TEXT.splitlines()
    assert planted == plant(TEXT, [1, 4], 3, seed=0)[0] != plant(TEXT, [1, 4], 3, seed=1)[0]


def test_exposure_is_the_bits_by_which_a_canary_outranks_chance():
    others = np.random.default_rng(0).normal(size=20_000)
    assert exposure(0.0, others, 10**6) == pytest.approx(1, abs=0.05)  # the median: half are likelier
    assert exposure(1.2816, others, 10**6) == pytest.approx(math.log2(10), abs=0.1)
    assert exposure(50.0, others, 10**6) == pytest.approx(math.log2(10**6))
    assert exposure(-50.0, others, 10**6) == 0


@pytest.mark.whole
def test_an_untrained_model_remembers_nothing_and_a_figure_has_its_error(tmp_path):
    cfg = make_config({**GPT2_LIKE, "vocab_size": 257, "context_length": 64, "init": "gpt2"}).model
    lm = LanguageModel(cfg, init_params(cfg, jax.random.key(0)), ByteTokenizer())
    text, canaries = plant(TEXT, [1, 8], 3, seed=0)
    data, training = tmp_path / "canaries.jsonl", tmp_path / "text.txt"
    data.write_text("".join(json.dumps(canary) + "\n" for canary in canaries))
    training.write_text(text)
    figures = memorization(lm, str(data), str(training), Answers(None, {}), seed=0)
    assert 0 < figures["exposure, planted 8 times"].value < 6
    assert figures["exposure, planted 8 times"].stderr > 0
    assert figures["verbatim after 32 tokens"].value == 0


@pytest.mark.slow
def test_exposure_rises_with_repetition_in_a_trained_model(tmp_path, capsys, tinyshakespeare):
    text, planted, canaries = (tmp_path / name for name in ("text.txt", "planted.txt", "canaries.jsonl"))
    text.write_text(tinyshakespeare.read_text()[:200_000])
    commands.plant_canaries(str(text), out=str(planted), canaries=str(canaries))
    config = str(gptjax.__file__).replace("gptjax/__init__.py", "configs/shakespeare_char_cpu.yaml")
    options = ["--data.path", planted, "--data.cache_dir", tmp_path / "cache", "--train.total_steps", "3000"]
    run_script("train.py", config, "--workdir", tmp_path / "run", *options, timeout=3000)
    capsys.readouterr()
    commands.memorization(str(tmp_path / "run"), data=str(canaries), text=str(planted), json=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    print(found)
    bits = [found[f"exposure, planted {n} times"]["value"] for n in (1, 4, 16, 64)]
    assert bits == sorted(bits)
    assert bits[-1] > bits[0] + 5
