"""Prompts with tags and pictures, and pictures as files, for models whose vocabulary has tokens for them
(`data.kind: tagged`, `data.kind: interleaved`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.tokenizers import MarkedTokenizer, PictureFormat, Tokenizer, known_tag
from gptjax.tokenizers.marked import PICTURE, PICTURE_END, level_mark

WHITE = 255


def mark_prompts(tokenizer: Tokenizer, prompts: Sequence[str | Path], tag: str | None, draws: bool) -> list[str]:
    """Return prompts as a model reads them: after a tag, and before the mark that begins a picture where it draws.

    Args:
        prompts: texts, and paths of pictures.

    Raises:
        UserError: a tag that the model lacks, a picture that cannot be read or has another size, or no pixels in the
            vocabulary.
    """
    texts = [p if isinstance(p, str) else picture_prompt(tokenizer, read_picture(str(p), tokenizer)) for p in prompts]
    if draws:
        form_of(tokenizer)
    before = "" if tag is None else known_tag(tokenizer, tag)
    return [f"{before}{text}{PICTURE if draws else ''}" for text in texts]


def plain_prompt(tokenizer: Tokenizer, prompt: str) -> str:
    """Return a prompt without the marks that `mark_prompts` added."""
    if not isinstance(tokenizer, MarkedTokenizer):
        return prompt
    return tokenizer.decode(tokenizer.encode_prompt(prompt).tolist())


def form_of(tokenizer: Tokenizer) -> PictureFormat:
    """Return the form of a vocabulary's pictures; raise UserError for one without."""
    if not isinstance(tokenizer, MarkedTokenizer) or tokenizer.picture is None:
        raise UserError("this model has no tokens for pictures; train one with data.kind interleaved")
    return tokenizer.picture


def picture_prompt(tokenizer: Tokenizer, levels: np.ndarray) -> str:
    """Return a picture [height, width] as the text of a prompt."""
    form = form_of(tokenizer)
    assert levels.shape == (form.height, form.width)
    return PICTURE + "".join(map(level_mark, levels.ravel().tolist())) + PICTURE_END


def read_picture(path: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return a file's picture as levels [height, width]: shades of grey, black is level 0.

    Raises:
        UserError: it cannot be read, has another size, or the model has no tokens for pictures.
    """
    form = form_of(tokenizer)
    try:
        with _pillow().open(path) as image:
            grey = np.asarray(image.convert("L"), np.int32)
    except OSError as error:
        raise UserError(f"cannot read the picture {path!r}: {error.strerror or 'no image format is known'}") from None
    if grey.shape != (form.height, form.width):
        raise UserError(
            f"{path!r} has {grey.shape[0]} x {grey.shape[1]} pixels (height x width), and this model reads "
            f"{form.height} x {form.width}; scale it"
        )
    return (grey * (form.levels - 1) + WHITE // 2) // WHITE


def write_pictures(path: str, completions: Iterable[Any], lm: Any) -> None:
    """Write the last picture of each completion, side by side with a line between them, as a PNG.

    Args:
        completions: `generate.Completion`s.
        lm: the model that drew them.

    Raises:
        UserError: none has a whole picture, or the file cannot be written.
    """
    form = form_of(lm.tokenizer)
    found = [lm.tokenizer.pictures_in([*lm.prompt_ids(done.prompt), *done.tokens]) for done in completions]
    pictures = [some[-1] for some in found if some]
    if not pictures:
        raise UserError(f"the model drew no whole picture; give it {form.pixels} new tokens, or a lower temperature")
    line = np.full((form.height, 1), form.levels - 1)
    wide = np.concatenate([part for picture in pictures for part in (line, picture)][1:], axis=1)
    image = _pillow().fromarray((wide * WHITE // max(1, form.levels - 1)).astype(np.uint8))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write --image {path!r}: {error.strerror}") from None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("pictures need the package pillow: pip install 'gptjax[plot]'") from None
    return Image
