"""`gptjax data train-tokenizer`: a byte-level BPE from text."""

import re
from collections.abc import Iterable, Iterator

import tokenizers

from gptjax.data.reading import Reading, documents
from gptjax.data.sources import list_files, pieces_of
from gptjax.errors import UserError
from gptjax.shell.files import write_atomically
from gptjax.shell.paths import UserPath, shell, writing
from gptjax.tokenizers import GPT2_SPLIT, HuggingFaceTokenizer

LONGEST_WORD = 256  # characters; training takes time quadratic in a word's length
LONGEST_TOKEN = 128  # letters of the byte-level alphabet, as long as GPT-2's longest


def train_tokenizer(
    sources: list[UserPath],
    out: UserPath,
    vocab_size: int = 32768,
    text_field: str = "text",
    separator: str | None = None,
    max_mb: int = 1000,
) -> None:
    """Train a byte-level BPE on text and write it as a tokenizer.json, which --tokenizer takes.

    Args:
        sources: as for gptjax data prepare.
        out: the file to write.
        vocab_size: tokens, the 256 bytes and <|endoftext|> among them.
        text_field: the field of a JSON line, or the column, that holds a document's text.
        separator: the text between documents in text files.
        max_mb: megabytes of text to read; merges hardly change with more.
    """
    how = Reading(text_field, separator)

    def texts() -> Iterator[str]:
        left = max_mb * 1_000_000
        for piece in pieces_of([list_files(source).files for source in sources], how, val_frac=0):
            if piece.validation:
                continue
            for document in documents(piece, how):
                if left <= 0:
                    return
                left -= len(document.text)
                yield document.text

    tokenizer = learn(texts(), vocab_size)
    with writing(out) as path:
        write_atomically(path, tokenizer.files["tokenizer.json"])
    using = shell("--tokenizer", out)
    print(f"{out} has {tokenizer.vocab_size:,} tokens; gptjax data prepare ... {using} uses it")


def learn(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Return a byte-level BPE (Sennrich et al. 2016; bytes as in Radford et al. 2019) trained on texts.

    The same texts in the same order give the same merges. Text is cut into words as GPT-2 does; every text has ids,
    since each byte has one. <|endoftext|> has the last id. A word longer than LONGEST_WORD is split for training, and
    no token is longer than LONGEST_TOKEN.

    Raises:
        UserError: a vocabulary without room for the 256 bytes and the end of text, or no text.
    """
    if vocab_size < 257:
        raise UserError(f"--vocab_size {vocab_size} is too small: 256 bytes and <|endoftext|> need 257")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        show_progress=False,
        max_token_length=LONGEST_TOKEN,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = GPT2_SPLIT
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator((part for text in texts for part in without_long_words(text)), trainer)
    if made.get_vocab_size() < 257 and vocab_size > 257:
        raise UserError("there is no text to train a tokenizer on")
    made.add_special_tokens(["<|endoftext|>"])
    return HuggingFaceTokenizer({"tokenizer.json": made.to_str()})


def without_long_words(text: str) -> Iterator[str]:
    """Yield a text cut inside its runs of more than LONGEST_WORD characters with, or without, white space."""
    start = 0
    for run in re.finditer(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}", text):
        for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]
