"""The command sample.py: prompts in, texts or pictures out."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptjax.checks import check
from gptjax.errors import UserError
from gptjax.process import prepare_process
from gptjax.shell.commandline import mesh_axes, read_standard_input
from gptjax.shell.console import writes_unicode
from gptjax.shell.paths import UserPath, user_path

NGRAM = "ngram"  # the draft that repeats what the text itself has


class How(NamedTuple):
    """How texts are generated; the names are those of the command's flags.

    Attributes:
        sampling: temperature, top_k, top_p, min_p.
        form: stop, max_lines, regex.
    """

    num_samples: int
    max_new_tokens: int
    sampling: tuple[Any, ...]
    seed: int
    beams: int | None
    length_penalty: float
    form: tuple[Any, ...]
    draft: str | None

    @property
    def has_form(self) -> bool:
        """Whether the text's form is given."""
        return any(value is not None for value in self.form)

    def check(self) -> "How":
        """Return it; raises UserError for what is out of range or excludes one another."""
        n, beams = self.num_samples, self.beams
        check(n >= 1, "num_samples", n, "must be at least 1")
        if beams is not None and self.draft is not None:
            raise UserError("--beams and --draft exclude each other; leave one out")
        if self.has_form and (beams is not None or self.draft is not None):
            other = "--beams" if beams is not None else "--draft"
            raise UserError(f"--stop, --max_lines and --regex do not go with {other}; leave it out")
        if beams is not None and n > beams:
            raise UserError(
                f"num_samples {n} exceeds beams {beams}; beam search finds at most as many texts as beams"
            )
        return self


def sample_from(
    model: UserPath,
    prompt: str | None = None,
    prompt_file: UserPath | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    beams: int | None = None,
    length_penalty: float = 1.0,
    stop: str | None = None,
    max_lines: int | None = None,
    regex: str | None = None,
    genre: str | None = None,
    image: UserPath | None = None,
    draft: str | None = None,
    seed: int = 1337,
    format: Literal["text", "jsonl"] = "text",
    logprobs: bool = False,
    dtype: Literal["float32", "bfloat16", "int8"] | None = None,
    mesh: str | None = None,
    cpu_devices: int | None = None,
) -> None:
    """Generate text from a trained model.

    Args:
        model: the directory of a run, a Hugging Face directory, a .gguf file, or a Hugging Face id such as gpt2.
        prompt: the text to continue; - reads it from standard input. The default is an empty prompt.
        prompt_file: a file with one prompt per line, or a picture (.png) to caption, in place of --prompt.
        num_samples: number of samples for each prompt.
        max_new_tokens: number of tokens to generate; beyond the model's context, a sliding window is used.
        temperature: 0 always takes the most probable token; 1 samples from the model's probabilities; lower is safer.
        top_k: sample from the k most probable tokens only.
        top_p: sample from the smallest set of tokens whose total probability is at least p.
        min_p: sample from the tokens that are at least p times as probable as the most probable one.
        beams: search for the most probable text with so many beams, instead of sampling.
        length_penalty: with --beams, a text's score is divided by its length to this power; more favours long texts.
        stop: end the text before this string.
        max_lines: end the text after so many lines.
        regex: write a text that matches this regular expression as a whole, such as "(yes|no)".
        genre: write in the manner of this tag, for a model that was trained with tags (data.kind tagged).
        image: draw a picture after each prompt, and write them to this .png file (data.kind interleaved).
        draft: a smaller model that proposes tokens, or ngram for repetitions; the text stays the same.
        seed: seed of the random numbers; the same seed gives the same text.
        format: text, or jsonl: one JSON object per line with prompt, text and tokens, for programs.
        logprobs: also report the natural log of each token's probability.
        dtype: data type of the weights; bfloat16 takes half the memory, int8 a quarter. By default as in training.
        mesh: shard the model over several devices, such as fsdp=4,tensor=2, if it does not fit on one.
        cpu_devices: number of virtual CPU devices, to try a mesh without its hardware.
    """
    sampling, form = (temperature, top_k, top_p, min_p), (stop, max_lines, regex)
    how = How(num_samples, max_new_tokens, sampling, seed, beams, length_penalty, form, draft).check()
    texts = _prompts(prompt, prompt_file)
    prepare_process(cpu_devices)
    lm = _load(model, dtype, mesh)
    streams = format == "text" and not logprobs and image is None and sys.stdout.isatty()
    found = _generate(lm, _mark(lm, texts, genre, image), how, _load_draft(draft, dtype, mesh), streams)
    _print_completions(lm, found, format, logprobs, image)


def _load(model: str, dtype: Any, mesh: str | None) -> Any:
    from gptjax.convert import load

    return load(model, dtype, mesh_axes(mesh))


def _mark(lm: Any, texts: list[str | Path], genre: str | None, image: str | None) -> list[str]:
    """Return prompts with the marks that the model was trained with."""
    from gptjax.decoding.marks import mark_prompts

    return mark_prompts(lm.tokenizer, texts, genre, image is not None)


def _load_draft(draft: str | None, dtype: Any, mesh: str | None) -> Any:
    """Return the model that proposes tokens; NGRAM and None stay what they are."""
    return draft if draft in (None, NGRAM) else _load(user_path(draft), dtype, mesh)


def _generate(lm: Any, prompts: list[str], how: How, draft: Any, streams: bool) -> list[Any]:
    """Return the texts of each prompt; one alone is printed as it is drawn where `streams`, and not returned."""
    from gptjax.decoding.marks import plain_prompt
    from gptjax.generate import Sampling

    if how.beams is not None:
        return _by_beams(lm, prompts, how)
    sampling = Sampling(*how.sampling).check()
    _note_a_sliding_window(lm, prompts, how.max_new_tokens)
    asked = [p for p in prompts for _ in range(how.num_samples)], how.max_new_tokens, sampling, how.seed
    if draft is not None:
        return _by_draft(lm, draft, *asked)
    if how.has_form:
        return _in_form(lm, how.form, *asked)
    if streams and len(asked[0]) == 1:
        _stream(plain_prompt(lm.tokenizer, prompts[0]), lm.stream_text(prompts[0], *asked[1:]))
        return []
    return lm.complete(*asked)


def _by_beams(lm: Any, prompts: list[str], how: How) -> list[Any]:
    """Return each prompt's best continuations by beam search."""
    from gptjax.decoding.beam import BeamSearch

    found = BeamSearch(lm, how.beams, how.length_penalty).complete(prompts, how.max_new_tokens)
    return [beam.completion for row in found for beam in row[: how.num_samples]]


def _by_draft(lm: Any, draft: Any, prompts: list[str], new_tokens: int, sampling: Any, seed: int) -> list[Any]:
    """Return each prompt's continuation with the help of a draft model, or of n-grams."""
    from gptjax.decoding.speculative import ModelDraft, NgramDraft, SpeculativeDecoder

    decoder = SpeculativeDecoder(lm, NgramDraft() if draft == NGRAM else ModelDraft(draft))
    completions = decoder.complete(prompts, new_tokens, sampling, seed)
    if decoder.steps:
        rate = decoder.drawn / decoder.steps
        print(f"note: {rate:.2f} tokens for each step of the model, with the draft's help", file=sys.stderr)
    return completions


def _in_form(lm: Any, form: tuple[Any, ...], prompts: list[str], new_tokens: int, sampling: Any, seed: int) -> list:
    """Return each prompt's continuation in the form that was asked for (see `forms.Form`)."""
    from gptjax.decoding.forms import Form, FormDecoder

    decoder = FormDecoder(lm, Form(*form))
    completions = decoder.complete(prompts, new_tokens, sampling, seed)
    if decoder.incomplete:
        said = f"{decoder.incomplete} of {len(prompts)} texts do not match --regex yet; raise --max_new_tokens"
        print(f"note: {said}", file=sys.stderr)
    return completions


def _print_completions(lm: Any, completions: list[Any], format: str, logprobs: bool, image: str | None) -> None:
    """Print completions: texts with a line between them, or a JSON object each; write their pictures to a file."""
    from gptjax.decoding.marks import plain_prompt, write_pictures

    if image is not None:
        write_pictures(image, completions, lm)
    for number, done in enumerate(completions):
        if format == "jsonl":
            row = {"prompt": done.prompt, "text": done.text, "tokens": done.tokens}
            row |= {"logprobs": done.logprobs} if logprobs else {}
            print(json.dumps(row, ensure_ascii=not writes_unicode()))
            continue
        print(("" if number == 0 else "-" * 16 + "\n") + plain_prompt(lm.tokenizer, done.prompt) + done.text)
        if logprobs:
            _print_logprobs([lm.tokenizer.decode([token]) for token in done.tokens], done.logprobs)


def _note_a_sliding_window(lm: Any, prompts: list[str], new_tokens: int) -> None:
    """Print a note if the longest sample exceeds the model's context."""
    longest = max(len(lm.tokenizer.encode_prompt(p)) for p in prompts)
    if longest + new_tokens > lm.config.context_length:
        note = f"note: {longest} + {new_tokens} tokens exceed the context of {lm.config.context_length}"
        print(f"{note}; a sliding window is used beyond it", file=sys.stderr)


def _stream(prompt: str, pieces: Iterable[str]) -> None:
    """Print a prompt and its continuation, piece by piece as it is generated."""
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _print_logprobs(tokens: list[str], logprobs: list[float]) -> None:
    """Print each token with the natural log of its probability, one per line."""
    for token, value in zip(tokens, logprobs, strict=True):
        print(f"{token!r}\t{value:.4f}")


def _prompts(prompt: str | None, prompt_file: str | None) -> list[str | Path]:
    """Return the prompts that were given: texts, or the path of a picture."""
    if prompt is not None and prompt_file is not None:
        raise UserError("give --prompt or --prompt_file, not both")
    if prompt_file is not None and prompt_file.lower().endswith(".png"):
        return [Path(prompt_file)]
    if prompt_file is not None:
        try:
            lines = Path(prompt_file).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        except OSError as error:
            raise UserError(f"cannot read --prompt_file {prompt_file!r}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--prompt_file {prompt_file!r} is not UTF-8") from None
        if lines == [""]:
            raise UserError(f"--prompt_file {prompt_file!r} is empty; write one prompt a line")
        return lines
    return [read_standard_input()] if prompt == "-" else [prompt or ""]
