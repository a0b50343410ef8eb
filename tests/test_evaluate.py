"""`gptjax eval`: log-likelihoods against the full forward, figures against their definitions, lm-eval end to end."""

import json
import sys

import jax
import numpy as np
import pytest
from conftest import GPT2_LIKE, MODERN, make_config, without_zeros

import gptjax.convert
from gptjax.apps.evaluate import commands, metrics
from gptjax.apps.evaluate.generation import answer_prompts
from gptjax.decoding.beam import BeamSearch
from gptjax.decoding.scoring import Passage, Scorer, encode_pair, pack, rolling_windows
from gptjax.generate import LanguageModel
from gptjax.nn.transformer import init_params
from gptjax.tokenizers import CharTokenizer

ALPHABET = "\n " + "".join(chr(c) for c in range(48, 48 + 59))


@pytest.fixture(scope="module", params=[GPT2_LIKE, MODERN], ids=["gpt2", "modern"])
def lm(request) -> LanguageModel:
    cfg = make_config({**request.param, "init": "gpt2"}).model
    params = jax.tree.map(lambda x: 5 * x, without_zeros(init_params(cfg, jax.random.key(0))))
    return LanguageModel(cfg, params, CharTokenizer(ALPHABET))


@pytest.fixture
def loaded(lm, monkeypatch) -> LanguageModel:
    """The model that every command loads, whatever path it is given."""
    monkeypatch.setattr(gptjax.convert, "load", lambda *args: lm)
    monkeypatch.setattr(commands, "prepare_process", lambda *args: None)
    return lm


def by_full_forward(lm: LanguageModel, context: list[int], target: list[int]) -> tuple[np.ndarray, bool]:
    T = lm.config.context_length
    ids = [*context, *target][-(T + 1) :][:-1]
    log_p = jax.nn.log_softmax(lm.logits([ids + [0] * (T - len(ids))])[0, : len(ids)])[-len(target) :]
    return np.array([log_p[i, id] for i, id in enumerate(target)]), bool((log_p.argmax(-1) == np.array(target)).all())


def test_packed_scores_equal_the_full_forward_of_each_sequence_alone(lm):
    rng = np.random.default_rng(0)
    requests = [
        (rng.integers(0, 61, c).tolist(), rng.integers(0, 61, n).tolist())
        for c, n in [(1, 1), (3, 2), (31, 1), (40, 5), (9, 9), (2, 32), (5, 1)]
    ]
    requests += [(requests[0][0], [7]), (requests[0][0], [8])]  # one context, several continuations of one token
    context = requests[2][0]
    likeliest = int(lm.logits([[*context, 0]])[0, 30].argmax())
    requests.append((context, [likeliest]))
    found = dict(Scorer(lm, batch_tokens=64).score(requests))
    assert sorted(found) == list(range(len(requests)))
    for number, (context, target) in enumerate(requests):
        logprobs, greedy = by_full_forward(lm, context, target)
        np.testing.assert_allclose(found[number].logprobs, logprobs, atol=2e-5)
        assert found[number].greedy == greedy
    assert found[len(requests) - 1].greedy


def test_packing_leaves_no_row_half_empty_and_loses_nothing():
    passages = [Passage((0,) * n, [(n, (0,))]) for n in range(1, 700, 7)]
    packed = pack(passages, 1024)
    placed = [passage for _, rows in packed for row in rows for passage in row]
    assert sorted(len(p.ids) for p in placed) == sorted(len(p.ids) for p in passages)
    for width, rows in packed:
        filled = [sum(len(p.ids) for p in row) for row in rows]
        assert max(filled) <= width
        assert np.mean(filled) > 0.75 * width


def test_rolling_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils", reason="pip install -e '.[eval]'")
    for n in (1, 7, 8, 9, 24, 29):
        theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(list(range(n)), 99, 8, 1))
        assert rolling_windows(range(n), 99, 8) == list(theirs)


@pytest.mark.whole
def test_answers_end_at_a_stop_text_whatever_the_batch(lm):
    prompts = [lm.tokenizer.encode(text).tolist() for text in ("A", "BCD", "A", "XYZW")]
    free = dict(answer_prompts(lm, prompts, 12))
    stop = free[1].text[3:5]
    found = dict(answer_prompts(lm, prompts, 12, [stop]))
    for number, answer in free.items():
        assert answer.text == lm.generate(lm.tokenizer.decode(prompts[number]), 12)[0][len(prompts[number]) :]
        assert found[number].text == answer.text.split(stop)[0]


def test_figures_are_those_of_their_definitions():
    assert metrics.normalise("The  cat, a Dog!") == "cat dog"
    assert metrics.exact_match("the Answer.", ["no", "answer"]) == 1
    assert metrics.f1("red big cat", ["a cat", "blue"]) == pytest.approx(0.5)
    assert metrics.mean([0, 1, 1, 0]) == (0.5, pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2))
    # Two bins: 0.25 against 1 of 2 right, and 0.95 against all right.
    assert metrics.calibration_error([0.25, 0.25, 0.95, 0.95], [1, 0, 1, 1]) == pytest.approx(0.15)


def test_choice_scores_each_choice_after_its_question_and_resumes(loaded, tmp_path, capsys, monkeypatch):
    rows = [{"question": f"Q{i}:", "choices": ["A", "BB", "CCCC"], "answer": i % 3} for i in range(4)]
    data, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands.choice("MODEL", data=str(data), out=str(out), json=True)
    figures = json.loads(capsys.readouterr().out)
    right, right_norm = [], []
    for row in rows:
        pairs = [encode_pair(loaded.tokenizer, row["question"], f" {c}") for c in row["choices"]]
        scores = np.array([by_full_forward(loaded, *pair)[0].sum() for pair in pairs])
        right.append(scores.argmax() == row["answer"])
        right_norm.append((scores / [1, 2, 4]).argmax() == row["answer"])
    assert figures["accuracy"]["value"] == np.mean(right)
    assert figures["accuracy_norm"]["value"] == np.mean(right_norm)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:9])  # stopped while it wrote
    asked = []
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, pairs: asked.append(len(pairs)) or score(self, pairs))
    commands.choice("MODEL", data=str(data), out=str(out), json=True)
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["items"] == len(rows)
    assert all(resumed[name] == pytest.approx(figures[name]) for name in ("accuracy", "accuracy_norm"))
    assert asked == [2 * 3]


def test_bits_per_byte_is_the_loss_of_every_token(loaded, tmp_path, capsys):
    text = ALPHABET[2:] * 2
    (tmp_path / "t.txt").write_text(text)
    commands.bits("MODEL", data=str(tmp_path / "t.txt"), json=True)
    found = json.loads(capsys.readouterr().out)
    windows = rolling_windows(loaded.tokenizer.encode(text), 0, 32)
    nats = -sum(by_full_forward(loaded, *window)[0].sum() for window in windows)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / len(text), rel=1e-5)
    assert found["items"] == 4


@pytest.mark.whole
def test_a_perfect_translation_has_a_chrf_of_100(loaded, tmp_path, capsys):
    pytest.importorskip("sacrebleu", reason="pip install -e '.[eval]'")
    sources = ["ABC", "DEF"]
    outputs = [text[len(s) + 1 :].split("\n")[0].strip() for s in sources for text in loaded.generate(f"{s}>", 20)]
    if not all(outputs):
        pytest.skip("this model begins with a line break")
    (tmp_path / "t.tsv").write_text("".join(f"{s}\t{o}\n" for s, o in zip(sources, outputs, strict=True)))
    commands.translation("M", data=str(tmp_path / "t.tsv"), prompt="{source}>", max_new_tokens=20, json=True)
    assert json.loads(capsys.readouterr().out)["chrf"]["value"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("verb", "content", "message"),
    [
        ("choice", "", "is empty"),
        ("choice", '{"question": "a", "choices": ["b"]}\n', "line 1 lacks answer"),
        ("choice", '{"question": "a", "choices": ["b"], "answer": 1}\n', "count them from 0"),
        ("qa", '{"prompt": "%s", "answers": ["b"]}\n' % ("A" * 40), "exceed the model's context of 32"),
        ("translation", "no column\n", "has 1 columns; give source TAB target"),
    ],
)
def test_bad_data_is_an_error_of_one_line(loaded, tmp_path, verb, content, message):
    (tmp_path / "data").write_text(content)
    with pytest.raises(gptjax.errors.UserError, match=message):
        commands.VERBS[verb]("MODEL", data=str(tmp_path / "data"))


@pytest.mark.whole
def test_lm_eval_runs_a_task_with_a_model_of_gptjax(loaded, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")
    from gptjax.apps.evaluate import harness

    monkeypatch.setattr(harness, "load", lambda *args: loaded)
    rows = [{"q": f"Q{i}:", "choices": ["A", "BB"], "answer": i % 2} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/d.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    commands.lm_eval(
        [
            "--tasks",
            "toy",
            "--include_path",
            str(tmp_path),
            "--model_args",
            "path=MODEL",
            "--output_path",
            str(tmp_path / "out"),
            "--log_samples",
        ]
    )
    assert "gptjax" in sys.argv
    assert "toy" in capsys.readouterr().out
    samples = [json.loads(line) for f in tmp_path.rglob("samples_toy*.jsonl") for line in f.read_text().splitlines()]
    assert len(samples) == 3
    for sample in samples:
        pairs = [encode_pair(loaded.tokenizer, sample["doc"]["q"], f" {c}") for c in sample["doc"]["choices"]]
        expected = [by_full_forward(loaded, *pair)[0].sum() for pair in pairs]
        np.testing.assert_allclose([float(r[0][0]) for r in sample["resps"]], expected, atol=1e-4)


def test_translation_by_beams_ends_at_a_line_break(loaded, tmp_path, capsys):
    pytest.importorskip("sacrebleu", reason="pip install -e '.[eval]'")
    (tmp_path / "t.tsv").write_text("ABC\tX\nDE\tY\n")
    out = tmp_path / "out.jsonl"
    commands.translation(
        "M", data=str(tmp_path / "t.tsv"), prompt="{source}>", max_new_tokens=12, beams=3, out=str(out)
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    best = [beams[0].completion.text for beams in BeamSearch(loaded, 3).complete(["ABC>", "DE>"], 12)]
    assert {row["item"]: row["text"] for row in rows} == {i: t.partition("\n")[0].strip() for i, t in enumerate(best)}
    assert "chrf" in capsys.readouterr().out
