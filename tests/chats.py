"""Chat templates as published, a tokenizer that knows their special tokens, and random conversations."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>"]
WORDS = [
    "the",
    "king",
    "and",
    "queen",
    "of",
    "night",
    "do",
    "speak",
    "é",
    "ß",
    "漢字",
    "🙂🙂",
    "",
    "\n",
    "\tlove:",
    "<b>is</b>",
    "{{",
    "this",
    "}}",
    "1234",
    "that's",
    "assistant",
]


def published(name: str) -> str:
    """The text of a template that trl carries: `llama3`, `qwen2_5`, and with `_training` one that marks."""
    trl = pytest.importorskip("trl", reason="pip install -e '.[peer]'")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def make_tokenizer_folder(folder: Path, corpus: Path, template: str | None) -> Path:
    """A byte-level BPE of 500 ids with the templates' special tokens, as a Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    made.train([str(corpus)], trainer)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|begin_of_text|>",
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def random_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() or "yes"


def random_conversation(rng: random.Random) -> list[dict[str, str]]:
    """Turns of user and assistant, after a system message in half of them."""
    turns = [{"role": role, "content": random_text(rng)} for role in ("user", "assistant") * rng.randint(1, 4)]
    return [*([{"role": "system", "content": random_text(rng)}] if rng.random() < 0.5 else []), *turns]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path
