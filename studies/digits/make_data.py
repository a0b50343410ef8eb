"""Write scikit-learn's 1,797 digits as documents of a caption and a picture, in both orders (docs/applications.md).

python studies/digits/make_data.py OUT     needs scikit-learn

Every sixth picture is held out, in OUT/held_out.jsonl. Each of the others is there as it is, and moved by one
pixel up, down, left and right, in OUT/train.jsonl.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_EVERY = 6
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pictures [1797, 8, 8] with 16 levels, their digits, and which are held out."""
    found = load_digits()
    levels = np.minimum(found.images.astype(int), 15)  # the 17th level is rare
    return levels, found.target, np.arange(len(levels)) % HELD_OUT_EVERY == 0


def moved(levels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Return a picture moved by at most one pixel; what leaves it is lost."""
    return np.pad(levels, 1)[1 - down : 9 - down, 1 - right : 9 - right]


def documents(levels: np.ndarray, digit: int) -> list[dict]:
    """Return the two documents of a picture: caption first, and picture first."""
    caption, picture = {"text": NAMES[digit]}, {"picture": levels.tolist()}
    return [{"parts": [caption, picture]}, {"parts": [picture, caption]}]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    pictures, targets, held_out = digits()
    with open(out / "train.jsonl", "w") as train, open(out / "held_out.jsonl", "w") as test:
        for levels, digit, held in zip(pictures, targets, held_out, strict=True):
            for move in MOVES[:1] if held else MOVES:
                for document in documents(moved(levels, *move), digit):
                    (test if held else train).write(json.dumps(document) + "\n")
    print(f"{(~held_out).sum():,} pictures to train on, {held_out.sum():,} held out")
