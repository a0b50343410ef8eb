"""Corpora, tokenizers and batches."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data.batches import Batches, Endless, Windows, validation_batches
from gptjax.data.corpus import Source, load_corpus
from gptjax.data.reading import play_text
from gptjax.errors import UserError
from gptjax.tokenizers import ByteTokenizer, CharTokenizer, tokenizer_from_dict


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


@given(st.text(), st.text())
def test_characters_round_trip_also_after_saving(text, more):
    tokenizer = tokenizer_from_dict(json.loads(json.dumps(CharTokenizer(text + more).to_dict())))
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.vocab_size == len(set(text + more))


def test_characters_are_numbered_as_nanogpt_does():
    """chars = sorted(set(data)); stoi = {ch: i}."""
    text = "hello, World\n"
    chars = sorted(set(text))
    assert CharTokenizer(text).encode(text).tolist() == [chars.index(c) for c in text]


def test_an_unseen_character_is_named():
    with pytest.raises(UserError, match="'é'"):
        CharTokenizer("abc").encode("bé")


def load(tmp_path, path, **more) -> Source:
    return load_corpus(DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **more)).sources[0]


def windows(tokens, context_length, seed) -> Endless:
    return Endless(Windows(tokens, context_length, "training", seed), seed)


def test_tinyshakespeare_splits_as_nanogpt_does(tmp_path, tinyshakespeare):
    corpus = load(tmp_path, tinyshakespeare)
    assert (len(corpus.train), len(corpus.val), corpus.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    assert corpus.val_bytes == 111_540
    text = tinyshakespeare.read_text()
    assert corpus.tokenizer.decode(corpus.val[:100].tolist()) == text[1_003_854:][:100]


def test_shakespeare_is_38_plays_of_plain_text(tmp_path):
    corpus = load(tmp_path, "shakespeare")
    text = corpus.tokenizer.decode(corpus.train[:].tolist() + corpus.val[:].tolist())
    assert text.count("\nHAMLET:\n") > 300
    assert text.count("\n===\n") == 38
    assert not set("#\\") & set(text)
    assert " \n" not in text
    assert len(text) == 5_000_673
    assert corpus.tokenizer.vocab_size == 83


def test_play_text():
    markdown = "# Title\n\n### SCENE I. A hall.\n\n_Enter GHOST_\n\n**GHOST**  \nMark me.  \n_\\[Sings\\]_ List!\n"
    assert (
        play_text(markdown)
        == "Title\n\nSCENE I. A hall.\n\n_Enter GHOST_\n\nGHOST:\nMark me.\n_[Sings]_ List!\n\n===\n\n"
    )


def test_documents_of_a_jsonl_file_are_ended(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    corpus = load(tmp_path, tmp_path / "a.jsonl", tokenizer="byte", text_field="body", val_frac=0.5)
    assert [*corpus.train[:], *corpus.val[:]] == [*b"one", 256, *b"two", 256]


def test_the_cache_is_used_and_follows_the_source(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("abc" * 50)
    first = load(tmp_path, source)
    kept = next((tmp_path / "cache").glob("*/train.bin"))
    stamp = kept.stat().st_mtime_ns
    assert load(tmp_path, source).fingerprint == first.fingerprint
    assert kept.stat().st_mtime_ns == stamp
    source.write_text("abd" * 50)
    second = load(tmp_path, source)
    assert second.fingerprint != first.fingerprint
    assert second.tokenizer.decode(second.train[:3].tolist()) == "abd"


def test_a_damaged_cache_is_made_again(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 50)
    whole = np.array(load(tmp_path, tmp_path / "a.txt").train[:])
    tokens = next((tmp_path / "cache").glob("*/train.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-7])
    np.testing.assert_array_equal(load(tmp_path, tmp_path / "a.txt").train[:], whole)


BAD = {
    "missing.txt": (None, "does not exist"),
    "empty.txt": (b"", "is empty"),
    "latin1.txt": ("Käse".encode("latin-1"), "latin1.txt is not UTF-8: byte 0xe4 at offset 1"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "field.jsonl": (b'{"body": "a"}\n', "line 1 has no text in the field 'text'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_named_and_leave_no_cache(tmp_path, name):
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path, tmp_path / name)
    assert not list(tmp_path.glob("cache/*"))


def test_a_corpus_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="8 training tokens, fewer than one window of 9"):
        windows(np.arange(8, dtype=np.uint16), 8, seed=0)
    with pytest.raises(UserError, match="8 validation tokens"):
        validation_batches(np.arange(8, dtype=np.uint16), 8, 2, None, range(2))
    example = windows(np.arange(9, dtype=np.uint16), 8, seed=0)[5]
    assert (example["tokens"].tolist(), example["targets"].tolist()) == (list(range(8)), list(range(1, 9)))


def test_an_epoch_reads_every_window_once_and_the_next_in_another_order():
    tokens = np.arange(1003, dtype=np.uint16)
    examples = windows(tokens, 10, seed=7)
    count = (1003 - 10) // 10
    epochs = [[examples[e * count + i] for i in range(count)] for e in range(3)]
    for epoch in epochs:
        starts = sorted(w["tokens"][0] for w in epoch)
        assert set(np.diff(starts)) == {10}
        assert all(np.array_equal(w["tokens"] + 1, w["targets"]) for w in epoch)
    assert len({tuple(w["tokens"][0] for w in epoch) for epoch in epochs}) == 3
    assert len({min(w["tokens"][0] for w in epoch) % 10 for epoch in epochs}) > 1


def test_a_batch_is_a_function_of_seed_and_step_on_any_number_of_hosts():
    tokens = np.random.default_rng(0).integers(0, 99, 5000).astype(np.uint16)

    def rows(seed, rows):
        return Batches(windows(tokens, 16, seed), 8, rows)

    whole = rows(1, range(8))
    straight = [b["tokens"] for b in itertools.islice(whole.iterate(0, prefetch=2), 100)]
    for start in (0, 1, 37, 99):
        np.testing.assert_array_equal(next(rows(1, range(8)).iterate(start, prefetch=2))["tokens"], straight[start])
    for hosts in (2, 4):
        share = 8 // hosts
        parts = [rows(1, range(h * share, (h + 1) * share))[41]["tokens"] for h in range(hosts)]
        np.testing.assert_array_equal(np.concatenate(parts), straight[41])
    assert not np.array_equal(rows(2, range(8))[0]["tokens"], straight[0])
    far = whole[1_000_000]
    np.testing.assert_array_equal(far["tokens"][:, 1:], far["targets"][:, :-1])


def test_validation_windows_cover_the_split_once():
    tokens = np.arange(100, dtype=np.uint16)
    batches = list(validation_batches(tokens, 8, 5, None, range(5)))
    seen = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    np.testing.assert_array_equal(seen, np.arange(1, 97))
    halves = [list(validation_batches(tokens, 8, 5, None, r)) for r in (range(2), range(2, 5))]
    for whole, *parts in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(whole["tokens"], np.concatenate([p["tokens"] for p in parts]))
    limited = list(validation_batches(tokens, 8, 5, 3, range(5)))
    assert sum(b["weights"].sum() for b in limited) == 24
