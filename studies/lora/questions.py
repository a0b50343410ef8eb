"""Write the first 240 question-answer pairs about technical support of the package chatterbot-corpus as JSONL.

pip install --no-deps chatterbot-corpus==1.3.3 (BSD); then: python studies/lora/questions.py data/tech_support.jsonl
"""

import importlib.util
import json
import sys
from pathlib import Path

import yaml

PAIRS = 240  # 200 to train on, 40 held out


def main(out: str) -> None:
    """Write one object a line: `prompt`, `response`, and both as the field `text`."""
    package = Path(importlib.util.find_spec("chatterbot_corpus").origin).parent
    corpus = yaml.safe_load((package / "data/english/tech_support.yml").read_text(encoding="utf-8"))
    rows = []
    for question, answer in corpus["conversations"][:PAIRS]:
        rows.append({"prompt": question, "response": answer, "text": f"Question: {question}\nAnswer: {answer}\n"})
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
