"""Corpora as people have them: compressed files, archives, tables, and Hugging Face's dataset folders."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import run_script

from gptjax.apps.data_prep.prepare import Options, prepare_data
from gptjax.apps.data_prep.vocabulary import learn
from gptjax.config import DataConfig
from gptjax.configfile import config_from_dict, differing_keys
from gptjax.data.corpus import Source, load_corpus
from gptjax.data.formats import split_of
from gptjax.data.reading import Reading
from gptjax.data.sources import list_files
from gptjax.errors import UserError


def load(tmp_path: Path, path: Path, **keys) -> Source:
    return load_corpus(DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **keys)).sources[0]


def text_of(source: Source) -> str:
    """The whole text that a corpus was read as."""
    return "".join(source.tokenizer.decode(half[:].tolist()) for half in (source.train, source.val))


def tar(mode: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name in ("a.txt", "b.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 600
            archive.addfile(entry, io.BytesIO(b"hello\n" * 100))
    return data.getvalue()


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.txt", "hello " * 100)
    return data.getvalue()


TEXT = b"to be or not to be\n" * 20
REFUSED = {
    "c.tar.gz": (tar("w:gz"), "is a tar archive: unpack it"),
    "c.tgz": (tar("w:gz"), "is a tar archive"),
    "c.tar": (tar("w"), "is a tar archive"),
    "named.txt": (tar("w"), "is a tar archive"),
    "c.tar.bz2": (tar("w:bz2"), "is compressed by bzip2"),
    "c.jsonl.bz2": (bz2.compress(TEXT), "is compressed by bzip2"),
    "c.txt.xz": (lzma.compress(TEXT), "is compressed by xz"),
    "c.lzma": (lzma.compress(TEXT, lzma.FORMAT_ALONE), "is compressed by lzma"),
    "c.txt": (zipped(), "is a zip archive"),
    "c.docx": (zipped(), "is a zip archive"),
    "c.zip.gz": (gzip.compress(zipped()), "contains a file that is a zip archive"),
    "twice.gz": (gzip.compress(bz2.compress(TEXT)), "contains a file that is compressed by bzip2"),
    "c.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "is a 7z archive"),
    "c.pdf": (b"%PDF-1.7\n" + TEXT, "is a PDF document"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
    "c.db": (b"SQLite format 3\0" + bytes(99), "is an SQLite database"),
    "utf16.txt": (TEXT.decode().encode("utf-16"), "is UTF-16: iconv"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16-be"), "contains NUL bytes"),
    "c.bin": (bytes(range(256)) * 9, "contains NUL bytes"),
    "c.parquet": (b"<html>not found</html>", "has the name of a Parquet file, but not its content"),
    "p.parquet.gz": (gzip.compress(b"PAR1" + bytes(99)), "is a compressed Parquet file"),
    "cut.txt.gz": (gzip.compress(os.urandom(9000).hex().encode())[:4000], "compressed and truncated"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000, "deep.jsonl, line 2 cannot be read: it nests too deep"),
    "deep.json": (b"[\n" * 100_000, "deep.json cannot be read: it nests too deep"),
    "deepest.jsonl": (b'{"text": "a", "b": ' + b'{"a":' * 100_000, "line 1 cannot be read: it nests too deep"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1 cannot be read: Exceeds the limit"),
    "object.json": (
        json.dumps({"data": []}, indent=1).encode(),
        "write an object of several lines as one line: jq -c .",
    ),
    "numbers.json": (b"[1, 2]", "row 1 has no text in the field 'text'; name the field"),
    "chat.jsonl": (
        b'{"messages": [], "id": 1}\n',
        "line 1 has no text in the field 'text'; it has messages, id; name",
    ),
    "rows.json": (b'[{"content": "a"}]', "row 1 has no text in the field 'text'; it has content; name the field"),
    "null.jsonl": (b'{"text": null}\n', "line 1 has no text in the field 'text'; name the field"),
    "c.csv": (b"id,body\n1,a\n", "has no column 'text'; it has id, body; set text_field to one of them"),
    "open.csv": (b'id,text\n1,"a\n', "is not a row of a table: unexpected end of data"),
    "short.csv": (b"id,text\n1\n", "line 2 has no column 'text'"),
    "latin.csv": (b"id,text\n1,caf\xe9\n", "is not UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_text_is_refused_by_what_it_is(tmp_path, name):
    data, message = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as raised:
        load(tmp_path, tmp_path / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)
    options = Options(Reading(), 0.5, None, False, None)
    with pytest.raises(UserError):
        prepare_data([str(tmp_path / name)], str(tmp_path / "out"), "byte", options)


def test_pipes_and_folders_that_hold_themselves_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        load(tmp_path, tmp_path / "pipe")
    loop = tmp_path / "loop" / "inside"
    loop.mkdir(parents=True)
    (loop / "a.txt").write_text("text")
    (loop / "again").symlink_to(loop.parent)
    with pytest.raises(UserError, match="is a link to a folder that contains it"):
        list_files(str(loop.parent))


def table(rows: list, kind: str = "string"):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install -e '.[data]'")
    made = pyarrow.array(rows, pyarrow.binary() if kind == "binary" else pyarrow.string())
    made = made.dictionary_encode() if kind == "dictionary" else made
    made = made.cast(pyarrow.large_string()) if kind == "large_string" else made
    return pyarrow.table({"id": range(len(rows)), "text": made})


NAMES = ["emma", "olivia\nsmith", "zoé"]
JOINED = "emma\nolivia\nsmith\nzoé\n"  # as characters, each document with a line's end after it


def write_shape(path: Path, shape: str) -> None:
    """NAMES, as `datasets` and others write them."""
    rows = [{"id": i, "text": name} for i, name in enumerate(NAMES)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    mark = "\ufeff"
    texts = {
        "lines": lines,
        "lines with a mark": mark + lines,
        "array": json.dumps(rows),
        "pretty array": mark + json.dumps(rows, indent=4),
        "array of texts": json.dumps(NAMES),
        "commas": mark + 'id,text\r\n0,emma\r\n1,"olivia\nsmith"\r\n2,zoé\r\n',
        "tabs": 'text\tid\nemma\t0\n"olivia\nsmith"\t1\nzoé\t2',
    }
    if shape in texts:
        path.write_text(texts[shape], encoding="utf-8", newline="")
    elif shape.endswith("gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif pytest.importorskip("pyarrow", reason="pip install -e '.[data]'") and path.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(table(NAMES, shape), path, row_group_size=2)
    elif shape == "file":
        from pyarrow import feather

        feather.write_feather(table(NAMES), path, compression="uncompressed")
    else:
        save_to_disk(path.parent, table(NAMES), path.name)


def save_to_disk(folder: Path, rows, name: str = "data-00000-of-00001.arrow", **state) -> None:
    """What `Dataset.save_to_disk` leaves."""
    from pyarrow import OSFile, ipc

    folder.mkdir(parents=True, exist_ok=True)
    with OSFile(str(folder / name), "wb") as stream, ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], **state}))
    (folder / "dataset_info.json").write_text("{}")


SHAPES = [
    *(("a.jsonl", "lines"), ("a.json", "lines with a mark"), ("a.json", "array"), ("a.json", "pretty array")),
    *(("a.jsonl", "array"), ("a.json", "array of texts"), ("a.csv", "commas"), ("a.tsv", "tabs")),
    *(("a.jsonl.gz", "gz"), ("named.jsonl", "gz"), ("a.jsonl.gz", "lines"), ("a.arrow", "stream")),
    *(("a.arrow", "file"), ("a.parquet", "string"), ("a.parquet", "large_string")),
    *(("a.parquet", "dictionary"), ("a.parquet", "binary")),
]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_every_shape_of_a_table_gives_its_documents(tmp_path, name, shape):
    write_shape(tmp_path / name, shape)
    assert text_of(load(tmp_path, tmp_path / name, val_frac=0.3)) == JOINED
    source = load(tmp_path, tmp_path / name, val_frac=0.3, tokenizer="byte")
    ends = [int(i) for half in (source.train, source.val) for i in half[:] if i == 256]
    assert (len(ends), text_of(source)) == (3, "".join(NAMES))


def test_a_byte_order_mark_is_no_character(tmp_path):
    for name in ("marked", "plain"):
        mark = "\ufeff" if name == "marked" else ""
        (tmp_path / f"{name}.txt").write_text(f"{mark}to be or not to be\ufeff", encoding="utf-8")
    marked, plain = (load(tmp_path, tmp_path / f"{name}.txt") for name in ("marked", "plain"))
    assert text_of(marked) == text_of(plain) == "to be or not to be\ufeff"


def test_documents_of_a_tokenizer_without_an_end_are_lines(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in (("a", "emma"), ("b", "olivia")):
        (folder / f"{name}.txt").write_text(text)
    assert text_of(load(tmp_path, folder, val_frac=0.3)) == "emma\nolivia\n"
    alone = load(tmp_path, folder / "b.txt", val_frac=0.3)
    assert (text_of(alone), alone.tokenizer.vocab_size) == ("olivia", 5)  # one text has no end to mark


def test_prepared_documents_of_a_tokenizer_without_an_end_are_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"name{i}"}) + "\n" for i in range(30)))
    prepare_data(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "out"), "char", Options(Reading(), 0.3, None, False, None)
    )
    source = load(tmp_path, tmp_path / "out")
    assert sorted(text_of(source).split("\n")) == sorted([f"name{i}" for i in range(30)] + [""])


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.txt", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("training/a.txt", "train"),
        ("my_validation.jsonl.gz", "val"),
        ("dev/part1.jsonl", "val"),
        ("valid.txt", "val"),
        ("test-00003.parquet", "test"),
        ("eval.csv", "test"),
        ("Train/Test.txt", "test"),
        ("valley.txt", None),
        ("latest.txt", None),
        ("trainer/a.txt", None),
        ("contrast.txt", None),
    ],
)
def test_names_name_splits_as_the_library_datasets_reads_them(path, split):
    assert split_of(path) == split


def hub_folder(folder: Path, splits: list[str]) -> Path:
    """A dataset as the hub has it, with a file for each split and what lies beside them."""
    (folder / "data").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("README.md", "LICENSE", "dataset_infos.json", ".gitattributes", "data/_SUCCESS"):
        (folder / name).write_text('{"default": 1}')
    for split in splits:
        rows = [json.dumps({"text": f"{split}{i}"}) for i in range(9)]
        (folder / "data" / f"{split}-00000-of-00001.jsonl").write_text("\n".join(rows))
    return folder


def test_a_dataset_folder_is_divided_by_its_names_and_says_what_it_leaves_out(tmp_path):
    source = load(tmp_path, hub_folder(tmp_path / "hub", ["train", "validation", "test"]))
    train, val = ("".join(source.tokenizer.decode(half[:].tolist())) for half in (source.train, source.val))
    assert train == "".join(f"train{i}\n" for i in range(9)) and val == "".join(f"validation{i}\n" for i in range(9))
    assert len(source.notes) == 2
    assert "6 files that are no documents are left out" in source.notes[0] and "README.md" in source.notes[0]
    assert "1 files for validation by name; 1 for testing are left out" in source.notes[1]


def test_what_desktops_editors_and_python_leave_in_a_folder_is_no_document(tmp_path):
    folder = tmp_path / "texts"
    for name in ("__MACOSX/._a.txt", "__pycache__/a.pyc", "Thumbs.db", "desktop.ini", ".a.txt.swp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\1\2")
    (folder / "a.txt").write_text("to be or not to be")
    source = load(tmp_path, folder)
    assert text_of(source) == "to be or not to be" and "5 files that are no documents" in source.notes[0]


def test_a_folder_without_validation_or_without_training_is_divided_by_share(tmp_path):
    source = load(tmp_path, hub_folder(tmp_path / "a", ["train", "test"]), val_frac=0.2)
    assert "test" not in text_of(source) and "a share of them is for validation; 1 for testing" in source.notes[1]
    pooled = load(tmp_path, hub_folder(tmp_path / "b", ["validation", "test"]), val_frac=0.2)
    assert "test8" in text_of(pooled) and len(pooled.notes) == 1


def test_a_saved_dataset_dict_is_read_by_its_splits(tmp_path):
    for split in ("train", "validation"):
        save_to_disk(tmp_path / "saved" / split, table([f"{split}{i}" for i in range(9)]), _indices_data_files=None)
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    source = load(tmp_path, tmp_path / "saved")
    assert source.tokenizer.decode(source.val[:11].tolist()) == "validation0"
    assert load(tmp_path, tmp_path / "saved" / "train").notes == ()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i"}]}', "flatten_indices"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "No such file"),
        ('{"_data_files": [', "state.json is damaged"),
        ("[" * 100_000, "state.json is damaged"),
    ],
)
def test_a_damaged_saved_dataset_is_one_line(tmp_path, state, message):
    save_to_disk(tmp_path / "saved", table(["a"]))
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(UserError, match=message):
        load(tmp_path, tmp_path / "saved")


def test_prepare_takes_the_splits_that_names_give_and_says_so(tmp_path, capsys):
    folder = hub_folder(tmp_path / "hub", ["train", "validation", "test"])
    manifest = prepare_data([str(folder)], str(tmp_path / "out"), "byte", Options(Reading(), 0.1, None, False, None))
    assert [manifest["splits"][half]["documents"] for half in ("train", "val")] == [9, 9]
    said = capsys.readouterr().err
    assert "note:" in said and "for testing are left out" in said and "README.md" in said


def test_empty_documents_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a b c d"}\n{"text": ""}\n')
    source = load(tmp_path, tmp_path / "a.jsonl")
    assert source.notes == (f"{tmp_path / 'a.jsonl'}: 2 documents without text are left out",)
    assert load(tmp_path, tmp_path / "a.jsonl").notes == source.notes  # from the cache, too


@pytest.mark.parametrize("word", ["a" * 300_000, "ab" * 100_000, " " * 200_000, "=" * 200_000, "日" * 60_000])
def test_a_long_word_is_learnt_from_in_parts(word):
    learnt = learn([f"the king and the queen {word} of the night"] * 2, 400)
    vocab = json.loads(learnt.files["tokenizer.json"])["model"]["vocab"]
    assert max(map(len, vocab)) <= 128
    assert learnt.decode(learnt.encode(f"the {word[:999]}").tolist()) == f"the {word[:999]}"


def test_texts_without_long_words_are_learnt_from_as_they_stand():
    text = "the king and queen of night do speak in thee my lord\n" * 50
    by_line = learn([text], 300).files["tokenizer.json"]
    assert learn([text, "x" * 5000], 300).files["tokenizer.json"] != by_line
    assert learn([text], 300).files["tokenizer.json"] == by_line


# ---------------------------------------------------------------------------------------------------------------
# The same corpus at another place


def test_a_corpus_is_the_same_wherever_it_lies(tmp_path):
    text = "to be or not to be\n" * 20
    places = [tmp_path / "a.txt", tmp_path / "moved" / "b.txt"]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    one, other = (load_corpus(DataConfig(path=str(place), cache_dir=str(tmp_path / "cache"))) for place in places)
    assert one.is_that_of(other.fingerprint) and one.fingerprint == other.fingerprint
    places[1].write_text(text + "that")
    other = load_corpus(DataConfig(path=str(places[1]), cache_dir=str(tmp_path / "cache")))
    assert not one.is_that_of(other.fingerprint)


def test_places_may_differ_where_a_checkpoint_knows_the_data():
    def config(place: str, steps: int = 9):
        data = {"mixture": [{"path": f"{place}/a", "weight": 1}], "tokenizer": f"{place}/t.json", "path": place}
        return config_from_dict({"workdir": "w", "data": data, "train": {"total_steps": steps}})

    assert differing_keys(config("a"), config("b"), hashed=True) == {}
    assert set(differing_keys(config("a"), config("b"))) == {"data.mixture", "data.path", "data.tokenizer"}
    heavier = config_from_dict({"workdir": "w", "data": {"mixture": [{"path": "a/a", "weight": 2}]}})
    assert "data.mixture" in differing_keys(config("a"), heavier, hashed=True)


@pytest.mark.whole
def test_a_run_resumes_where_it_and_its_corpus_were_moved_to(tiny_run, tmp_path, corpus_file):
    first, second = tmp_path / "old" / "run", tmp_path / "new" / "run"
    text = tmp_path / "old" / "text.txt"
    text.parent.mkdir()
    text.write_text(corpus_file.read_text())
    args = [arg for arg in tiny_run if not arg.startswith("--data.path")]
    done = run_script(*args, f"--data.path={text}", f"--workdir={first}", "--train.total_steps=5")
    assert done.returncode == 0, done.stderr
    second.parent.mkdir()
    first.rename(second)
    text.rename(tmp_path / "new" / "another name.txt")
    moved = [args[0], second / "config.yaml", f"--data.path={tmp_path / 'new' / 'another name.txt'}"]
    done = run_script(*moved, "--train.total_steps=6")
    assert done.returncode == 0, done.stderr
    assert f"its run is taken to be {second}" in done.stderr and not first.exists()
    steps = [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_a_parquet_column_that_is_not_utf8_is_refused_by_its_name(tmp_path):
    """pyarrow writes and reads such bytes as a string; only Python refuses them."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install -e '.[data]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    sound = pyarrow.array([b"abc", b"ab\xe7c"]).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": sound}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet.*(utf-8|UTF-8)"):
        load_corpus(DataConfig(path=str(tmp_path / "rows.parquet"), tokenizer="byte", cache_dir=str(tmp_path / "c")))
