"""A tokenizer of text with further ids after its own: tags of documents, marks of pictures, levels of pixels."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import UserError, nearest
from gptjax.tokenizers.plain import Tokenizer, template_of

PICTURE, PICTURE_END = "<|picture|>", "<|/picture|>"


class PictureFormat(NamedTuple):
    """The form of a vocabulary's pictures: every picture has height x width whole numbers in [0, levels)."""

    height: int
    width: int
    levels: int

    @property
    def pixels(self) -> int:
        """Return the number of tokens of a picture, without its two marks."""
        return self.height * self.width


class MarkedTokenizer:
    """A tokenizer of text, with special tokens of its own after the text's ids.

    Args:
        text: the tokenizer of the text.
        tags: what documents can be tagged by.
        picture: the form of pictures; None for a vocabulary without pictures.
    """

    kind = "marked"

    def __init__(self, text: Tokenizer, tags: Sequence[str] = (), picture: PictureFormat | None = None):
        self.text, self.tags, self.picture = text, tuple(tags), picture
        marks = [tag_mark(tag) for tag in tags]
        if picture is not None:
            marks += [PICTURE, PICTURE_END, *(level_mark(level) for level in range(picture.levels))]
        self.marks = {mark: text.vocab_size + number for number, mark in enumerate(marks)}
        self.special_tokens = {**text.special_tokens, **self.marks}
        self.vocab_size = text.vocab_size + len(marks)
        self.eos_id, self.eos_ids = text.eos_id, text.eos_ids
        self.chat_template = text.chat_template
        self.bos_id = getattr(text, "bos_id", None)
        self.certain_length = text.certain_length
        self._split = re.compile("(" + "|".join(map(re.escape, marks)) + ")")

    def encode(self, text: str) -> np.ndarray:
        return self.text.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.text.encode_batch(texts)

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode_places(text)[0] if self._split.search(text) else self.text.encode_prompt(text)

    def encode_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, places = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int64)]
        start = 0
        for number, piece in enumerate(self._split.split(text)):
            if number % 2:
                ids.append(np.array([self.marks[piece]], np.int32))
                places.append(np.array([[start, start + len(piece)]], np.int64))
            elif piece:
                found, where = self.text.encode_places(piece)
                ids.append(found)
                places.append(where + start)
            start += len(piece)
        return np.concatenate(ids), np.concatenate(places)

    def decode(self, ids: Iterable[int]) -> str:
        return self.text.decode(id for id in ids if id < self.text.vocab_size)

    def to_dict(self) -> dict[str, Any]:
        about = {"kind": self.kind, "text": self.text.to_dict(), "tags": list(self.tags), **template_of(self)}
        return about if self.picture is None else {**about, "picture": self.picture._asdict()}

    def tag_id(self, tag: str) -> int:
        """Return the id of a tag's token; raise UserError for a tag that the vocabulary lacks."""
        return self.marks[known_tag(self, tag)]

    def picture_ids(self, levels: np.ndarray) -> np.ndarray:
        """Return the ids of a picture with its marks, int32 [pixels + 2].

        Args:
            levels: [height, width], row by row from the top left.
        """
        first = self.marks[level_mark(0)]
        pixels = first + np.asarray(levels, np.int32).ravel()
        return np.array([self.marks[PICTURE], *pixels, self.marks[PICTURE_END]], np.int32)

    def pictures_in(self, ids: Sequence[int]) -> list[np.ndarray]:
        """Return the whole pictures among ids, each [height, width] int32; none that is cut."""
        assert self.picture is not None
        first, size = self.marks[level_mark(0)], self.picture.pixels
        found = []
        for start in (place + 1 for place, id in enumerate(ids) if id == self.marks[PICTURE]):
            levels = np.array(ids[start : start + size], np.int32) - first
            whole = len(levels) == size and levels.min() >= 0 and levels.max() < self.picture.levels
            if whole and list(ids[start + size : start + size + 1]) in ([], [self.marks[PICTURE_END]]):
                found.append(levels.reshape(self.picture.height, self.picture.width))
        return found


def tag_mark(tag: str) -> str:
    """Return the name of a tag's token."""
    return f"<|tag:{tag}|>"


def level_mark(level: int) -> str:
    """Return the name of the token of a pixel's level."""
    return f"<|level:{level}|>"


def known_tag(tokenizer: Tokenizer, tag: str) -> str:
    """Return the name of a tag's token; raise UserError where the model was trained without this tag."""
    tags = getattr(tokenizer, "tags", ())
    if not tags:
        raise UserError(f"tag {tag!r}: this model was trained without tags; train one with data.kind tagged")
    if tag not in tags:
        raise UserError(f"the model has no tag {tag!r}{nearest(tag, tags)}; it has {', '.join(tags)}")
    return tag_mark(tag)


def marked_from_dict(text: Tokenizer, spec: Mapping[str, Any]) -> MarkedTokenizer:
    """Return the tokenizer that `MarkedTokenizer.to_dict` described.

    Args:
        text: the tokenizer of its text.
    """
    picture = PictureFormat(**spec["picture"]) if "picture" in spec else None
    return MarkedTokenizer(text, spec["tags"], picture)
