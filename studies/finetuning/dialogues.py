"""Write the English dialogues of the package chatterbot-corpus as conversations, and pairs of a rule as preferences.

pip install --no-deps chatterbot-corpus==1.3.3 (BSD); then
python studies/finetuning/dialogues.py data/chats.jsonl
python studies/finetuning/dialogues.py data/repeats.jsonl --repeats
python studies/finetuning/dialogues.py data/pairs.jsonl --pairs
"""

import argparse
import importlib.util
import json
import random
from pathlib import Path

import yaml

PAIRS = 330  # 300 to train on and 30 held out, by data.val_frac 0.0909


def dialogues() -> tuple[list[list[str]], list[list[str]]]:
    """Return the English conversations, each once, and those that repeat one of them; each as what was said in turn.

    Of the package's 2,025, 898 differ: ten questions about technical support stand there 1,050 times. Where each is
    kept once, no conversation that is held out is also trained on.
    """
    package = Path(importlib.util.find_spec("chatterbot_corpus").origin).parent
    files = sorted((package / "data" / "english").glob("*.yml"))
    found = [said for file in files for said in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]]
    whole = [said for said in found if isinstance(said, list) and len(said) > 1 and all(said)]  # one is a mere text
    seen: set[tuple[str, ...]] = set()
    once, repeats = [], []
    for said in (tuple(map(str, texts)) for texts in whole):
        (repeats if said in seen else once).append(list(said))
        seen.add(said)
    return once, repeats


def as_messages(said: list[str]) -> dict:
    """Return a dialogue as one row: the user speaks first, and a last question without answer is left out."""
    roles = ("user", "assistant")
    turns = said[: len(said) // 2 * 2]
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def as_pair(said: list[str], rng: random.Random) -> dict:
    """Return a row in which the shorter and polite answer is the chosen one."""
    question, answer = said[:2]
    padding = rng.choice(["Listen,", "Obviously,", "Everybody knows it:", "What a question."])
    ending = rng.choice(["Go away now.", "Do not ask me again.", "That is all you get.", "You should know."])
    return {"prompt": question, "chosen": f"Thank you. {answer}", "rejected": f"{padding} {answer} {ending}"}


def main() -> None:
    """Write one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--pairs", action="store_true", help="write prompt, chosen and rejected")
    parser.add_argument("--repeats", action="store_true", help="write the conversations that repeat another")
    args = parser.parse_args()
    rng, (once, repeats) = random.Random(0), dialogues()
    rows = [as_messages(said) for said in (repeats if args.repeats else once)]
    if args.pairs:
        rows = [as_pair(said, rng) for said in rng.sample(once, PAIRS)]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
