"""Vocabularies of text with tags and pictures: their data, their prompts, and pictures as files."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import GPT2_LIKE, make_config, without_zeros

from gptjax import cli
from gptjax.apps.evaluate import commands
from gptjax.config import DataConfig, MixtureSource
from gptjax.config.data import PictureConfig
from gptjax.convert.export import tokenizer_files
from gptjax.data.batches import examples_of
from gptjax.data.corpus import load_corpus
from gptjax.data.tagged import TaggedTokens
from gptjax.decoding.marks import mark_prompts, picture_prompt, plain_prompt, read_picture, write_pictures
from gptjax.errors import UserError
from gptjax.generate import LanguageModel
from gptjax.nn.transformer import init_params
from gptjax.sampling import Sampling
from gptjax.tokenizers import ByteTokenizer, CharTokenizer, MarkedTokenizer, PictureFormat, tokenizer_from_dict
from gptjax.tokenizers.marked import PICTURE, PICTURE_END

FORM = PictureFormat(2, 3, 4)
LEVELS = np.array([[0, 1, 2], [3, 0, 1]])
TOKENIZER = MarkedTokenizer(ByteTokenizer(), ["prose", "plays"], FORM)


def documents(tmp_path, rows: list) -> str:
    path = tmp_path / "pictures.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def picture_config(path: str, tmp_path, **changes) -> DataConfig:
    given = {
        "kind": "interleaved",
        "picture": PictureConfig(*FORM),
        "val_frac": 0.25,
        "cache_dir": str(tmp_path / "c"),
    }
    return DataConfig(path=path, **(given | changes))


def test_marks_come_after_the_texts_ids_and_survive_plain_data():
    again = tokenizer_from_dict(json.loads(json.dumps(TOKENIZER.to_dict())))
    for tokenizer in (TOKENIZER, again):
        assert tokenizer.vocab_size == 257 + 2 + 2 + 4
        ids = tokenizer.encode_prompt("<|tag:plays|>né" + picture_prompt(tokenizer, LEVELS) + "x").tolist()
        assert ids[0] == 258
        assert ids[4:12] == tokenizer.picture_ids(LEVELS).tolist()
        assert tokenizer.decode(ids) == "néx"
        np.testing.assert_array_equal(tokenizer.pictures_in(ids)[0], LEVELS)
    assert max(TOKENIZER.encode_batch([PICTURE])[0]) < 256  # in a document its name is text


def test_places_are_those_of_the_whole_text():
    text = f"ab<|tag:prose|>é{PICTURE}{PICTURE_END}c"
    ids, places = TOKENIZER.encode_places(text)
    spelled = [text[start:end] for start, end in places]
    assert spelled == ["a", "b", "<|tag:prose|>", "é", "é", PICTURE, PICTURE_END, "c"]
    assert len(ids) == len(spelled)


@pytest.mark.parametrize("text", [ByteTokenizer(), CharTokenizer("abc \n")], ids=["byte", "char"])
def test_an_exported_tokenizer_gives_the_same_ids(text):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = MarkedTokenizer(text, ["a"], FORM)
    made = tokenizers.Tokenizer.from_str(tokenizer_files(tokenizer)["tokenizer.json"])
    prompt = f"<|tag:a|>ab c{picture_prompt(tokenizer, LEVELS)}b"
    assert made.encode(prompt).ids == tokenizer.encode_prompt(prompt).tolist()


@pytest.mark.parametrize("train_on", ["all", "responses"])
def test_a_document_is_its_parts_in_order_and_its_last_part_the_response(tmp_path, train_on):
    row = {"parts": [{"text": "hi"}, {"picture": LEVELS.tolist()}]}
    cfg = picture_config(documents(tmp_path, [row] * 8), tmp_path, train_on=train_on)
    corpus = load_corpus(cfg)
    example = examples_of(corpus.sources[0].train, 24, "training").example(0, 0)
    wanted = [*b"hi", *corpus.tokenizer.picture_ids(LEVELS), 256]
    assert example["tokens"][:10].tolist() == wanted[:-1]
    assert example["targets"][:10].tolist() == wanted[1:]
    assert example["weights"][:10].tolist() == ([1] * 10 if train_on == "all" else [0] + [1] * 9)
    assert example["segments"][10] == 1  # the next document shares the row
    # A pixel of four levels has two bits.
    text_bytes = 1 if train_on == "all" else 0
    assert corpus.sources[0].val_bytes == 2 * (text_bytes + 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 1 has no parts"),
        ({"parts": ["x"]}, "line 1, part 1 is neither a text nor a picture"),
        ({"parts": [{"text": "x"}, {"picture": [[1, 2], [3, 0]]}]}, "picture of 2 x 2 .* needed are 2 x 3"),
        ({"parts": [{"picture": [[1, 2, 0], [3, 0]]}]}, "needed are 2 x 3 whole numbers"),
        ({"parts": [{"picture": [[0.5, 0, 0], [0, 0, 0]]}]}, "float64; needed are 2 x 3 whole numbers"),
        ({"parts": [{"picture": [[0, 9, 0], [0, 0, 0]]}]}, r"level 9; levels lie in \[0, 4\)"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_corpus(picture_config(documents(tmp_path, [row] * 8), tmp_path))


def test_the_form_of_pictures_and_an_end_are_needed(tmp_path):
    path = documents(tmp_path, [{"parts": [{"text": "x"}]}] * 8)
    with pytest.raises(UserError, match=r"set data.picture.\{height,width,levels\}"):
        load_corpus(picture_config(path, tmp_path, picture=None))
    with pytest.raises(UserError, match=r"data.tokenizer char has no token that ends a document"):
        load_corpus(picture_config(path, tmp_path, tokenizer="char"))


def drawing_model(tokenizer) -> LanguageModel:
    cfg = make_config({**GPT2_LIKE, "vocab_size": tokenizer.vocab_size, "context_length": 64}).model
    return LanguageModel(cfg, without_zeros(init_params(cfg, jax.random.key(0))), tokenizer)


def test_pictures_go_to_a_file_and_come_back(tmp_path, monkeypatch):
    pytest.importorskip("PIL", reason="pip install -e '.[plot]'")
    lm = drawing_model(TOKENIZER)
    [done] = lm.complete([f"{picture_prompt(TOKENIZER, LEVELS)}ok"], 2, Sampling(0.0))
    file = tmp_path / "new" / "out.png"
    write_pictures(str(file), [done], lm)
    np.testing.assert_array_equal(read_picture(str(file), TOKENIZER), LEVELS)
    assert mark_prompts(TOKENIZER, [file, "a"], "prose", draws=True) == [
        f"<|tag:prose|>{picture_prompt(TOKENIZER, LEVELS)}{PICTURE}",
        f"<|tag:prose|>a{PICTURE}",
    ]
    assert plain_prompt(TOKENIZER, f"<|tag:prose|>a{PICTURE}") == "a"
    write_pictures(str(file), [done, done], lm)
    with pytest.raises(UserError, match=r"has 2 x 7 pixels .* this model reads 2 x 3; scale it"):
        read_picture(str(file), TOKENIZER)


def test_a_model_without_pictures_or_a_whole_picture_says_so(tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(UserError, match="no tokens for pictures"):
        mark_prompts(ByteTokenizer(), ["a"], None, draws=True)
    with pytest.raises(UserError, match=r"cannot read the picture .*no\.png"):
        read_picture(str(tmp_path / "no.png"), TOKENIZER)
    lm = drawing_model(TOKENIZER)
    with pytest.raises(UserError, match="drew no whole picture"):
        write_pictures(str(tmp_path / "out.png"), lm.complete(["a"], 2, Sampling(0.0)), lm)


@pytest.mark.parametrize(
    ("tokenizer", "tag", "message"),
    [
        (ByteTokenizer(), "prose", "tag 'prose': this model was trained without tags"),
        (TOKENIZER, "play", "the model has no tag 'play'; did you mean 'plays'[?]; it has prose, plays"),
    ],
)
def test_an_unknown_tag_is_refused(tokenizer, tag, message):
    with pytest.raises(UserError, match=message):
        mark_prompts(tokenizer, ["a"], tag, draws=False)


def test_sampling_with_a_tag_shows_the_prompt_alone(monkeypatch, capsys):
    lm = drawing_model(TOKENIZER)
    monkeypatch.setattr("gptjax.convert.load", lambda *args: lm)
    monkeypatch.setattr(cli, "prepare_process", lambda *args: None)
    assert cli.sample(["RUN", "--prompt", "ab", "--genre", "plays", "--max_new_tokens", "0"]) == 0
    assert capsys.readouterr().out == "ab\n"
    with pytest.raises(SystemExit, match="2"):
        cli.sample(["RUN", "--genre", "poems"])
    assert "no tag 'poems'" in capsys.readouterr().err


def tagged_config(tmp_path, **changes) -> DataConfig:
    """Two tags, whose texts are the bytes a and b."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 400)
    parts = tuple(MixtureSource(str(tmp_path / f"{name}.txt"), 1.0, name=name) for name in "ab")
    given = {"kind": "tagged", "tokenizer": "byte", "mixture": parts, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**(given | changes))


def test_every_window_follows_its_tag_and_every_token_is_a_target(tmp_path):
    corpus = load_corpus(tagged_config(tmp_path))
    assert [corpus.tokenizer.tag_id(tag) for tag in "ab"] == [257, 258]
    for number, source in enumerate(corpus.sources):
        for half, what in ((source.train, "training"), (source.val, "validation")):
            example = examples_of(half, 16, what).example(0, 0)
            assert example["tokens"].tolist() == [257 + number] + [ord("ab"[number])] * 15
            assert example["targets"].tolist() == [ord("ab"[number])] * 16
    assert corpus.sources[0].fingerprint != corpus.sources[1].fingerprint


def test_windows_of_an_epoch_move_and_cover_the_text():
    ids = np.arange(100)
    windows = TaggedTokens(ids, 500).examples(16)
    for example in (windows.example(1, epoch) for epoch in range(3)):
        assert example["tokens"].tolist() == [500, *example["targets"][:-1]], "a token sees none that follows it"
    first = [windows.example(i, 0)["targets"] for i in range(len(windows))]
    np.testing.assert_array_equal(np.concatenate(first), ids[: 16 * len(windows)])
    starts = {int(windows.example(0, epoch)["targets"][0]) for epoch in range(20)}
    assert len(starts) > 5
    assert all(len(windows.example(len(windows) - 1, epoch)["targets"]) == 16 for epoch in range(20))
    with pytest.raises(UserError, match="10 tokens, fewer than one window of 16"):
        TaggedTokens(ids[:10], 500).examples(16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mixture": ()}, "data.kind tagged needs data.mixture"), ({"tokenizer": "char"}, "one tokenizer for all tags")],
)
def test_tags_need_a_mixture_and_one_tokenizer(tmp_path, changes, message):
    cfg = tagged_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_corpus(cfg if cfg.mixture else replace(cfg, path=str(tmp_path / "a.txt")))


def test_the_right_tag_is_the_one_with_the_lowest_loss(tmp_path, monkeypatch, capsys):
    lm = drawing_model(MarkedTokenizer(ByteTokenizer(), ["a", "b"]))
    monkeypatch.setattr("gptjax.convert.load", lambda *args: lm)
    monkeypatch.setattr(commands, "prepare_process", lambda *args: None)
    data = tmp_path / "texts.jsonl"
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 140)))
    data.write_text("".join(json.dumps({"genre": tag, "text": text}) + "\n" for tag in "ab"))
    commands.genre("RUN", data=str(data), json=True)
    found = json.loads(capsys.readouterr().out)
    losses = np.zeros((2, 2))
    for window in range(2):
        ids = [ord(c) for c in text[64 * window : 64 * (window + 1)]]
        for number, tag in enumerate((257, 258)):
            log_p = jax.nn.log_softmax(lm.logits([[tag, *ids[:-1]]])[0])
            losses[window, number] = -np.mean([log_p[i, id] for i, id in enumerate(ids)])
    # The same windows under both genres: each is right under one of them.
    assert found["accuracy"]["value"] == 0.5
    assert found["accuracy of a"]["value"] == np.mean(losses[:, 0] < losses[:, 1])
    assert found["loss_per_token"]["value"] == pytest.approx(losses.mean(), rel=1e-5)
    data.write_text(json.dumps({"genre": "c", "text": text}))
    with pytest.raises(UserError, match="no tag 'c'"):
        commands.genre("RUN", data=str(data))
    data.write_text(json.dumps({"genre": "a", "text": "short"}))
    with pytest.raises(UserError, match="5 tokens is shorter than the model's context of 64"):
        commands.genre("RUN", data=str(data))
