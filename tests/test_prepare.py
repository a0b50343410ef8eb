"""Preparing corpora: the same bytes whoever does it and however often it is killed; errors that name the place."""

import gzip
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from gptjax.apps.data_prep import commit, prepare
from gptjax.apps.data_prep.inspect import inspect
from gptjax.apps.data_prep.prepare import Options, prepare_data
from gptjax.apps.data_prep.vocabulary import train_tokenizer
from gptjax.config import DataConfig
from gptjax.data import sources
from gptjax.data.batches import PackedRows, Windows
from gptjax.data.corpus import load_corpus
from gptjax.data.packing import best_fit
from gptjax.data.reading import Piece, Reading, documents
from gptjax.data.shards import Split, load_manifest
from gptjax.errors import UserError
from gptjax.tokenizers import ByteTokenizer

WORDS = (ROOT / "LICENSE").read_text().split()


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def some_texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [f"{n} " + " ".join(rng.choices(WORDS, k=rng.randrange(1, words))) for n in range(count)]


def made(folder: Path, *given: object, tokenizer: str = "byte", workers: int = 1, **more) -> dict:
    reading = Reading(more.pop("text_field", "text"), more.pop("separator", None))
    options = {"val_frac": 0.1, "pack_length": None, "skip_bad": False, "licence": None} | more
    return prepare_data(
        [str(source) for source in given], str(folder), tokenizer, Options(reading, **options), workers
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".plan"}


def texts_of(folder: Path, split: str = "train") -> list[str]:
    """The documents of a split, in order, taken apart by the files that say where each ends."""
    manifest = load_manifest(folder)
    half, found = Split(folder, manifest, split), []
    for number, shard in enumerate(half.shards):
        ends = half.document_ends(number)
        base = int(half.tokens.ends[number]) - shard["tokens"]
        ids = half.tokens[base : base + shard["tokens"]]
        found += [ByteTokenizer().decode(part.tolist()) for part in np.split(ids, ends[:-1])]
    return found


@pytest.fixture
def small_units(monkeypatch):
    """Units of 2 kB, so that small files are many of them."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    monkeypatch.setattr(commit, "CHUNK_TOKENS", 500)
    monkeypatch.setattr(commit, "POOL_TOKENS", 5000)


FORMS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "datasets", "text", "folder", "gs")


@pytest.fixture(params=FORMS)
def same_texts(request, tmp_path, monkeypatch):
    """The same documents in every form that a source can have."""
    texts, form = [t.strip() for t in some_texts(300)], request.param
    path = tmp_path / f"data.{form}"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    separator = None
    if form == "jsonl":
        path.write_bytes(rows)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(rows[:9000]) + gzip.compress(rows[9000:]))  # two members, as pigz writes
    elif form == "jsonl.zst":
        zstandard = pytest.importorskip("zstandard", reason="pip install -e '.[data]'")
        path.write_bytes(zstandard.compress(rows[:9000]) + zstandard.compress(rows[9000:]))
    elif form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pip install -e '.[data]'")
        import pyarrow as pa

        parquet.write_table(pa.table({"id": range(300), "text": texts}), path, row_group_size=37)
    elif form == "datasets":  # as Dataset.save_to_disk leaves it
        pa = pytest.importorskip("pyarrow", reason="pip install -e '.[data]'")
        path.mkdir()
        names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
        for name, part in zip(names, (texts[:100], texts[100:]), strict=True):
            table = pa.table({"text": part})
            with pa.OSFile(str(path / name), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table, max_chunksize=30)
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (path / "dataset_info.json").write_text("{}")
        (path / "cache-0123.arrow").write_bytes(b"left over by datasets.map")
    elif form == "text":
        path = tmp_path / "data.txt"
        separator = "<|endoftext|>"
        path.write_text(separator.join(texts))
    elif form == "folder":
        path.mkdir()
        write_jsonl(path / "b.jsonl", texts[100:])
        write_jsonl(path / "a.jsonl", texts[:100])
        (path / ".hidden").write_text("not to be read")
    else:
        fsspec = pytest.importorskip("fsspec")
        from etils.epath import backend

        class Bucket(type(fsspec.filesystem("memory"))):
            """A bucket in memory."""

            store: dict = {}  # noqa: RUF012
            pseudo_dirs: list = [""]  # noqa: RUF012

            @classmethod
            def _strip_protocol(cls, path):
                return super()._strip_protocol(path.removeprefix("gs://"))

        bucket = Bucket()
        monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: bucket)
        bucket.pipe_file("/bucket/data/a.jsonl", rows)
        path = "gs://bucket/data"
    return path, separator, texts


def test_every_form_gives_the_same_documents_in_order(same_texts, tmp_path, small_units):
    path, separator, texts = same_texts
    manifest = made(tmp_path / "out", path, separator=separator)
    train, val = texts_of(tmp_path / "out"), texts_of(tmp_path / "out", "val")
    assert [t for t in texts if t in set(train)] == train
    assert [t for t in texts if t in set(val)] == val
    assert sorted(train + val) == sorted(texts)
    assert manifest["counts"]["documents"] == 300
    assert 10 <= len(val) <= 60


def test_two_and_four_workers_write_the_bytes_of_one(tmp_path, small_units):
    files = [write_jsonl(tmp_path / f"{seed}.jsonl", some_texts(200, seed) * 2, "body") for seed in range(3)]
    for workers in (1, 2, 4):
        made(tmp_path / f"out{workers}", *files, workers=workers, text_field="body", pack_length=64)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out4")


def test_a_unit_that_was_interrupted_is_done_again_and_finished_ones_are_not(tmp_path, small_units, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(300))
    made(tmp_path / "straight", source)

    class Killed(Exception):
        pass

    encode_batch, done = ByteTokenizer.encode_batch, []

    def counted(self, texts):
        done.append(len(texts))
        if len(done) == 8:
            raise Killed
        return encode_batch(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", counted)
    with pytest.raises(Killed):
        made(tmp_path / "killed", source)
    with pytest.raises(UserError, match="is not completely prepared"):
        load_corpus(DataConfig(path=str(tmp_path / "killed")))
    made(tmp_path / "killed", source)
    assert sum(done) < 300 + 2 * max(done)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.whole
def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path):
    """SIGKILL after the first of several units is done; the workers end with their parent."""
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(40_000, words=160))
    made(tmp_path / "straight", source)
    command = [sys.executable, "-m", "gptjax", "data", "prepare", str(source), "--out", str(tmp_path / "killed")]
    command += ["--tokenizer", "byte", "--val_frac", "0.1", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not list((tmp_path / "killed").glob("work/unit-*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    again = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "resuming after" in again.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert not (tmp_path / "killed" / "work").exists()


def test_the_validation_split_stays_when_data_is_added(tmp_path):
    texts = some_texts(500)
    made(tmp_path / "some", write_jsonl(tmp_path / "a.jsonl", texts[:300]))
    made(tmp_path / "more", write_jsonl(tmp_path / "b.jsonl", texts[::-1]))
    before, after = (set(texts_of(tmp_path / name, "val")) for name in ("some", "more"))
    assert before == after & set(texts[:300])
    assert len(before) < len(after)


@pytest.mark.parametrize("buckets", [1, 7])
def test_repeated_and_empty_documents_are_dropped_and_counted(tmp_path, small_units, monkeypatch, buckets):
    texts = some_texts(200)
    monkeypatch.setattr(commit, "BUCKET_DOCUMENTS", -(-250 // buckets))
    given = [*texts, *texts[:50], "", ""]
    manifest = made(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", given))
    assert manifest["counts"] == manifest["counts"] | {"documents": 250, "duplicates": 50, "empty": 2}
    once = made(tmp_path / "once", write_jsonl(tmp_path / "b.jsonl", texts))
    assert manifest["splits"] == once["splits"]


def test_shards_are_one_sequence(tmp_path, small_units, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(300))
    made(tmp_path / "one", source)
    monkeypatch.setattr(commit, "SHARD_TOKENS", 3000)
    manifest = made(tmp_path / "many", source)
    assert len(manifest["splits"]["train"]["shards"]) > 5
    one, many = (load_corpus(DataConfig(path=str(tmp_path / name))).sources[0] for name in ("one", "many"))
    np.testing.assert_array_equal(one.train[:], many.train[:])
    for start, stop in ((2990, 3500), (0, 10), (len(one.train) - 5, len(one.train))):
        np.testing.assert_array_equal(one.train[start:stop], many.train[start:stop])
    assert texts_of(tmp_path / "one") == texts_of(tmp_path / "many")
    rows = made(tmp_path / "rows", source, pack_length=50)["splits"]["train"]["rows"]
    packed = load_corpus(DataConfig(path=str(tmp_path / "rows"))).sources[0]
    assert len(packed.train.shards) > 5
    whole = PackedRows(packed.train, 50, 50)
    used = sum(whole.example(i, 0)["weights"].sum() for i in range(rows))
    assert used == len(many.train) - len(texts_of(tmp_path / "many"))


def test_a_single_text_is_divided_as_nanogpt_does(tmp_path, tinyshakespeare):
    made(tmp_path / "out", tinyshakespeare)
    text = tinyshakespeare.read_text()
    assert texts_of(tmp_path / "out") == [text[:1_003_854]]
    assert texts_of(tmp_path / "out", "val") == [text[1_003_854:]]


def test_a_long_text_is_cut_where_its_tokens_do_not_change(tmp_path, monkeypatch):
    path, out = tmp_path / "long.txt", tmp_path / "vocabulary.json"
    path.write_text(
        "\n".join(["A line that ends with a word", "", "and Zeile mit größeren Wörtern, 日本.", ""] * 400)
    )
    train_tokenizer([str(path)], out=str(out), vocab_size=400)
    cache = {"cache_dir": str(tmp_path / "cache"), "tokenizer": str(out), "path": str(path)}
    whole = load_corpus(DataConfig(**cache, val_frac=0.1)).sources[0]
    monkeypatch.setattr(sources, "TEXT_BYTES", 1000)
    parts = load_corpus(DataConfig(**cache, val_frac=0.1000001)).sources[0]
    np.testing.assert_array_equal([*whole.train[:], *whole.val[:]], [*parts.train[:], *parts.val[:]])


def test_records_belong_to_the_piece_in_which_they_begin(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts := some_texts(20))
    size = path.stat().st_size
    for cut in range(1, size, 7):
        ranges = [(0, cut), (cut, min(cut + 60, size)), (min(cut + 60, size), size)]
        pieces = [Piece(0, str(path), "jsonl", start, stop, stop - start) for start, stop in ranges if start < stop]
        assert [d.text for piece in pieces for d in documents(piece, Reading())] == texts


def test_best_fit_fills_gaps_exactly():
    assert sorted(map(sorted, best_fit([6, 5, 4, 3, 2], 10))) == [[0, 2], [1, 3, 4]]
    lengths = np.random.default_rng(0).integers(1, 65, 5000)
    bins = best_fit(lengths, 64)
    assert sorted(i for items in bins for i in items) == list(range(5000))
    assert all(sum(lengths[items]) <= 64 for items in bins)
    assert len(bins) <= 1.01 * lengths.sum() / 64


def test_packing_cuts_only_documents_longer_than_a_row_and_loses_nothing(tmp_path):
    texts = some_texts(200, words=60)
    made(tmp_path / "packed", source := write_jsonl(tmp_path / "a.jsonl", texts), pack_length=128)
    made(tmp_path / "plain", source)
    half = load_corpus(DataConfig(path=str(tmp_path / "packed"))).sources[0].train
    rows, pairs = PackedRows(half, 128, 128), []
    for i in range(len(rows)):
        example = rows.example(i, 0)
        used = example["weights"] == 1
        new = np.flatnonzero(np.diff(example["segments"], prepend=-1))
        assert (example["positions"][new] == 0).all()
        assert (np.diff(example["positions"])[np.setdiff1d(np.arange(1, 128), new) - 1] == 1).all()
        inside = (np.diff(example["segments"]) == 0) & used[1:]
        np.testing.assert_array_equal(example["targets"][:-1][inside], example["tokens"][1:][inside])
        pairs += list(zip(example["tokens"][used], example["targets"][used], strict=True))
    expected = []
    for text in texts_of(tmp_path / "plain"):
        ids = [*text.encode(), 256]
        expected += list(itertools.pairwise(ids))
    assert sorted(pairs) == sorted(expected)


# What a user gets wrong: content of a file, and what the message says.
BAD = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken.jsonl, line 2 is not JSON"),
    "field.jsonl": (b'{"text": "a"}\n\n{"body": "b"}\n', r"field.jsonl, line 3 has no text in the field 'text'"),
    "null.jsonl": (b'{"text": null}\n', r"null.jsonl, line 1 has no text"),
    "list.jsonl": (b"[1]\n", r"list.jsonl, row 1 has no text"),
    "latin1.jsonl": ('{"text": "Käse"}\n'.encode("latin-1"), r"latin1.jsonl, line 1 is not UTF-8: byte 0xe4"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', r"half.jsonl, line 1 contains half a character"),
    "latin1.txt": ("Käse".encode("latin-1"), r"latin1.txt is not UTF-8: byte 0xe4 at offset 1"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "abc"}\n' * 1000)[:-20], r"cut.jsonl.gz: .*compressed and truncated"),
    "not.jsonl.gz": (b"not compressed", r"not.jsonl.gz, line 1 is not JSON"),
    "cut.parquet": (b"PAR1 and no more", r"cannot read .*cut.parquet"),
    "empty.jsonl": (b"", r"is empty: there is no text"),
    "blank.jsonl": (b'{"text": ""}\n', r"is empty: there is no text"),
    "one.jsonl": (b'{"text": "abc"}\n', r"none of the 1 documents .* in the split val; raise --val_frac"),
    "same.jsonl": (
        b'{"text": "abc"}\n' * 3,
        r"none of the 1 documents .* in the split val \(2 duplicates are left out",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_named_and_nothing_is_left_to_trust(tmp_path, name):
    content, message = BAD[name]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pip install -e '.[data]'")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        made(tmp_path / "out", tmp_path / name, val_frac=1e-9)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    unfinished = r"is not completely prepared|is not a folder that gptjax data prepare finished"
    with pytest.raises(UserError, match=unfinished):
        inspect(str(tmp_path / "out"))


def test_bad_lines_are_skipped_and_counted_only_when_asked(tmp_path, small_units, capsys):
    lines = [json.dumps({"text": text}) for text in some_texts(200)]
    lines[150:150] = ["{broken", json.dumps({"body": "x"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"line 151 is not JSON.*--skip_bad"):
        made(tmp_path / "out", tmp_path / "a.jsonl")
    manifest = made(tmp_path / "skipped", tmp_path / "a.jsonl", skip_bad=True)
    assert (manifest["counts"]["documents"], manifest["counts"]["bad"]) == (200, 2)
    assert "line 152 has no text" in capsys.readouterr().err


def test_a_column_that_is_missing_is_named_before_any_work(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install -e '.[data]'")
    import pyarrow as pa

    parquet.write_table(pa.table({"id": [1], "content": ["abc"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column 'text'.*it has id, content"):
        made(tmp_path / "out", tmp_path / "a.parquet")


def test_a_full_disk_stops_with_one_line_and_the_work_goes_on_later(tmp_path, corpus_file):
    """A limit on the size of files gives the same failed write as a full disk."""
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(2000))
    command = [sys.executable, "-m", "gptjax", "data", "prepare", str(source), "--out", str(tmp_path / "out")]
    command += ["--tokenizer", "byte", "--val_frac", "0.1"]
    how = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    stopped = subprocess.run([*command], preexec_fn=limit, check=False, **how)
    assert stopped.returncode == 2
    assert "cannot write to" in stopped.stderr and "make room and run the same command to resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = subprocess.run(command, check=False, **how)
    assert again.returncode == 0, again.stderr
    made(tmp_path / "straight", source)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_folder_of_other_data_is_left_as_it_is(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(100))
    made(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    made(tmp_path / "out", source)
    with pytest.raises(UserError, match="other sources or options"):
        made(tmp_path / "out", source, val_frac=0.2)
    os.utime(source, (1, 2_000_000_000))
    with pytest.raises(UserError, match="its sources have changed"):
        made(tmp_path / "out", source)
    assert contents(tmp_path / "out") == before


def test_unfinished_work_on_other_options_is_begun_anew_unless_it_is_much(tmp_path, monkeypatch, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts(300)) + "{broken\n")
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    with pytest.raises(UserError, match="is not JSON"):
        made(tmp_path / "out", source)
    monkeypatch.setattr(prepare, "SPARED_BYTES", 0)
    with pytest.raises(UserError, match="holds unfinished work on other sources or options"):
        made(tmp_path / "out", source, skip_bad=True)
    monkeypatch.undo()
    assert made(tmp_path / "out", source, skip_bad=True)["counts"]["bad"] == 1
    assert "started again" in capsys.readouterr().err


def test_damaged_shards_are_refused_before_training(tmp_path):
    made(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", some_texts(100)))
    tokens = tmp_path / "out" / "train-00000.tokens"
    whole, cfg = tokens.read_bytes(), DataConfig(path=str(tmp_path / "out"))
    tokens.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"train-00000.tokens has .* bytes, not"):
        load_corpus(cfg)
    tokens.write_bytes(whole[:100] + b"\0\1" + whole[102:])
    with pytest.raises(UserError, match=r"train-00000.tokens has changed since it was written: its checksum differs"):
        load_corpus(cfg)
    tokens.unlink()
    with pytest.raises(UserError, match=r"cannot read .*train-00000.tokens: No such file"):
        load_corpus(cfg)


def test_an_id_beyond_the_vocabulary_is_named_when_it_is_read(tmp_path, monkeypatch):
    made(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", some_texts(100)))
    tokens = tmp_path / "out" / "train-00000.tokens"
    ids = np.fromfile(tokens, "<u2")
    ids[50] = 300
    ids.tofile(tokens)
    monkeypatch.setattr("gptjax.data.shards.CHECKED_BYTES", 0)  # as for data too large to be hashed at every start
    train = load_corpus(DataConfig(path=str(tmp_path / "out"))).sources[0].train
    windows = Windows(train, 16, "training")
    windows.example(2, 0)
    with pytest.raises(UserError, match=r"train-00000.tokens has id 300 between tokens 48 and 65.*vocabulary of 257"):
        windows.example(3, 0)


def test_a_tokenizer_that_is_not_the_datas_is_refused(tmp_path):
    made(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", some_texts(100)))
    assert load_corpus(DataConfig(path=str(tmp_path / "out"), tokenizer="byte")).tokenizer.kind == "byte"
    with pytest.raises(UserError, match=r"data.tokenizer char is not what .* was prepared with: byte"):
        load_corpus(DataConfig(path=str(tmp_path / "out"), tokenizer="char"))
    spec = tmp_path / "out" / "tokenizer.spec.json"
    spec.write_text(spec.read_text() + " ")
    with pytest.raises(UserError, match="is not the tokenizer that made these shards"):
        load_corpus(DataConfig(path=str(tmp_path / "out")))


def test_inspect_shows_windows_and_says_what_is_wrong(tmp_path, capsys):
    texts = ["The same long boilerplate at the beginning of a page. " + t for t in some_texts(60)]
    texts += some_texts(60, seed=1, words=2) + texts[:20]
    made(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", texts), pack_length=256)
    inspect(str(tmp_path / "out"), verify=True, json=True)
    found = json.loads(capsys.readouterr().out)
    warned = " ".join(found["warnings"])
    assert "14.3% of the sources' documents repeated others" in warned
    assert "begin with the same 32 tokens" in warned and "fewer than 16 tokens" in warned
    assert sum(row["documents"] for row in found["length_histogram"]) >= found["documents"]
    assert found["top_tokens"][0]["text"] == " "
    assert all(document.endswith("<|endoftext|>") for window in found["windows"] for document in window[1:-1])
    inspect(str(tmp_path / "out"))
    assert "attention ends here" in capsys.readouterr().out


def test_a_trained_tokenizer_is_the_same_each_time_and_serves_preparation(tmp_path, corpus_file):
    for name in ("one.json", "two.json"):
        train_tokenizer([str(corpus_file)], out=str(tmp_path / name), vocab_size=300)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(50))
    manifest = made(tmp_path / "out", source, tokenizer=str(tmp_path / "one.json"))
    assert manifest["tokenizer"]["vocab_size"] <= 300
    corpus = load_corpus(DataConfig(path=str(tmp_path / "out"), tokenizer=str(tmp_path / "one.json")))
    train = corpus.sources[0].train[:]
    assert (train == corpus.tokenizer.eos_id).sum() == manifest["splits"]["train"]["documents"]
    with pytest.raises(UserError, match="vocab_size 200 is too small"):
        train_tokenizer([str(corpus_file)], out=str(tmp_path / "x.json"), vocab_size=200)


def test_a_named_download_is_checked_by_its_hash(tmp_path, tinyshakespeare, monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOAD_DIR", str(tmp_path / "downloads"))
    monkeypatch.setattr(sources.urllib.request, "urlopen", _no_network)
    with pytest.raises(UserError, match=r"put https.* \(SHA-256 86c4e6aa.*\) at .*tinyshakespeare"):
        made(tmp_path / "out", "tinyshakespeare")
    (tmp_path / "downloads" / "tinyshakespeare.txt").write_bytes(tinyshakespeare.read_bytes())
    assert made(tmp_path / "out", "tinyshakespeare")["licence"] == "public domain"
    (tmp_path / "downloads" / "tinyshakespeare.txt").write_bytes(tinyshakespeare.read_bytes()[:-1])
    with pytest.raises(UserError, match="not the published"):
        made(tmp_path / "again", "tinyshakespeare")


def _no_network(*_, **__):
    raise OSError("no route to host")
