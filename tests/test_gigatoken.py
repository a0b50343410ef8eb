"""Documents through the library gigatoken: the ids of tiktoken, whatever the text."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA

from gptjax.tokenizers import TiktokenTokenizer, gigatoken, make_tokenizer
from gptjax.tokenizers.gigatoken import SCHEMES, SMALL_CHARS, doubtful_characters

# Blocks of Unicode: a name, the first and the last code point.
BLOCKS = (
    *[("Latin", 0x41, 0x24F), ("Greek", 0x370, 0x3FF), ("Cyrillic", 0x400, 0x52F), ("Armenian", 0x531, 0x58F)],
    *[("Hebrew", 0x591, 0x5F4), ("Arabic", 0x600, 0x6FF), ("Devanagari", 0x900, 0x97F), ("Bengali", 0x980, 0x9FE)],
    *[("Gurmukhi", 0xA01, 0xA76), ("Tamil", 0xB82, 0xBFA), ("Telugu", 0xC00, 0xC7F), ("Kannada", 0xC80, 0xCF2)],
    *[("Thai", 0xE01, 0xE5B), ("Tibetan", 0xF00, 0xFDA), ("Myanmar", 0x1000, 0x109F), ("Georgian", 0x10A0, 0x10FF)],
    *[("Ethiopic", 0x1200, 0x139F), ("Khmer", 0x1780, 0x17F9), ("Mongolian", 0x1800, 0x18AA)],
    *[("kana", 0x3041, 0x30FF), ("Hangul", 0xAC00, 0xD7A3), ("jamo", 0x1100, 0x11FF), ("Han", 0x4E00, 0x9FFF)],
    *[("emoji", 0x1F300, 0x1FAFF), ("punctuation", 0x2000, 0x206F), ("mathematics", 0x1D400, 0x1D7FF)],
    *[("basic plane", 0x80, 0xFFFF), ("other planes", 0x10000, 0x10FFFF)],
)
SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u200b\u2028\u2029\u202f\u3000\ufeff"
WORDS = (
    *("'s", "'t", "'re", "'ve", "'LL", "'D", "’s", "'ſ", "<|endoftext|>", "\r\n", " \n", "123", "٣٤", "Ⅷ", "½"),
    *("e\u0301", "\u200d", "\ufe0f", "ﬀ", "ſ", "İ", "K", "the", " of", "    ", "\ud83d", "\x00"),
)


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Mixtures of one block with ASCII, spaces, contractions and characters of other blocks."""
    rng = random.Random(seed)

    def some(block: tuple[str, int, int]) -> str:
        return "".join(chr(rng.randint(*block[1:])) for _ in range(rng.randrange(1, 9)))

    for _ in range(count):
        block, parts = rng.choice(BLOCKS), []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.random()
            if kind < 0.45:
                parts.append(some(block))
            elif kind < 0.6:
                parts.append("".join(chr(rng.randrange(128)) for _ in range(rng.randrange(1, 8))))
            elif kind < 0.75:
                parts.append(rng.choice(SPACES) * rng.randrange(1, 5))
            else:
                parts.append(rng.choice(WORDS) if kind < 0.9 else some(rng.choice(BLOCKS)))
        yield "".join(parts)


def assert_same_ids(tokenizer: TiktokenTokenizer, texts: list[str]) -> None:
    found = tokenizer._faster.encode_batch(texts)
    expected = tokenizer._encoding.encode_ordinary_batch(texts)
    differing = [text for text, a, b in zip(texts, found, expected, strict=True) if a.tolist() != b]
    assert not differing, f"{len(differing)} differ, such as {differing[0]!a}"


@pytest.fixture
def gpt2(gpt2_cache):
    pytest.importorskip("gigatoken", reason="pip install -e '.[data]'")
    return make_tokenizer("gpt2", [])


def test_texts_of_twenty_scripts_have_the_ids_of_tiktoken(gpt2):
    texts = list(random_texts(4000, seed=0))
    assert_same_ids(gpt2, texts)
    halves = [text for text in texts if "\ud83d" in text]
    assert halves and any(text.isascii() for text in texts)
    assert {ids.dtype for ids in gpt2.encode_batch(texts)} == {np.dtype(np.int32)}


def test_long_runs_and_a_corpus_have_the_ids_of_tiktoken(gpt2):
    runs = [character * 100_000 for character in (" ", "\n", "a", "7", "!?", "é", "\u3000", "日")]
    verses = (DATA / "bible_en_es.tsv").read_text()[:500_000] if DATA.exists() else ""
    assert_same_ids(gpt2, ["", *runs, verses, verses.replace("\n", "\r\n")])


@pytest.mark.parametrize("pattern", SCHEMES, ids=SCHEMES.values())
def test_every_way_to_cut_words_is_that_of_tiktoken(pattern):
    """Over a few tokens, since cl100k's and o200k's files are in no package."""
    pytest.importorskip("gigatoken", reason="pip install -e '.[data]'")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"  ": 259}
    assert_same_ids(TiktokenTokenizer("small", pattern, ranks, {}), list(random_texts(1500, seed=1)))


def test_the_published_patterns_are_known(monkeypatch):
    """Another version of tiktoken may write them otherwise, and everything would silently become slow."""
    openai_public = pytest.importorskip("tiktoken_ext.openai_public", reason="pip install -e '.[data]'")
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    made = [openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"] for name in ("cl100k_base", "o200k_base")]
    assert {openai_public.r50k_pat_str, *made} == SCHEMES.keys()


def test_what_it_remembers_is_bounded_and_changes_no_id(gpt2, monkeypatch):
    monkeypatch.setattr(gigatoken, "REMEMBERED_CHARS", 10_000)
    texts = list(random_texts(2500, seed=2))
    first = gpt2._faster._backend
    for _ in range(2):
        assert_same_ids(gpt2, texts)
    assert gpt2._faster._backend is not first


def test_without_it_documents_have_the_same_ids(gpt2, monkeypatch):
    texts = list(random_texts(4000, seed=3))
    assert sum(map(len, texts)) >= SMALL_CHARS
    expected = [ids.tolist() for ids in gpt2.encode_batch(texts)]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    without = make_tokenizer("gpt2", [])
    assert [ids.tolist() for ids in without.encode_batch(texts)] == expected
    assert without._faster is None


@pytest.mark.slow  # pytest -n 0 -m slow tests/test_gigatoken.py: five minutes
def test_a_million_texts_and_every_code_point_have_the_ids_of_tiktoken(gpt2):
    for seed in range(100, 120):
        assert_same_ids(gpt2, list(random_texts(50_000, seed)))
    every = [chr(code) for code in range(0x80, 0x110000)]
    for context in ("a%s", "1%s", "!%s", " %sa", "%s\n", "'%s"):
        for begin in range(0, len(every), 2**17):
            assert_same_ids(gpt2, [context % one for one in every[begin : begin + 2**17]])
    known = ~doubtful_characters(next(iter(SCHEMES)))
    assert known.sum() > 270_000


@pytest.mark.slow
def test_the_corpora_at_hand_have_the_ids_of_tiktoken(gpt2):
    files = [*DATA.glob("*.t?[vt]"), *Path(np.__file__).parent.rglob("*.py")]
    assert_same_ids(gpt2, [file.read_text(encoding="utf-8") for file in files])
