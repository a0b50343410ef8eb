"""The command line. Each command parses its arguments, prepares the process, and only then imports JAX."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser

from gptjax.apps.sample.commands import sample_from
from gptjax.checks import check
from gptjax.configfile import CONFIG_OPTIONS, load_config
from gptjax.errors import UserError, nearest
from gptjax.process import prepare_process
from gptjax.shell.commandline import split_words, wrong_value
from gptjax.shell.console import continue_without_output, report_user_errors
from gptjax.shell.environment import describe_versions
from gptjax.shell.paths import UserPath, shell, user_path

TEXTS = (str, str | None, UserPath, UserPath | None, list[str] | None)  # parameters that are taken as typed


@report_user_errors
def train(args: list[str]) -> int:
    """train a model, or resume the run that its directory holds"""
    cfg = load_config(args)
    continue_without_output()
    prepare_process(cfg.mesh.cpu_devices, cfg.distributed)
    from gptjax.lifecycle.following import train_and_follow
    from gptjax.lifecycle.goodput import note_process_is_run
    from gptjax.trainer import train

    note_process_is_run()
    return train(cfg) if cfg.follow is None else train_and_follow(cfg)


@report_user_errors
def sample(args: list[str]) -> int:
    """generate text from a trained model"""
    return _call(sample_from, "sample.py", args)


def _call(function: Callable[..., None], name: str, args: list[str]) -> int:
    """Call a function with the arguments of a command line, which its signature and docstring describe.

    A parameter `flags` receives the options that are keys of a config, as train.py takes them.

    Raises:
        UserError: arguments that the function does not take.
    """
    every = inspect.signature(function).parameters
    parameters = [p for p in every.values() if p.name != "flags"]
    parser, positionals = _make_parser(function, parameters, name)
    own = {p.name: p.annotation is bool for p in parameters if p.name not in positionals}
    line = split_words(args, {**(CONFIG_OPTIONS if "flags" in every else {}), **own}, name)
    if line is None:
        parser.print_help()
        return 0
    texts = {p.name for p in parameters if p.annotation in TEXTS}
    # The parser drops a value of two dashes: it sees an empty text in place of each.
    options = [(key, "" if key in texts else value) for key, value in line.options if key in own]
    try:
        values = vars(parser.instantiate(parser.parse_args(line._replace(options=options).words)))
    except (ArgumentError, RecursionError) as error:
        raise UserError(f"{wrong_value(error)}; {name} --help says more") from None
    for parameter in parameters:
        given = [value for key, value in line.options if key == parameter.name]
        if given and parameter.name in texts:
            values[parameter.name] = given if parameter.annotation == list[str] | None else given[-1]
        value = values[parameter.name]
        if parameter.annotation == list[UserPath]:
            values[parameter.name] = [user_path(path) for path in value]
        elif parameter.annotation in (UserPath, UserPath | None) and value is not None:
            values[parameter.name] = user_path(value)
    if isinstance(seed := values.get("seed"), int):
        check(0 <= seed < 2**32, "seed", seed, "must lie in [0, 2^32)")
    if "flags" in every:
        values["flags"] = [f"--{option}={value}" for option, value in line.options if option not in own]
    function(**values)
    return 0


def _make_parser(
    function: Callable[..., None], parameters: list[inspect.Parameter], program: str
) -> tuple[ArgumentParser, list[str]]:
    """Return a parser for a function's parameters, and the names of those that are positional.

    A text is taken as it is typed: `null` and `~` are texts. Parameters without a default are positional, unless one
    of them takes a list, which is then the only positional one.
    """
    described = docstring_parser.parse(function.__doc__ or "")
    about = {parameter.arg_name: parameter.description for parameter in described.params}
    parser = ArgumentParser(
        prog=program, description=described.short_description, exit_on_error=False, allow_abbrev=False
    )
    lists = [p.name for p in parameters if p.annotation in (list[str], list[UserPath])]
    alone = lists or [p.name for p in parameters if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    for parameter in parameters:
        name, kind = parameter.name, parameter.annotation
        text = kind in TEXTS or name in lists
        options: dict[str, Any] = {"type": str if text else kind, "help": about.get(name)}
        if name in lists:
            parser.add_argument(name, nargs="+", **options)
        elif name in alone:
            parser.add_argument(name, **options)
        elif kind == list[str] | None:
            parser.add_argument(f"--{name}", action="append", **options)
        elif parameter.default is parameter.empty:
            parser.add_argument(f"--{name}", required=True, **options)
        else:
            parser.add_argument(f"--{name}", default=parameter.default, **options)
    return parser, alone


def from_hf(model: UserPath, *, out: UserPath, base: UserPath | None = None) -> None:
    """Convert a Hugging Face model, a GGUF file or a PEFT adapter into a run, which sample.py and train.py read.

    Args:
        model: a Hugging Face or PEFT directory, a .gguf file, or a Hugging Face id such as gpt2.
        out: directory of the new run; it must not exist or be empty.
        base: of an adapter, the model that it belongs to; the default is the one that its adapter_config.json names.
    """
    prepare_process()
    from gptjax.convert import import_model

    import_model(model, out, base)
    training = shell("train.py", f"{out}/config.yaml", "--workdir", "NEW")
    print(f"{shell('python', 'sample.py', out)} --prompt '...'    samples; {training} trains on")


def to_hf(
    run: UserPath, *, out: UserPath, dtype: Literal["float32", "bfloat16"] = "float32", merged: bool = False
) -> None:
    """Export a run's model as a Hugging Face directory with its tokenizer and a model card, or its adapter for PEFT.

    Args:
        run: the directory of a run.
        out: directory to write; it must not exist or be empty.
        dtype: data type of the exported weights; bfloat16 halves the file. An adapter is always float32.
        merged: of a run with adapters, write the whole model with them merged in, and not the adapter alone.
    """
    prepare_process()
    from gptjax.convert import export_adapter, export_model

    if not merged and (base := export_adapter(run, out)) is not None:
        print(f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {out!r}) loads it")
        return
    export_model(run, out, dtype)
    print(f"AutoModelForCausalLM.from_pretrained({out!r}) loads it; {out}/README.md is its model card")


def to_gguf(run: UserPath, *, out: UserPath, type: Literal["f16", "q8_0"] = "f16") -> None:
    """Write a run's model as a GGUF file, which llama.cpp and what is built on it run; with tokenizer and template.

    Args:
        run: the directory of a run, or of a Hugging Face model, in the form of GPT-2, Llama, Qwen 2 or Qwen 3.
        out: file to write, such as model.gguf.
        type: of the matrices: 16 bits, or 8 bits with a scale for every 32 values.
    """
    prepare_process()
    from gptjax.convert.gguf_export import export_gguf

    export_gguf(run, out, type)
    print(f"{shell('llama-cli', '-m', out)} runs it")


def print_config(config_json: UserPath) -> None:
    """Print the section model of a config file for a config.json, so that its shape can be planned or trained.

    Args:
        config_json: a Hugging Face config.json, or the folder that has one; its weights are not read.
    """
    from gptjax.convert.configs import model_section

    print(model_section(config_json), end="")


CONVERSIONS: dict[str, Callable[..., None]] = {
    "from-hf": from_hf,
    "to-hf": to_hf,
    "to-gguf": to_gguf,
    "config": print_config,
}


@report_user_errors
def convert(args: list[str]) -> int:
    """convert models from and to Hugging Face and GGUF"""
    name = _choose("gptjax convert", _about(CONVERSIONS), args)
    return 0 if name is None else _call(CONVERSIONS[name], f"gptjax convert {name}", args[1:])


# Command -> module that defines it, imported on demand, and its description.
DATA_COMMANDS = {
    "prepare": ("prepare", "tokenize text into shards that training reads"),
    "inspect": ("inspect", "describe a prepared folder"),
    "scrub": ("scrub", "replace personal data and keys"),
    "train-tokenizer": ("vocabulary", "learn a byte-level BPE from text"),
}


@report_user_errors
def data(args: list[str]) -> int:
    """prepare and inspect corpora, train tokenizers"""
    name = _choose("gptjax data", {command: about for command, (_, about) in DATA_COMMANDS.items()}, args)
    if name is None:
        return 0
    module = importlib.import_module(f"gptjax.apps.data_prep.{DATA_COMMANDS[name][0]}")
    return _call(getattr(module, name.replace("-", "_")), f"gptjax data {name}", args[1:])


@report_user_errors
def scaling(args: list[str]) -> int:
    """plan, run and fit scaling studies"""
    from gptjax.apps.scaling.commands import VERBS as STUDIES
    from gptjax.apps.scaling.predict.commands import (
        VERBS as LAWS,  # first: it settles BLAS's threads before numpy is loaded
    )

    verbs = {**STUDIES, **LAWS}
    name = _choose("gptjax scaling", _about(verbs), args)
    return 0 if name is None else _call(verbs[name], f"gptjax scaling {name}", args[1:])


@report_user_errors
def bench(args: list[str]) -> int:
    """measure speed, memory and start-up, also against PyTorch"""
    from gptjax.apps.bench.commands import VERBS

    name = _choose("gptjax bench", _about(VERBS), args)
    return 0 if name is None else _call(VERBS[name], f"gptjax bench {name}", args[1:])


@report_user_errors
def evaluate(args: list[str]) -> int:
    """measure a model: choices, answers, translation, bits per byte, and tasks of lm-eval"""
    from gptjax.apps.evaluate.commands import VERBS, lm_eval

    about = {**_about(VERBS), "lm-eval": "run tasks of lm-eval, by its own options"}
    name = _choose("gptjax eval", about, args)
    if name == "lm-eval":
        return lm_eval(args[1:])
    return 0 if name is None else _call(VERBS[name], f"gptjax eval {name}", args[1:])


@report_user_errors
def inspect_model(args: list[str]) -> int:
    """look inside a model at a prompt: probabilities, attention, logit lens, attribution, patching"""
    from gptjax.apps.inspection.commands import inspect as look

    return _call(look, "gptjax inspect", args)


@report_user_errors
def plan(args: list[str]) -> int:
    """predict memory, speed and cost of a run on given chips, without the chips"""
    from gptjax.apps.plan.commands import plan

    return _call(plan, "gptjax plan", args)


@report_user_errors
def launch(args: list[str]) -> int:
    """start a run on a cluster: Slurm, Kubernetes (GKE) or TPU VMs"""
    from gptjax.apps.launch.commands import VERBS

    name = _choose("gptjax launch", _about(VERBS), args)
    return 0 if name is None else _call(VERBS[name], f"gptjax launch {name}", args[1:])


@report_user_errors
def report(args: list[str]) -> int:
    """write an HTML page about a run"""
    from gptjax.apps.report.commands import report

    return _call(report, "gptjax report", args)


@report_user_errors
def compare(args: list[str]) -> int:
    """compare runs: losses, differences of configs, final figures by seed"""
    from gptjax.apps.report.commands import compare

    return _call(compare, "gptjax compare", args)


@report_user_errors
def chat(args: list[str]) -> int:
    """talk with a model in the terminal"""
    from gptjax.apps.chat.commands import chat

    return _call(chat, "gptjax chat", args)


@report_user_errors
def serve(args: list[str]) -> int:
    """serve a model over HTTP, in the form of OpenAI's API"""
    from gptjax.apps.serve.commands import serve

    return _call(serve, "gptjax serve", args)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "sample": sample,
    "chat": chat,
    "serve": serve,
    "convert": convert,
    "data": data,
    "scaling": scaling,
    "bench": bench,
    "eval": evaluate,
    "inspect": inspect_model,
    "plan": plan,
    "launch": launch,
    "report": report,
    "compare": compare,
}


@report_user_errors
def main() -> int:
    """Run the console command `gptjax`."""
    if sys.argv[1:] == ["--version"]:
        print(describe_versions())
        return 0
    name = _choose("gptjax", _about(COMMANDS), sys.argv[1:])
    return 0 if name is None else COMMANDS[name](sys.argv[2:])


def _about(commands: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Return each command's description, the first line of its docstring, which `python -OO` removes."""
    return {name: (function.__doc__ or "").partition("\n")[0] for name, function in commands.items()}


def _choose(program: str, commands: Mapping[str, str], args: list[str]) -> str | None:
    """Return the command that the arguments name; or None, after printing the help that they ask for.

    Args:
        commands: description by command.

    Raises:
        UserError: there is no such command.
    """
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(f"usage: {program} COMMAND ...   ({program} COMMAND --help says more)\n")
        for command, about in commands.items():
            print(f"  {command:16}{about}")
        return None
    if name not in commands:
        raise UserError(f"unknown command {name!r}{nearest(name, commands)}; there are: {', '.join(commands)}")
    return name
