"""Tokenizers: published ids, the ids of transformers, and every text comes back."""

import json
import shutil

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.convert.export import tokenizer_files
from gptjax.errors import UserError
from gptjax.tokenizers import (
    GPT2_SPLIT,
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    byte_level_bpe,
    make_tokenizer,
    printable_bytes,
    read_huggingface_tokenizer,
    same_ids,
    tokenizer_from_dict,
)

TEXTS = ["The king and queen", "of night do 1234 speak\n\n  in thee", "Käse, 日本 🎈", "", " <|endoftext|> lord"]


def test_the_ids_are_those_of_transformers(hf_directory):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
    theirs = transformers.AutoTokenizer.from_pretrained(hf_directory)
    ours = read_huggingface_tokenizer(hf_directory)
    for text, batched in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert ours.encode_prompt(text).tolist() == theirs(text)["input_ids"]
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        as_text = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert batched.tolist() == as_text
        assert ours.decode(ours.encode_prompt(text)) == text.replace("<|endoftext|>", "")
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    assert ours.chat_template == "{{ messages }}"


def test_a_tokenizer_travels_as_plain_values_byte_for_byte(hf_directory):
    ours = make_tokenizer(str(hf_directory / "tokenizer.json"), [])
    again = tokenizer_from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.files["tokenizer.json"].encode() == (hf_directory / "tokenizer.json").read_bytes()
    assert again.eos_id == ours.eos_id
    assert same_ids(again, ours)
    assert same_ids(HuggingFaceTokenizer({"tokenizer.json": ours.files["tokenizer.json"]}), ours)
    assert not same_ids(ByteTokenizer(), ours)
    assert not same_ids(CharTokenizer("ab"), CharTokenizer("abc"))
    assert again.encode(TEXTS[1]).tolist() == ours.encode(TEXTS[1]).tolist()


def test_vocabulary_and_merges_alone_make_gpt2s_tokenizer(hf_directory, tmp_path):
    model = json.loads((hf_directory / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ours, whole = make_tokenizer(str(tmp_path), []), read_huggingface_tokenizer(hf_directory)
    assert [ours.encode(t).tolist() for t in TEXTS] == [whole.encode(t).tolist() for t in TEXTS]
    assert ours.eos_id == whole.eos_id
    assert ours.encode_prompt("king").tolist() == ours.encode("king").tolist()


def test_damaged_and_missing_tokenizers_are_named(hf_directory, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        make_tokenizer(str(tmp_path), [])
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    with pytest.raises(UserError, match="save_pretrained"):
        make_tokenizer(str(tmp_path), [])
    with pytest.raises(UserError, match=r"'chars' is not known.*did you mean 'char'"):
        make_tokenizer("chars", [])
    (tmp_path / "tokenizer.json").write_bytes((hf_directory / "tokenizer.json").read_bytes()[:900])
    with pytest.raises(UserError, match="not a tokenizer"):
        read_huggingface_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        HuggingFaceTokenizer(
            {"tokenizer.json": (hf_directory / "tokenizer.json").read_text(), "tokenizer_config.json": "{"}
        )


@pytest.fixture
def gpt2(gpt2_cache) -> TiktokenTokenizer:
    return make_tokenizer("gpt2", [])


def test_gpt2_has_the_published_ids(gpt2, tinyshakespeare):
    """transformers' documentation; nanoGPT's data/shakespeare/prepare.py: 301,966 + 36,059 tokens."""
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("I gazed").tolist() == [40, 50255]  # the last merge of all
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    text = tinyshakespeare.read_text()
    assert len(gpt2.encode(text)) == 338_025
    cut = int(len(text) * 0.9)
    assert [len(ids) for ids in gpt2.encode_batch([text[:cut], text[cut:]])] == [301_966, 36_059]
    assert gpt2.decode(gpt2.encode(text).tolist()) == text


def renamed(tokenizer, names: dict[str, str]) -> HuggingFaceTokenizer:
    """The tokenizer with tokens of its vocabulary under each other's names."""
    spec = json.loads(tokenizer.files["tokenizer.json"])
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {names.get(token, token): id for token, id in vocab.items()}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    return HuggingFaceTokenizer({"tokenizer.json": json.dumps(spec)})


def test_parts_of_characters_and_special_tokens_are_told_apart(hf_directory):
    """Alone the former all decode to U+FFFD, and the latter to nothing."""
    ours = make_tokenizer(str(hf_directory / "tokenizer.json"), [])
    first, second = (printable_bytes()[byte] for byte in (0xC3, 0xE2))
    other = renamed(ours, {first: second, second: first})
    assert ours.encode("é").tolist() != other.encode("é").tolist()
    assert not same_ids(ours, other)
    assert not same_ids(ours, renamed(ours, {"<|begin|>": "<|other|>"}))
    assert same_ids(ours, renamed(ours, {}))
    for tokenizer in (ByteTokenizer(), CharTokenizer("aé\ufffd")):
        assert same_ids(HuggingFaceTokenizer(tokenizer_files(tokenizer)), tokenizer)


def test_gpt2_agrees_with_its_files_run_by_another_library(gpt2, gpt2_cache):
    theirs = tokenizers.ByteLevelBPETokenizer(str(gpt2_cache / "encoder.json"), str(gpt2_cache / "vocab.bpe"))
    for text in [*TEXTS, "  ".join(map(chr, range(32, 3000)))]:
        if "<|endoftext|>" not in text:
            assert gpt2.encode(text).tolist() == theirs.encode(text).ids


def test_gpt2_leaves_as_a_tokenizer_json_with_the_same_ids(gpt2, tinyshakespeare):
    left = HuggingFaceTokenizer(tokenizer_files(gpt2))
    text = tinyshakespeare.read_text()[:20_000] + "Käse, 日本 🎈  1234 \n\n it's"
    assert left.encode(text).tolist() == gpt2.encode(text).tolist()
    assert (left.vocab_size, left.eos_id) == (gpt2.vocab_size, gpt2.eos_id)
    assert same_ids(left, gpt2)


def test_documents_have_the_same_ids_through_the_faster_library(gpt2_cache, hf_directory, tinyshakespeare, tmp_path):
    shutil.copy(gpt2_cache / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(gpt2_cache / "vocab.bpe", tmp_path / "merges.txt")
    texts = [*TEXTS, tinyshakespeare.read_text()[:100_000], "  ".join(map(chr, range(32, 3000))), " " * 2_000_000]
    for tokenizer in map(read_huggingface_tokenizer, (tmp_path, hf_directory)):
        assert tokenizer._faster is not None
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.tolist() == tokenizer._documents.encode(text, add_special_tokens=False).ids


def _swapped(spec: dict) -> None:
    spec["model"]["vocab"].update({"ab": 257, "bc": 256})  # ids that fall where the merges go on


def _unreachable(spec: dict) -> None:
    spec["model"]["vocab"]["bcd"] = 258  # its text is merged to "bc" and "d"


@pytest.mark.parametrize(
    "change",
    [
        _swapped,
        _unreachable,
        lambda spec: spec["model"].update(ignore_merges=True),
        lambda spec: spec.update(normalizer={"type": "NFC"}),
        lambda spec: spec["pre_tokenizer"].update(use_regex=False),
        lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
        lambda spec: spec["added_tokens"][0].update(special=False),
    ],
    ids=["swapped", "unreachable", "whole-words", "normalized", "uncut", "prefixed", "added"],
)
def test_a_bpe_that_the_faster_library_would_read_otherwise_stays_where_it_is(change):
    pytest.importorskip("tiktoken", reason="pip install -e '.[data]'")
    vocab = {letter: byte for byte, letter in enumerate(printable_bytes())} | {"ab": 256, "bc": 257, "<end>": 300}
    spec = json.loads(byte_level_bpe(vocab, ["a b", "b c"], [GPT2_SPLIT], ["<end>"]))
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][0]
    assert HuggingFaceTokenizer({"tokenizer.json": json.dumps(spec)})._faster is not None
    change(spec)
    tokenizer = HuggingFaceTokenizer({"tokenizer.json": json.dumps(spec)})
    assert tokenizer._faster is None
    text = "abc bcd cab  e\u0301 <end>"
    expected = tokenizer._documents.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_batch([text])[0].tolist() == expected


def test_names_of_special_tokens_in_a_text_are_text(gpt2):
    ids = gpt2.encode("a<|endoftext|>").tolist()
    assert gpt2.eos_id not in ids
    assert gpt2.decode([*ids, gpt2.eos_id]) == "a<|endoftext|>"
    assert gpt2.special_tokens == {"<|endoftext|>": 50256}


def test_a_published_tokenizer_travels_without_its_files(gpt2, monkeypatch):
    spec = json.dumps(gpt2.to_dict())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/nowhere")
    again = tokenizer_from_dict(json.loads(spec))
    assert again.encode(TEXTS[2]).tolist() == gpt2.encode(TEXTS[2]).tolist()
    assert json.dumps(again.to_dict()) == spec


def test_without_its_files_it_says_what_to_do(gpt2_cache, tmp_path, monkeypatch):
    import tiktoken.load

    def no_network(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name, file in (("gpt2", "vocab.bpe"), ("cl100k", "cl100k_base.tiktoken"), ("o200k", "o200k_base.tiktoken")):
        with pytest.raises(UserError, match=rf"{name} needs .*{file}.*no route.*set TIKTOKEN_CACHE_DIR"):
            make_tokenizer(name, [])
    shutil.copytree(gpt2_cache, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "vocab.bpe").open("a") as stream:
        stream.write("x y\n")
    with pytest.raises(UserError, match="gpt2 needs"):  # a file that is not the published one
        make_tokenizer("gpt2", [])
    assert (tmp_path / "vocab.bpe").exists()


@pytest.fixture
def every_kind(hf_directory, gpt2, monkeypatch) -> dict[str, Tokenizer]:
    """One of each. cl100k and o200k with their own word patterns and special tokens, over a few ranks alone, since
    their files are in no package."""
    from tiktoken_ext import openai_public

    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    small = {name: make_tokenizer(name, []) for name in ("cl100k", "o200k")}
    return {"byte": make_tokenizer("byte", []), "hf": read_huggingface_tokenizer(hf_directory), "gpt2": gpt2, **small}


def assert_comes_back(every_kind, text: str) -> None:
    for tokenizer in every_kind.values():
        assert tokenizer.decode(tokenizer.encode_batch([text])[0].tolist()) == text
    hf = every_kind["hf"]
    assert hf.encode_batch([text])[0].tolist() == hf._documents.encode(text, add_special_tokens=False).ids
    characters = CharTokenizer(text)
    assert characters.decode(characters.encode(text).tolist()) == text


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text())
def test_every_text_comes_back(every_kind, text):
    assert_comes_back(every_kind, text)


@pytest.mark.slow  # pytest -m slow -n 0 tests/test_tokenizers.py
@settings(max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text())
def test_thousands_of_texts_come_back(every_kind, text):
    assert_comes_back(every_kind, text)


def test_every_kind_travels_and_ends_documents(every_kind):
    expected = {"byte": 256, "gpt2": 50256, "cl100k": 100257, "o200k": 199999}
    for name, tokenizer in every_kind.items():
        again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        ids = [some.tolist() for some in tokenizer.encode_batch(TEXTS)]
        assert [some.tolist() for some in again.encode_batch(TEXTS)] == ids
        assert again.eos_id == tokenizer.eos_id == expected.get(name, tokenizer.eos_id)
        assert again.special_tokens["<|endoftext|>"] == again.eos_id
        assert again.vocab_size == tokenizer.vocab_size > max(map(max, filter(None, ids)))
        assert tokenizer.decode([tokenizer.eos_id]) == ""
        assert not any(tokenizer.eos_id in some for some in ids)
    assert every_kind["cl100k"].decode([100270]) == ""  # an id that names nothing
