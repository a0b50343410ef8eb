"""Text of ids in pieces: every piece once, whatever the tokenizer and however the ids come."""

import json

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizer_layouts import BASES

from gptjax.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    TextDecoder,
    TiktokenTokenizer,
    Tokenizer,
    text_after,
)

MERGED = (b"th", b"the", b" the", "é".encode(), b"\xe2\x82", b"a\xe2\x82")
TIKTOKEN_RANKS = {bytes([b]): b for b in range(256)} | {token: 256 + rank for rank, token in enumerate(MERGED)}


@pytest.fixture(scope="module")
def kinds(corpus_file) -> dict[str, Tokenizer]:
    """Byte-level, byte-fallback, SentencePiece-like and word-piece tokenizers of Hugging Face, and ours."""
    pytest.importorskip("tiktoken", reason="pip install -e '.[data]'")
    found: dict[str, Tokenizer] = {
        name: HuggingFaceTokenizer({"tokenizer.json": make(corpus_file).to_str()}) for name, make in BASES.items()
    }
    cleaning = {"clean_up_tokenization_spaces": True}
    words = {"tokenizer.json": found["word-pieces"].files["tokenizer.json"]}
    found["cleaning"] = HuggingFaceTokenizer({**words, "tokenizer_config.json": json.dumps(cleaning)})
    marked = tokenizers.Tokenizer(tokenizers.models.BPE({"▁": 0, "a": 1, "▁a": 2, "<s>": 3}, [("▁", "a")]))
    marked.decoder = tokenizers.decoders.Metaspace()
    marked.add_special_tokens(["<s>"])
    found["metaspace"] = HuggingFaceTokenizer({"tokenizer.json": marked.to_str()})
    found |= {"byte": ByteTokenizer(), "char": CharTokenizer("ab \n\ufffdé")}
    found["tiktoken"] = TiktokenTokenizer("small", r"\p{L}+|\P{L}+", TIKTOKEN_RANKS, {"<|endoftext|>": 300})
    return found


def streamed(tokenizer: Tokenizer, before: list[int], ids: list[int], sizes: list[int]) -> list[str]:
    """The pieces of ids that come in chunks of these sizes, over and over."""
    decoder, pieces, start = TextDecoder(tokenizer, before), [], 0
    while start < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(decoder.add(ids[start : start + size]))
        start += size
    return [*pieces, decoder.finish()]


NAMES = [*BASES, "cleaning", "metaspace", "byte", "char", "tiktoken"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_pieces_of_any_ids_are_their_text_at_once(name, kinds, data):
    tokenizer = kinds[name]
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    prompt = data.draw(st.text("ab é€", max_size=8) if name != "char" else st.text("ab é", max_size=8))
    before = tokenizer.encode_prompt(prompt).tolist()
    ids, sizes = data.draw(some), data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    whole, start = tokenizer.decode(before + ids), tokenizer.decode(before)
    found = "".join(streamed(tokenizer, before, ids, sizes))
    assert found == text_after(tokenizer, before, ids)
    if name != "cleaning" or whole.startswith(start):  # else the first id changes the prompt's own text
        assert start + found == whole


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(), size=st.integers(1, 9))
@example(text="aa" + "€" * 10, size=4)
@example(text="\ufffd\ufffd end\ufffd", size=1)
@example(text="👩‍👩‍👧 日本 e\u0301", size=2)
def test_a_text_comes_back_in_pieces_of_any_size(name, kinds, text, size):
    tokenizer = kinds[name]
    if name == "char":
        text = "".join(c for c in text if c in tokenizer.alphabet)
    before, ids = tokenizer.encode("a").tolist(), tokenizer.encode(text).tolist()
    found = "".join(streamed(tokenizer, before, ids, [size]))
    assert found == tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
    if name in ("byte-level", "byte", "tiktoken", "char", "padded-pattern"):
        assert found == text


def test_ten_euros_of_single_bytes_come_once_and_as_they_are_complete(kinds):
    tokenizer = kinds["byte-fallback"]
    ids = tokenizer.encode("aa" + "€" * 10).tolist()
    pieces = streamed(tokenizer, [], ids, [4])
    assert "".join(pieces) == "aa" + "€" * 10
    assert sum("€" in piece for piece in pieces) > 3


def test_a_wrong_byte_spoils_no_character_beside_it(kinds):
    tokenizer = kinds["byte-fallback"]
    euro = [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert tokenizer.decode([*euro, euro[0], *euro, euro[1], *euro, euro[0]]) == "€\ufffd€\ufffd€\ufffd"
    assert streamed(tokenizer, [], [*euro, *euro[:2]], [1]) == ["", "", "€", "", "", "\ufffd"]


def test_a_space_before_the_first_new_word_stays(kinds):
    tokenizer = kinds["metaspace"]
    assert tokenizer.decode([2]) == "a"
    assert streamed(tokenizer, [2], [2, 2, 0, 0, 2], [1]) == [" a", " a", " ", " ", " a", ""]
    assert streamed(tokenizer, [3], [2, 2], [1]) == ["a", " a", ""]


def test_long_streams_decode_few_ids_anew(kinds, monkeypatch):
    tokenizer = kinds["byte-level"]
    ids, longest, decode = tokenizer.encode("the king and queen " * 200).tolist(), [], tokenizer.decode

    def counted(some):
        longest.append(len(some))
        return decode(some)

    monkeypatch.setattr(tokenizer, "decode", counted)
    decoder = TextDecoder(tokenizer)
    assert "".join([*(decoder.add([id]) for id in ids), decoder.finish()]) == "the king and queen " * 200
    assert max(longest) < 10


@pytest.mark.parametrize("name", ["byte", "tiktoken"])
def test_names_of_special_tokens_in_a_prompt_are_tokens_and_in_a_document_text(name, kinds):
    tokenizer = kinds[name]
    end = tokenizer.eos_id
    h, i = b"Hi"
    assert tokenizer.encode_prompt("<|endoftext|>Hi").tolist() == [end, h, i]
    assert tokenizer.encode_prompt("Hi<|endoftext|><|endoftext|>").tolist() == [h, i, end, end]
    assert tokenizer.encode_prompt("Hi").tolist() == [h, i]
    assert tokenizer.encode_prompt("").tolist() == []
    assert end not in tokenizer.encode("<|endoftext|>Hi")
    assert end not in tokenizer.encode_batch(["<|endoftext|>Hi"])[0]


@pytest.mark.parametrize("name", ["byte", "tiktoken"])
def test_a_prompt_has_the_ids_of_the_exported_tokenizer(name, kinds):
    from gptjax.convert.export import tokenizer_files

    exported = HuggingFaceTokenizer(tokenizer_files(kinds[name]))
    for text in ("<|endoftext|>Hi", "a <|endoftext|> the", "<|endoftext|", "é€ the"):
        assert kinds[name].encode_prompt(text).tolist() == exported.encode_prompt(text).tolist()
        assert kinds[name].encode_batch([text])[0].tolist() == exported.encode_batch([text])[0].tolist()
