"""The tasks of `gptjax eval` as commands."""

import json as json_format
from collections.abc import Callable
from typing import Any

from gptjax.apps.evaluate.items import Answers, digest, read_text
from gptjax.errors import UserError
from gptjax.process import prepare_process
from gptjax.shell import display
from gptjax.shell.files import write_atomically
from gptjax.shell.paths import UserPath, shell, writing


def choice(
    model: UserPath,
    *,
    data: UserPath,
    abstain_below: float = 0.0,
    out: UserPath | None = None,
    json: bool = False,
) -> None:
    """Choose among given answers: accuracy by log-likelihood, raw and per character, and calibration.

    Args:
        model: the directory of a run, a Hugging Face directory or id, or a .gguf file.
        data: JSON Lines with question (text), choices (texts) and answer (number of the right one, from 0).
        abstain_below: answer "I don't know" where the best choice is less probable than this.
        out: a file that keeps each item's answer; with the same file, an interrupted evaluation resumes.
        json: print one JSON object instead of a table.
    """

    def run(lm: Any, answers: Answers) -> Any:
        from gptjax.apps.evaluate.tasks import choose

        return choose(lm, data, answers, abstain_below)

    _evaluate("choice", model, data, out, json, {"abstain_below": _share(abstain_below)}, run)


def qa(
    model: UserPath,
    *,
    data: UserPath,
    stop: list[str] | None = None,
    max_new_tokens: int = 32,
    abstain_below: float = 0.0,
    out: UserPath | None = None,
    json: bool = False,
) -> None:
    """Answer questions greedily: exact match and F1 with SQuAD's normalisation, and calibration.

    Args:
        model: the directory of a run, a Hugging Face directory or id, or a .gguf file.
        data: JSON Lines with prompt (text) and answers (texts, any of which is right).
        stop: a text before which an answer ends; give it again for several. The default is a line break.
        max_new_tokens: the most tokens of an answer.
        abstain_below: answer "I don't know" where the tokens' mean probability is less than this.
        out: a file that keeps each item's answer; with the same file, an interrupted evaluation resumes.
        json: print one JSON object instead of a table.
    """
    stops = ["\n"] if stop is None else stop

    def run(lm: Any, answers: Answers) -> Any:
        from gptjax.apps.evaluate.tasks import answer

        return answer(lm, data, answers, abstain_below, stops, max_new_tokens)

    options = {"stop": stops, "max_new_tokens": max_new_tokens, "abstain_below": _share(abstain_below)}
    _evaluate("qa", model, data, out, json, options, run)


def translation(
    model: UserPath,
    *,
    data: UserPath,
    prompt: str = "{source}\n",
    tokenize: str = "13a",
    max_new_tokens: int = 200,
    beams: int | None = None,
    length_penalty: float = 1.0,
    out: UserPath | None = None,
    json: bool = False,
) -> None:
    """Translate sentences, greedily or by beam search: chrF and BLEU by sacrebleu.

    Args:
        model: the directory of a run, a Hugging Face directory or id, or a .gguf file.
        data: a TSV file of source and reference.
        prompt: what the model reads, with {source} in place of the sentence. A translation ends at a line break.
        tokenize: sacrebleu's tokenizer for BLEU, such as zh for Chinese references.
        max_new_tokens: the most tokens of a translation.
        beams: search by so many beams instead of greedily.
        length_penalty: with --beams, a text's score is divided by its length to this power; more favours long texts.
        out: a file that keeps each item's answer; with the same file, an interrupted evaluation resumes.
        json: print one JSON object instead of a table.
    """
    if "{source}" not in prompt:
        raise UserError(f"--prompt {prompt!r} has no {{source}}; write it where the sentence belongs")

    def run(lm: Any, answers: Answers) -> Any:
        from gptjax.apps.evaluate.tasks import translate

        how = (tokenize, max_new_tokens, beams, length_penalty)
        return translate(lm, data, answers, lambda source: prompt.replace("{source}", source), *how)

    options = {"prompt": prompt, "max_new_tokens": max_new_tokens, "beams": beams, "length_penalty": length_penalty}
    _evaluate("translation", model, data, out, json, options, run)


def bits(model: UserPath, *, data: UserPath, out: UserPath | None = None, json: bool = False) -> None:
    """Score a text: bits per byte.

    Args:
        model: the directory of a run, a Hugging Face directory or id, or a .gguf file.
        data: a UTF-8 text file.
        out: a file that keeps each window's score; with the same file, an interrupted evaluation resumes.
        json: print one JSON object instead of a table.
    """

    def run(lm: Any, answers: Answers) -> Any:
        from gptjax.apps.evaluate.tasks import bits_per_byte

        return bits_per_byte(lm, data, answers)

    _evaluate("bits", model, data, out, json, {}, run)


def genre(model: UserPath, *, data: UserPath, out: UserPath | None = None, json: bool = False) -> None:
    """Score texts after each of a model's tags: how often the right one gives the lowest loss.

    Args:
        model: the directory of a run with data.kind tagged.
        data: JSON Lines with genre (a tag) and text.
        out: a file that keeps each window's losses; with the same file, an interrupted evaluation resumes.
        json: print one JSON object instead of a table.
    """

    def run(lm: Any, answers: Answers) -> Any:
        from gptjax.apps.evaluate.tasks import genre

        return genre(lm, data, answers)

    _evaluate("genre", model, data, out, json, {}, run)


def memorization(
    model: UserPath,
    *,
    data: UserPath,
    text: UserPath | None = None,
    seed: int = 0,
    out: UserPath | None = None,
    json: bool = False,
) -> None:
    """Measure what a model remembers: canaries' exposure by their repeats, verbatim continuations of training text.

    Args:
        model: the directory of a run, a Hugging Face directory or id, or a .gguf file.
        data: the canaries, which gptjax eval plant-canaries wrote.
        text: training text; its continuations after 8 to 64 tokens are compared with what the model writes.
        seed: of the numbers that canaries are compared with, and of the places in the text.
        out: a file that keeps each canary's exposure; with the same file, an interrupted evaluation resumes.
        json: print one JSON object instead of a table.
    """

    def run(lm: Any, answers: Answers) -> Any:
        from gptjax.apps.evaluate.memorization import memorization

        return memorization(lm, data, text, answers, seed)

    _evaluate("memorization", model, data, out, json, {"seed": seed}, run)


def plant_canaries(
    text: UserPath,
    *,
    out: UserPath,
    canaries: UserPath,
    repeats: list[str] | None = None,
    each: int = 4,
    seed: int = 0,
) -> None:
    """Plant canaries, lines with a random number, in a text to train on.

    Args:
        text: the text.
        out: the text with canaries, to write.
        canaries: the JSON Lines file to write for gptjax eval memorization.
        repeats: how often to plant a canary; give it again for several. The default is 1, 4, 16 and 64.
        each: canaries for every number of repeats.
        seed: of the canaries and their places.
    """
    from gptjax.apps.evaluate.memorization import as_lines, plant

    wanted = ["1", "4", "16", "64"] if repeats is None else repeats
    if not all(n.isdecimal() and int(n) for n in wanted) or each < 1:
        raise UserError(f"repeats {', '.join(wanted)} and each {each} must be whole numbers of at least 1")
    planted, rows = plant(read_text(text), [int(n) for n in wanted], each, seed)
    for path, content in ((out, planted), (canaries, as_lines(rows))):
        with writing(path) as file:
            write_atomically(file, content)
    print(f"{out} has {len(rows)} canaries; after training: gptjax eval memorization RUN --data {shell(canaries)}")


def lm_eval(args: list[str]) -> int:
    """Run lm-eval's own command line, in which `--model gptjax` is known and the default."""
    import os
    import sys

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    prepare_process()
    try:
        from lm_eval.__main__ import cli_evaluate

        import gptjax.apps.evaluate.harness
    except ImportError as error:
        raise UserError(f"tasks of lm-eval need: pip install 'gptjax[eval]' ({error})") from None
    assert gptjax.apps.evaluate.harness.GptjaxLM
    own_model = any(word.partition("=")[0] in ("--model", "-M") for word in args)
    runs = bool(args) and args[0] not in ("ls", "validate", "-h", "--help")
    sys.argv = ["lm-eval", *args, *(["--model", "gptjax"] if runs and not own_model else [])]
    cli_evaluate()
    return 0


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"abstain_below {value} must lie in [0, 1]")
    return value


def _evaluate(
    task: str,
    model: str,
    data: str,
    out: str | None,
    json: bool,
    options: dict[str, Any],
    run: Callable[[Any, Answers], Any],
) -> None:
    """Load the model, run the task, and print its figures."""
    read_text(data)
    answers = Answers(out, {"task": task, "model": str(model), "data": digest(data), **options})
    prepare_process()
    from gptjax.convert import load

    figures = run(load(model), answers)
    if json:
        values = {name: {"value": f.value, "stderr": f.stderr} for name, f in figures.items()}
        print(json_format.dumps({"task": task, "model": str(model), "items": len(answers.rows), **values}))
        return
    rows = [
        [name, f"{f.value:.4f}", display.MISSING if f.stderr is None else f"± {f.stderr:.4f}"]
        for name, f in figures.items()
    ]
    print("\n".join(display.table(rows, [f"{task}, {len(answers.rows)} items", "value", "stderr"])))


VERBS: dict[str, Callable[..., None]] = {
    "choice": choice,
    "qa": qa,
    "translation": translation,
    "bits": bits,
    "genre": genre,
    "memorization": memorization,
    "plant-canaries": plant_canaries,
}
