"""Write training documents and test sets from a TSV of reference, English and Spanish (see docs/applications.md).

python studies/translation/make_data.py PAIRS.tsv OUT

Lines whose number, from 1, divides by 29 are the test. Every other pair becomes two documents, one a direction, in
OUT/train.jsonl; OUT/test.en-es.tsv and OUT/test.es-en.tsv hold source and reference.
"""

import json
import sys
from pathlib import Path

TEST_EVERY = 29


def split(path: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the (English, Spanish) pairs for training and for the test."""
    train, test = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        _, english, spanish = line.split("\t")
        (train if number % TEST_EVERY else test).append((english, spanish))
    return train, test


if __name__ == "__main__":
    train, test = split(sys.argv[1])
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "train.jsonl", "w", encoding="utf-8") as file:
        for english, spanish in train:
            for text in (f"en>es: {english}\n{spanish}\n", f"es>en: {spanish}\n{english}\n"):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    for name, pairs in (("en-es", test), ("es-en", [(b, a) for a, b in test])):
        (out / f"test.{name}.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    print(f"{len(train):,} pairs to train on, {len(test):,} to test")
