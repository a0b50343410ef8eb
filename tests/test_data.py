"""Corpora, tokenizers and batches."""

import hashlib
import itertools
import json
import multiprocessing
import pickle
import random
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from hypothesis import given
from hypothesis import strategies as st

from gptjax.apps.data_prep.prepare import Options, prepare_data
from gptjax.config import DataConfig, MixtureSource
from gptjax.data import corpus as data_corpus
from gptjax.data import mixture as data_mixture
from gptjax.data.batches import Batches, Endless, Windows, training_examples, validation_batches
from gptjax.data.corpus import Source, load_corpus
from gptjax.data.mixture import Assignment
from gptjax.data.reading import Reading, play_text
from gptjax.data.shards import Split, Tokens
from gptjax.errors import MachineError, UserError
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
    text = "Title\n\nSCENE I. A hall.\n\n_Enter GHOST_\n\nGHOST:\nMark me.\n_[Sings]_ List!"
    assert play_text(markdown) == text + "\n\n===\n\n"


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


def test_a_process_that_comes_second_leaves_the_cache_of_the_first_in_place(tmp_path, monkeypatch):
    """It began before the cache was there, and ends while the first one reads it."""
    (tmp_path / "a.txt").write_text("abc" * 50)
    load(tmp_path, tmp_path / "a.txt")
    (folder,) = tmp_path.glob("cache/*")
    first = folder.stat().st_ino
    monkeypatch.setattr(data_corpus, "_is_whole", lambda folder: False)
    load(tmp_path, tmp_path / "a.txt")
    assert [path.stat().st_ino for path in tmp_path.glob("cache/*")] == [first]


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    """Prepared folders of bytes: three of documents side by side, and one packed."""
    folder, rng = tmp_path_factory.mktemp("prepared"), random.Random(0)
    found = {}
    for name, count in (("web", 900), ("code", 300), ("books", 200), ("packed", 300)):
        lines = (json.dumps({"text": f"{name} {n} " + "la " * rng.randrange(1, 60)}) for n in range(count))
        source = folder / f"{name}.jsonl"
        source.write_text("\n".join(lines))
        options = Options(Reading(), 0.1, 32 if name == "packed" else None, False, None)
        prepare_data([str(source)], str(folder / name), "byte", options)
        found[name] = folder / name
    return found


def mixture(prepared, *weights: float | dict[int, float], **more) -> DataConfig:
    parts = []
    for name, weight in zip(("web", "code", "books"), weights, strict=True):
        later = weight if isinstance(weight, dict) else {0: weight}
        parts.append(MixtureSource(str(prepared[name]), later[0], {s: w for s, w in later.items() if s}))
    return DataConfig(mixture=tuple(parts), **more)


def batches(cfg: DataConfig, rows: range = range(8), seed: int = 1) -> Batches:
    return Batches(training_examples(load_corpus(cfg), cfg, 32, 8, seed), 8, rows)


def digest(parts: Iterable[dict[str, np.ndarray]]) -> str:
    sha = hashlib.sha256()
    for batch in parts:
        for name in sorted(batch):
            sha.update(name.encode() + batch[name].tobytes())
    return sha.hexdigest()


@pytest.fixture(params=["plain", "packed", "mixture"])
def any_data(request, prepared) -> DataConfig:
    kinds = {"plain": DataConfig(path=str(prepared["web"])), "packed": DataConfig(path=str(prepared["packed"]))}
    return kinds.get(request.param) or mixture(prepared, 0.6, 0.3, {0: 0.1, 50: 0.9})


def test_the_global_batch_is_the_same_on_any_number_of_hosts(any_data):
    """Steps 0 ... 200."""
    straight = [digest([batches(any_data)[step]]) for step in range(201)]
    assert len(set(straight)) == 201
    for hosts in (2, 4):
        share = 8 // hosts
        parts = [batches(any_data, range(h * share, (h + 1) * share)) for h in range(hosts)]
        for step in range(201):
            rows = [part[step] for part in parts]
            joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
            assert digest([joined]) == straight[step]
    assert digest([batches(any_data, seed=2)[0]]) != straight[0]


def test_a_stop_anywhere_does_not_change_what_comes_after(any_data):
    straight = [digest([batches(any_data)[step]]) for step in range(201)]
    stops = sorted(random.Random(0).sample(range(1, 200), 20))
    for start, stop in itertools.pairwise([0, *stops, 201]):
        with closing(batches(any_data).iterate(start, prefetch=3)) as incoming:
            found = [digest([next(incoming)]) for _ in range(stop - start)]
        assert found == straight[start:stop]


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_worker_processes_give_the_batches_of_a_thread(prepared, workers):
    cfg = mixture(prepared, 0.6, 0.3, {0: 0.1, 20: 0.9})
    found = {}
    for number in (0, workers):
        with closing(batches(cfg).iterate(7, 8, number)) as incoming:
            found[number] = [digest([next(incoming)]) for _ in range(50)]
    assert found[0] == found[workers]


def test_a_killed_worker_is_one_line(any_data):
    with closing(batches(any_data).iterate(0, 2, 1)) as incoming:
        next(incoming)
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(MachineError, match=r"data ended .exit code -9.*resume"):
            for _ in range(20):
                next(incoming)


def test_a_far_step_costs_what_a_near_one_does(any_data, monkeypatch):
    """Counted in what is read: the work that could grow with the step."""
    read = []
    for cls, name in ((Tokens, "__getitem__"), (Split, "row")):
        plain = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, key, plain=plain: (read.append(key), plain(self, key))[1])
    sums, plain_sum = [], data_mixture.floor_sum
    monkeypatch.setattr(data_mixture, "floor_sum", lambda *args: (sums.append(args), plain_sum(*args))[1])
    costs = {}
    for step in (10, 1_000_000):
        training = batches(any_data)
        read.clear(), sums.clear()
        with closing(training.iterate(step, prefetch=1)) as incoming:
            far = next(incoming)
        costs[step] = (len(read) <= 8 * 2 * 3, len(sums) <= 8 * 4 * 3)  # 8 rows of at most 3 steps
        assert far["tokens"].shape == (8, 32)
    assert costs[10] == costs[1_000_000] == (True, True)


def test_a_mixture_keeps_its_weights_and_reads_each_source_in_turn(prepared):
    assignment = Assignment([(0, [0.6, 0.3, 0.1])], 8, seed=3)
    drawn = np.array([assignment[n][0] for n in range(100_000)])
    np.testing.assert_allclose(np.bincount(drawn) / 100_000, [0.6, 0.3, 0.1], rtol=0.005)
    for start in range(0, 100_000, 1000):  # and so does every stretch of it
        np.testing.assert_allclose(np.bincount(drawn[start : start + 1000]) / 1000, [0.6, 0.3, 0.1], atol=0.005)
    changing = Assignment([(0, [3, 1, 0]), (100, [0, 1, 1]), (250, [1, 0, 1])], 8, seed=3)
    seen = [0, 0, 0]
    for n in range(4000):
        source, index = changing[n]
        assert index == seen[source]
        seen[source] += 1
    assert seen == pytest.approx([600 + 1000, 200 + 600, 600 + 1000], abs=3)


@given(st.integers(0, 300), st.integers(1, 300), st.integers(0, 1000), st.integers(0, 1000))
def test_floor_sum(n, m, a, b):
    assert data_mixture.floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


def test_a_mixture_reads_what_it_names(prepared):
    cfg = mixture(prepared, {0: 1, 30: 0}, {0: 0, 30: 1}, 0)
    text = {step: bytes(batches(cfg)[step]["tokens"].clip(0, 255).astype(np.uint8)) for step in (0, 29, 30, 99)}
    assert [b"web " in text[step] for step in text] == [True, True, False, False]
    assert [b"code " in text[step] for step in text] == [False, False, True, True]


def test_sources_of_a_mixture_must_fit_together(prepared, tmp_path):
    with pytest.raises(UserError, match="packed differently"):
        load_corpus(DataConfig(mixture=tuple(MixtureSource(str(prepared[n]), 1) for n in ("web", "packed"))))
    (tmp_path / "a.txt").write_text("abc" * 50)
    parts = (MixtureSource(str(prepared["web"]), 1), MixtureSource(str(tmp_path / "a.txt"), 1))
    with pytest.raises(UserError, match=r"a\.txt and web have different tokenizers"):
        load_corpus(DataConfig(mixture=parts, cache_dir=str(tmp_path / "cache")))
    with pytest.raises(UserError, match="weight -1 of"):
        mixture(prepared, -1, 1, 1)
    with pytest.raises(UserError, match="at step 5 has no weight above 0"):
        mixture(prepared, {0: 1, 5: 0}, {0: 1, 5: 0}, 0)
    with pytest.raises(UserError, match="name web names two sources; give one of them another name"):
        DataConfig(mixture=(MixtureSource("a/web", 1), MixtureSource("b/web", 1)))


def test_packed_rows_belong_to_one_context_length(prepared):
    cfg = DataConfig(path=str(prepared["packed"]))
    with pytest.raises(UserError, match=r"packed into rows of 32, not model.context_length 64.*--pack_length 64"):
        training_examples(load_corpus(cfg), cfg, 64, 8, 0)


def test_the_last_validation_batch_of_packed_rows_is_filled_up(prepared):
    source = load_corpus(DataConfig(path=str(prepared["packed"]))).sources[0]
    found = list(validation_batches(source.val, 32, 5, None, range(5), source.pack_length))
    assert len(found) == -(-source.val.rows // 5)
    assert sum(b["weights"].sum() for b in found) == source.val_predictions


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


HOST = """
import hashlib, json, sys
from contextlib import closing
from gptjax.config import DataConfig, MixtureSource
from gptjax.data.batches import Batches, training_examples
from gptjax.data.corpus import load_corpus

if __name__ == "__main__":
    paths, first, last, workers = json.loads(sys.argv[1]), *map(int, sys.argv[2:])
    cfg = DataConfig(mixture=tuple(MixtureSource(path, 1.0 + n, {50: 2.0}) for n, path in enumerate(paths)))
    batches = Batches(training_examples(load_corpus(cfg), cfg, 32, 8, 1), 8, range(first, last))
    with closing(batches.iterate(0, 8, workers)) as incoming:
        for step in range(201):
            batch = next(incoming)
            rows = [[batch[key][row].tobytes() for key in sorted(batch)] for row in range(last - first)]
            print(" ".join(hashlib.sha256(b"".join(row)).hexdigest() for row in rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_processes_of_their_own_read_the_same_global_batches(prepared, tmp_path, workers):
    """Steps 0 ... 200 on 1, 2 and 4 processes."""
    (tmp_path / "host.py").write_text(HOST)
    paths = json.dumps([str(prepared[name]) for name in ("web", "code", "books")])
    found = {}
    for hosts in (1, 2, 4):
        share = 8 // hosts
        outputs = [
            run_script(tmp_path / "host.py", paths, h * share, (h + 1) * share, workers).stdout for h in range(hosts)
        ]
        steps = zip(*(output.splitlines() for output in outputs), strict=True)
        found[hosts] = [" ".join(step) for step in steps]
    assert len(set(found[1])) == 201
    assert found[1] == found[2] == found[4]


def test_a_file_that_becomes_shorter_is_an_error_that_names_it(tmp_path):
    """A memory map would end the process by SIGBUS."""
    path = tmp_path / "train.bin"
    np.arange(50_000, dtype=np.uint16).tofile(path)
    tokens = Tokens([(str(path), 50_000)], "uint16", 2**16)
    again = pickle.loads(pickle.dumps(tokens))  # as a data worker receives it
    for one in (tokens, again):
        np.testing.assert_array_equal(one[49_000:49_003], [49_000, 49_001, 49_002])
    with path.open("r+b") as stream:
        stream.truncate(20_000)
    for one in (tokens, again):
        np.testing.assert_array_equal(one[9_990:10_000], np.arange(9_990, 10_000))
        with pytest.raises(
            UserError, match=r"train.bin has become shorter .* ends before byte 20,000; copy it again"
        ):
            one[9_990:10_001]
