"""Tokenizers of Hugging Face models: the ids of transformers, from any of the forms in which they come."""

import json
from pathlib import Path

import pytest
import tokenizers

from gptjax.errors import UserError
from gptjax.tokenizers import HuggingFaceTokenizer, make_tokenizer, read_huggingface_tokenizer, tokenizer_from_dict

TEXTS = ["The king and queen", "of night do 1234 speak\n\n  in thee", "Käse, 日本 🎈", "", " <|endoftext|> lord"]


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory, corpus_file) -> Path:
    """A byte-level BPE of 400 ids, which puts <|begin|> before a text, with the files that models carry."""
    folder = tmp_path_factory.mktemp("hf")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|begin|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train([str(corpus_file)], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", made.token_to_id("<|begin|>"))]
    )
    made.enable_truncation(5)  # as some published files have left it
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_ids_are_those_of_transformers(hf_directory):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peer]'")
    theirs = transformers.AutoTokenizer.from_pretrained(hf_directory)
    ours = read_huggingface_tokenizer(hf_directory)
    for text, batched in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert ours.encode_prompt(text).tolist() == theirs(text)["input_ids"]
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"] == batched.tolist()
        assert ours.decode(ours.encode_prompt(text)) == text.replace("<|endoftext|>", "")
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    assert ours.chat_template == "{{ messages }}"


def test_a_tokenizer_travels_as_plain_values_byte_for_byte(hf_directory):
    ours = make_tokenizer(str(hf_directory / "tokenizer.json"), [])
    again = tokenizer_from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.files["tokenizer.json"].encode() == (hf_directory / "tokenizer.json").read_bytes()
    assert again.eos_id == ours.eos_id
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
