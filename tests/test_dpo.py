"""Preference tuning: the loss, gradients and rewards of trl, the reference computed once, bad pairs."""

import json
import random
import shutil
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chats import make_tokenizer_folder, random_conversation, random_text, write_rows
from conftest import GPT2_LIKE, TINY_RUN, make_config, run_script, trainable_on
from test_train import assert_refused

from gptjax.config import DataConfig
from gptjax.data.batches import as_batch, examples_of, training_examples, validation_batches
from gptjax.data.corpus import load_corpus
from gptjax.errors import UserError
from gptjax.metrics import read_metrics
from gptjax.nn.adapters import without_adapter
from gptjax.step import init_state, make_eval_step, make_row_log_probabilities, make_terms, make_train_step

pytest.importorskip("jinja2", reason="pip install -e '.[finetune]'")
MODEL = {**GPT2_LIKE, "n_layers": 1, "vocab_size": 500, "context_length": 128}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, corpus_file):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tok") / "chat", corpus_file, None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """30 pairs, half of them with a prompt of several messages."""
    rng, rows = random.Random(3), []
    for number in range(30):
        question = {"role": "user", "content": "?"}
        prompt = random_text(rng) if number % 2 else [*random_conversation(rng)[-2:], question]
        rows.append({"prompt": prompt, "chosen": random_text(rng), "rejected": random_text(rng) + " no"})
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def data_of(path, tokenizer_folder, token_cache) -> DataConfig:
    return DataConfig(path=str(path), kind="preferences", tokenizer=str(tokenizer_folder), cache_dir=str(token_cache))


def first_rows(corpus, count: int) -> dict[str, np.ndarray]:
    examples = examples_of(corpus.sources[0].train, 128, "training")
    return as_batch([examples.example(i, 0) for i in range(count)])


def test_rows_of_a_pair_stay_together_and_only_the_answer_is_learnt(pairs, tokenizer_folder, token_cache):
    cfg = data_of(pairs, tokenizer_folder, token_cache)
    corpus = load_corpus(cfg)
    tokenizer = corpus.tokenizer
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    sides = {side: {row[side] for row in rows} for side in ("chosen", "rejected")}
    endless = training_examples(corpus, cfg, 128, 4, seed=0)
    seen = []
    count = len(examples_of(corpus.sources[0].train, 128, "training")) // 2
    assert 15 < count < 27  # those with a long side are left out
    for n in range(0, 2 * count, 2):
        texts = []
        for row in (endless[n], endless[n + 1]):
            learnt = row["targets"][row["weights"] > 0].tolist()
            assert learnt[-1] == tokenizer.special_tokens["<|im_end|>"]
            texts.append(tokenizer.decode(learnt))
        assert texts[0] in sides["chosen"] and texts[1] in sides["rejected"]
        assert any(row["chosen"] == texts[0] and row["rejected"] == texts[1] for row in rows)
        seen.append(tuple(texts))
    assert len(set(seen)) == count
    held_out = list(validation_batches(corpus.sources[0].val, 128, 4, 3, [0, 1, 2, 3]))
    assert len(held_out) == 1  # one whole pair of the three rows that are allowed
    assert (held_out[0]["weights"].sum(axis=1) > 0).tolist() == [True, True, False, False]


def trl_values(log_p, reference, weights, beta: float, normalise: bool):
    """Loss, gradient by log_p, and rewards by the trainer of trl, given each token's log-probability."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[peer]'")
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="pip install -e '.[peer]'")
    order = np.r_[0 : len(log_p) : 2, 1 : len(log_p) : 2]  # trl's batch: all chosen, then all rejected
    logged = torch.tensor(log_p[order], requires_grad=True)
    mask = torch.tensor(weights[order])
    known = torch.tensor(reference[order]).chunk(2)

    none = torch.zeros_like(mask)
    output = SimpleNamespace(log_probs=logged * mask, entropy=none, mean_logits=none, is_top1=none.bool())
    gather = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    options = {"aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": True, "use_weighting": False}
    options |= {"f_divergence_type": "reverse_kl", "loss_types": ["sigmoid_norm" if normalise else "sigmoid"]}
    options |= {"loss_weights": [1.0], "beta": beta, "label_smoothing": 0.0, "_total_train_tokens": 0, "_tp_size": 1}
    metrics = {"train": defaultdict(list)}
    model = SimpleNamespace(training=True)
    trainer = SimpleNamespace(model=model, accelerator=gather, _metrics=metrics, **options)
    ones = torch.ones(len(order), 1)
    inputs = {
        "input_ids": torch.zeros(len(order), weights.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(order), weights.shape[1] + 1),
        "completion_mask": torch.cat([0 * ones, mask], dim=1).long(),
        "ref_chosen_logps": known[0],
        "ref_rejected_logps": known[1],
    }
    found = trl.DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    found.backward()
    gradient = np.empty_like(log_p)
    gradient[order] = logged.grad.numpy()
    rewards = {name: values[0] for name, values in metrics["train"].items()}
    return float(found), gradient, rewards


@pytest.mark.whole
@pytest.mark.parametrize("normalise", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ten_steps_have_the_loss_gradient_and_rewards_of_trl(
    normalise, pairs, tokenizer_folder, token_cache, monkeypatch
):
    corpus = load_corpus(data_of(pairs, tokenizer_folder, token_cache))
    batch = first_rows(corpus, 8)
    how = {"beta": 0.5, "normalise_length": normalise}
    train = {"objective": "dpo", "batch_sequences": 8}
    optim = {"peak_lr": 0.01, "clip_norm": None, "schedule": "constant", "weight_decay": 0.0}
    t = trainable_on(make_config(MODEL, train=train, dpo=how, optim=optim))
    state, step = init_state(t), make_train_step(t)
    reference = np.asarray(make_row_log_probabilities(t)(state.params, batch))
    batch["reference"] = np.zeros_like(batch["weights"])
    batch["reference"][:, 0] = reference
    given = {}

    def log_p_of(hidden, head, targets, spec):
        given["log_p"] = of_model(hidden, head, targets, spec) + given["shift"]
        return given["log_p"]

    from gptjax import objectives

    of_model = objectives.log_probabilities
    monkeypatch.setattr(objectives, "log_probabilities", log_p_of)  # undone once `gradient` is traced
    terms_of = make_terms(t)

    def loss(shift, params):
        given["shift"] = shift
        terms = terms_of(params, batch)
        return terms["loss"][0] / terms["loss"][1], (given["log_p"], terms)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    margins = []
    for number in range(10):
        (mine, (log_p, terms)), slope = gradient(jnp.zeros_like(batch["weights"]), state.params)
        monkeypatch.undo()
        theirs, their_slope, rewards = trl_values(
            np.asarray(log_p), reference, batch["weights"], how["beta"], normalise
        )
        assert float(mine) == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(slope, their_slope, atol=1e-6)
        if not normalise:  # trl reports rewards without the lengths
            names = {"margins": "margin", "accuracies": "accuracy", "chosen": "chosen", "rejected": "rejected"}
            if number == 0:
                del names["accuracies"]  # margins are 0 but for rounding
            for their_name, name in names.items():
                total, weight = terms[f"reward_{name}"]
                assert float(total / weight) == pytest.approx(rewards[f"rewards/{their_name}"], rel=1e-5, abs=1e-5)
        state, metrics = step(state, batch)
        margins.append(float(metrics["train/reward_margin"]))
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 0.1


@pytest.mark.whole
def test_smoothing_a_chunked_loss_and_a_mesh(pairs, tokenizer_folder, token_cache):
    corpus = load_corpus(data_of(pairs, tokenizer_folder, token_cache))
    batch = first_rows(corpus, 8)
    batch["reference"] = np.random.default_rng(0).normal(-1, 0.1, batch["weights"].shape).astype(np.float32)
    found, row_log_p = [], None
    for M, chunks, devices, axes in ((1, 1, 1, {}), (2, 4, 4, {"fsdp": 2, "tensor": 2})):
        train = {"objective": "dpo", "batch_sequences": 8, "microbatches": M, "loss_chunks": chunks}
        t = trainable_on(make_config(MODEL, train=train, dpo={"label_smoothing": 0.1}), devices, **axes)
        state = init_state(t)
        if row_log_p is None:
            row_log_p = np.asarray(make_row_log_probabilities(t)(state.params, batch))
        _, metrics = make_train_step(t)(state, jax.device_put(batch, t.batch_sharding))
        found.append({name: float(metrics[name]) for name in ("train/loss", "grad_norm", "train/reward_margin")})
    margin = 0.1 * np.diff((row_log_p - batch["reference"].sum(axis=1)).reshape(-1, 2), axis=1)[:, 0] * -1
    wanted = -0.9 * np.log(1 / (1 + np.exp(-margin))) - 0.1 * np.log(1 / (1 + np.exp(margin)))
    assert found[0]["train/loss"] == pytest.approx(wanted.mean(), rel=1e-5)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_a_pair_without_rows_counts_for_nothing(pairs, tokenizer_folder, token_cache):
    corpus = load_corpus(data_of(pairs, tokenizer_folder, token_cache))
    batch = first_rows(corpus, 8)
    batch["reference"] = np.zeros_like(batch["weights"])
    t = trainable_on(make_config(MODEL, train={"objective": "dpo", "batch_sequences": 8}))
    params, evaluate = init_state(t).params, make_eval_step(t)
    part = {**batch, "weights": batch["weights"] * (np.arange(8) < 6)[:, None].astype(np.float32)}
    assert float(evaluate(params, part)["loss"][1]) == 3
    assert float(evaluate(params, batch)["loss"][1]) == 4


@pytest.mark.whole
def test_adapters_learn_preferences_over_the_frozen_reference(pairs, tokenizer_folder, token_cache):
    corpus = load_corpus(data_of(pairs, tokenizer_folder, token_cache))
    batch = first_rows(corpus, 8)
    optim = {"peak_lr": 0.01, "schedule": "constant", "weight_decay": 0.0}
    t = trainable_on(
        make_config(MODEL, train={"objective": "dpo", "batch_sequences": 8}, lora={"rank": 2}, optim=optim)
    )
    state, step = init_state(t), make_train_step(t)
    base = jax.tree.map(np.array, without_adapter(state.params))
    batch["reference"] = np.zeros_like(batch["weights"])
    batch["reference"][:, 0] = make_row_log_probabilities(t)(state.params, batch)
    margins = []
    for _ in range(6):
        state, metrics = step(state, batch)
        margins.append(float(metrics["train/reward_margin"]))
    assert margins[0] == pytest.approx(0, abs=1e-5)  # adapters have no effect before the first step
    assert margins[-1] > 0.1
    jax.tree.map(np.testing.assert_array_equal, without_adapter(state.params), base)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "line 2 has equal sides, chosen and rejected; remove the pair",
        ),
        ({"prompt": "a", "chosen": "b"}, "line 2 has the fields 'prompt', 'chosen'; rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "line 2 has a response without tokens"),
        ({"prompt": [], "chosen": [], "rejected": "x"}, "line 2 has no messages"),
        (
            {
                "prompt": [{"role": "assistant", "content": "x"}],
                "chosen": [{"role": "user", "content": "x"}],
                "rejected": "y",
            },
            "line 2 has a side without a response",
        ),
    ],
)
def test_a_bad_pair_is_one_line(row, why, tmp_path, token_cache):
    path = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, row])
    with pytest.raises(UserError, match=why):
        load_corpus(data_of(path, "byte", token_cache))


@pytest.mark.whole
def test_a_run_computes_its_reference_once_and_resumes_bitwise(pairs, tokenizer_folder, token_cache, tmp_path):
    shape = [*TINY_RUN, f"--data.tokenizer={tokenizer_folder}", f"--data.cache_dir={token_cache}"]
    shape += ["--model.context_length=128", "--train.total_steps=10", "--checkpoint.keep_last=5"]
    chats = write_rows(tmp_path / "c.jsonl", [{"prompt": "a", "response": "b"}] * 20)
    of_chats, of_pairs = (
        [f"--data.kind={kind}", f"--data.path={path}"] for kind, path in (("sft", chats), ("preferences", pairs))
    )

    def start(workdir, *flags):
        return run_script("tests/train_briefly.py", *shape, *flags, f"--workdir={tmp_path / workdir}")

    assert start("base", *of_chats, "--train.objective=sft").returncode == 0
    dpo = ["--train.objective=dpo", f"--init_from={tmp_path / 'base'}"]
    assert_refused(start("x", *of_pairs, "--train.objective=dpo"), "train.objective dpo needs init_from")
    assert_refused(start("x", *of_pairs, "--train.objective=sft"), "set train.objective dpo")
    assert_refused(start("x", *of_chats, *dpo), "set data.kind preferences")
    assert start("whole", *of_pairs, *dpo).returncode == 0
    whole, part = tmp_path / "whole", tmp_path / "part"
    rows = read_metrics(whole)
    assert rows[0]["val/reward_margin"] == pytest.approx(0, abs=1e-5)  # the reference is the start
    assert rows[0]["val/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[-1]["train/reward_margin"] > 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "10")
    (part / "reference.json").unlink()  # it is computed again, from the model of init_from
    assert start("part", *of_pairs, *dpo).returncode == 0
    names = ("step", "train/loss", "val/loss", "grad_norm", "train/reward_margin")
    first, second = ([{n: row.get(n) for n in names} for row in read_metrics(folder)] for folder in (whole, part))
    assert first == second
    assert json.loads((whole / "reference.json").read_text()) == json.loads((part / "reference.json").read_text())
