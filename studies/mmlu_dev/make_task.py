"""Write the 281 development questions of MMLU, which lm-eval's wheel contains, as a task of lm-eval and of gptjax.

python studies/mmlu_dev/make_task.py OUT

OUT/mmlu_dev.jsonl is what `gptjax eval choice` reads, and OUT/mmlu_dev.yaml the same as a task of lm-eval.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import yaml

QUESTION = re.compile(r"(.*?)\n?\(A\)\s*(.*?)\s*\(B\)\s*(.*?)\s*\(C\)\s*(.*?)\s*\(D\)\s*(.*)", re.DOTALL)
ANSWER = re.compile(r"answer is \(?([ABCD])\)?")
TASK = """task: mmlu_dev
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def questions() -> list[dict]:
    """Return every development question with its four choices; one whose answer is not stated is left out."""
    lm_eval = importlib.util.find_spec("lm_eval")
    if lm_eval is None:
        sys.exit("the questions are in lm-eval's wheel: pip install 'gptjax[eval]'")
    folder = Path(lm_eval.submodule_search_locations[0], "tasks", "mmlu", "flan_cot_fewshot")
    found = []
    for file in sorted(folder.glob("mmlu_*.yaml")):
        subject = yaml.safe_load(file.read_text())
        for sample in subject["fewshot_config"]["samples"]:
            parts, answer = QUESTION.fullmatch(sample["question"].strip()), ANSWER.search(sample["target"])
            if parts and answer:
                text, *choices = (part.strip() for part in parts.groups())
                lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
                about = " ".join(subject["description"].split())
                prompt = "\n".join([about, "", text, *lines, "Answer:"])
                found.append({"question": prompt, "choices": list("ABCD"), "answer": "ABCD".index(answer[1])})
    return found


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(question) + "\n" for question in questions())
    (out / "mmlu_dev.jsonl").write_text(lines)
    (out / "mmlu_dev.yaml").write_text(TASK.format(data=(out / "mmlu_dev.jsonl").resolve()))
    print(f"{len(lines.splitlines())} questions; lm-eval: --tasks mmlu_dev --include_path {out}")
