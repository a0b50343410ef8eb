"""Texts by tag (`data.kind: tagged`): each source of data.mixture is a tag, and its token precedes every window.

A model learns what follows each tag (Keskar et al. 2019, arXiv 1909.05858); `sample.py --genre TAG` writes after one.
"""

from dataclasses import replace

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.shards import Tokens
from gptjax.data.source import Source
from gptjax.errors import UserError
from gptjax.tokenizers import MarkedTokenizer


def with_tag(cfg: DataConfig, path: str, name: str, source: Source) -> Source:
    """Return a source of text whose windows begin with its tag.

    Args:
        path: as data.path.
        name: the tag.
        source: the text.

    Raises:
        UserError: no mixture, a tokenizer of characters, or documents that are packed into rows.
    """
    if not cfg.mixture:
        raise UserError("data.kind tagged needs data.mixture, whose names are the tags; give each tag's texts there")
    if source.tokenizer.kind == "char":
        raise UserError("data.kind tagged needs one tokenizer for all tags; set data.tokenizer to byte, or to a BPE")
    if source.pack_length is not None:
        raise UserError(
            f"data.kind tagged takes running text, and {path} is packed; prepare it without --pack_length"
        )
    tokenizer = MarkedTokenizer(source.tokenizer, [part.label for part in cfg.mixture])
    tag = tokenizer.tag_id(name)
    train, val = (TaggedTokens(half, tag) for half in (source.train, source.val))
    fingerprint = f"{source.fingerprint}-{tag}"
    return replace(source, train=train, val=val, tokenizer=tokenizer, fingerprint=fingerprint, older_fingerprint=None)


class TaggedTokens:
    """One half of a tag's text.

    Args:
        tokens: the ids of the text.
        tag: the id of the tag.
    """

    def __init__(self, tokens: Tokens, tag: int):
        self.tokens, self.tag = tokens, tag

    def __len__(self) -> int:
        return len(self.tokens)

    def examples(self, context_length: int) -> "TaggedWindows":
        """Return adjacent windows; raise UserError where there is not even one."""
        if len(self.tokens) < context_length:
            raise UserError(
                f"a half of a tag's text has {len(self.tokens)} tokens, fewer than one window of {context_length}; "
                "give more text, or a shorter context"
            )
        return TaggedWindows(self, context_length)


class TaggedWindows:
    """Adjacent windows of T tokens, each predicted from the tag and the tokens before it. Those of each epoch begin a
    little later, so that the cuts between them move.
    """

    def __init__(self, half: TaggedTokens, context_length: int):
        self.half, self.context_length = half, context_length
        self.count = max(1, len(half) // context_length - 1)

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        """Return a row: tokens and targets [T] int32, weights [T] float32."""
        T, slack = self.context_length, len(self.half) - self.count * self.context_length
        offset = int(np.random.default_rng(epoch).integers(0, min(T, slack + 1))) if epoch else 0
        targets = self.half.tokens[index * T + offset : (index + 1) * T + offset].astype(np.int32)
        tokens = np.concatenate([[self.half.tag], targets[:-1]]).astype(np.int32)
        return {"tokens": tokens, "targets": targets, "weights": np.ones(T, np.float32)}
