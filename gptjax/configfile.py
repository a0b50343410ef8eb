"""Configs from YAML and the command line (through jsonargparse), and back to YAML."""

import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from etils import epath
from jsonargparse import ArgumentError, ArgumentParser

from gptjax.commandline import split_words
from gptjax.config import Config, RopeScaling
from gptjax.errors import UserError, nearest
from gptjax.paths import user_path
from gptjax.presets import PRESETS

# What may differ between the runs that share a directory: it changes how a run is carried out, or how long,
# and never which model comes out of a given step.
FREE_ON_RESUME = (
    *("workdir", "profile", "mesh", "distributed", "log", "checkpoint", "init_from", "train.total_steps"),
    *("train.log_interval_steps", "train.eval_interval_steps", "train.eval_sequences", "data.cache_dir"),
    *("data.prefetch_batches", "data.workers", "data.change_mixture", "model.scan_layers", "model.preset"),
    *("model.attention", "model.remat", "model.remat_names"),
)


# Keys that name a path: `~` is a home directory in them, and elsewhere YAML's null.
PATHS = ("workdir", "init_from", "data.path", "data.tokenizer", "data.cache_dir")


def load_config(args: list[str]) -> Config:
    """The config from a command line: `CONFIG.yaml --model.n_layers 6 ...`.

    Raises:
        UserError: unreadable file, unknown key (the nearest is named), wrong type, values at odds.
    """
    parser = _parser()
    line = split_words(args, CONFIG_OPTIONS, "train.py")
    if line is None:
        parser.print_help()
        raise SystemExit(0)
    if len(line.positionals) != 1:
        found = f"not {' and '.join(map(repr, line.positionals))}" if line.positionals else "and there is none"
        raise UserError(f"give one config file, such as configs/quickstart.yaml, {found}; --help lists every key")
    options = [(key, user_path(value) if key in PATHS else value) for key, value in line.options]
    file = user_path(line.positionals[0])
    values = _where_it_lies(read_yaml(file), file)
    # A preset of the command line must be there before the values that override it.
    presets = [value for key, value in options if key == "model.preset"]
    if presets:
        values["model"] = {**(values.get("model") or {}), "preset": presets[-1]}
    words = line._replace(options=options, positionals=["-"]).words
    config = _parse(parser, lambda: parser.parse_args(words, namespace=parser.parse_object(_fill(values))))
    if config.workdir:
        return config
    return dataclasses.replace(config, workdir=os.path.join("runs", Path(file).stem))


def _where_it_lies(values: dict[str, Any], file: str) -> dict[str, Any]:
    """The values of a run's own config.yaml, with the paths inside the run's directory as they are now.

    The directory may have been moved or copied since the file was written.
    """
    folder, written = os.path.dirname(file) or ".", values.get("workdir")
    if not isinstance(written, str) or not written or not (epath.Path(folder) / "checkpoints").exists():
        return values
    if os.path.abspath(user_path(written)) == os.path.abspath(folder):
        return values
    print(f"note: {file} was written in {written}; its run is taken to be {folder}", file=sys.stderr)

    def moved(value: Any) -> Any:
        inside = isinstance(value, str) and f"{value}/".startswith(f"{written.rstrip('/')}/")
        return folder + value[len(written.rstrip("/")) :] if inside else value

    values = {key: moved(value) if key in PATHS else value for key, value in values.items()}
    data = values.get("data")
    if isinstance(data, dict):
        values["data"] = {key: moved(value) if f"data.{key}" in PATHS else value for key, value in data.items()}
    return values


def config_from_dict(values: dict[str, Any]) -> Config:
    """The config from nested plain values, as YAML gives them; what is not given has its default.

    Raises:
        UserError: as `load_config`.
    """
    parser = _parser()
    return _parse(parser, lambda: parser.parse_object(_fill(values)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping; raises UserError for what is not there or not a mapping."""
    try:
        values = yaml.load(epath.Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read config file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} nests too deep to be a config") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return values


class _StrictLoader(yaml.SafeLoader):
    """YAML without keys that are there twice, of which the last would win; merged ones (`<<`) yield to given ones."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in given]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def config_to_yaml(config: Config) -> str:
    """Every value of the config, as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


# Where the data and the tokenizer lie; a checkpoint knows by its hashes whether they are the same.
PLACES = ("data.path", "data.tokenizer")


def differing_keys(a: Config, b: Config, hashed: bool = False) -> dict[str, tuple[Any, Any]]:
    """The keys, but for FREE_ON_RESUME, in which two configs differ, each with both values.

    The mixture is free where `b` asks for it.

    Args:
        hashed: whether a checkpoint's hashes are compared, too, so that data may lie elsewhere.
    """
    left, right = (_flatten(_plain(dataclasses.asdict(c))) for c in (a, b))
    free = (*FREE_ON_RESUME, *(("data.mixture",) if b.data.change_mixture else ()))
    if hashed:
        free = (*free, *PLACES)
        for values in (left, right):
            values["data.mixture"] = [{**part, "path": None} for part in values["data.mixture"]]
    return {
        key: (left.get(key), right.get(key))
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key) and not any(key == f or key.startswith(f + ".") for f in free)
    }


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        description="Train a GPT, or go on with what the run's directory already holds.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("config_file", metavar="CONFIG.yaml", help="a file such as configs/quickstart.yaml")
    parser.add_class_arguments(Config, None)
    return parser


def _parse(parser: ArgumentParser, read: Callable[[], Any]) -> Config:
    try:
        values = parser.instantiate(read())
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    except RecursionError:
        raise UserError("a value of the config nests too deep, or holds itself") from None
    return _with_user_paths(Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)}))


def _with_user_paths(config: Config) -> Config:
    """The config with its paths as the operating system takes them."""
    top = {key: user_path(getattr(config, key)) for key in ("workdir", "init_from") if getattr(config, key)}
    data = {
        key: user_path(getattr(config.data, key))
        for key in ("path", "tokenizer", "cache_dir")
        if getattr(config.data, key)
    }
    mixture = tuple(dataclasses.replace(source, path=user_path(source.path)) for source in config.data.mixture)
    return dataclasses.replace(config, **top, data=dataclasses.replace(config.data, **data, mixture=mixture))


def _fill(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with its preset's values filled in; raises UserError for keys that no section has."""
    for key, value in values.items():
        _reject_unknown(key, _KEYS)
        if key in _SECTIONS:
            if not isinstance(value, dict):
                raise UserError(f"{key}: {value!r} must be a section of `key: value` lines")
            for inner, given in value.items():
                name = f"{key}.{inner}"
                _reject_unknown(name, _KEYS)
                if given is None and name not in _MAY_BE_NULL:
                    raise UserError(f"{name} is empty; give a value, or leave the key out")
                for last in given if name == "model.rope_scaling" and isinstance(given, dict) else ():
                    _reject_unknown(f"{name}.{last}", _KEYS)
    preset = values.get("model", {}).get("preset")
    if preset is None:
        return {"config_file": "-", **values}
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"model.preset {preset!r} is not known{nearest(str(preset), PRESETS)}")
    return {"config_file": "-", **values, "model": {**PRESETS[preset], **values["model"]}}


_SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING}
_KEYS = [f.name for f in dataclasses.fields(Config)]
_KEYS += [f"{name}.{f.name}" for name, cls in _SECTIONS.items() for f in dataclasses.fields(cls)]
_KEYS += [f"model.rope_scaling.{f.name}" for f in dataclasses.fields(RopeScaling)]
# The options of train.py, each with whether it is a flag.
CONFIG_OPTIONS = dict.fromkeys(_KEYS, False) | {
    f"{name}.{field}": True
    for name, cls in _SECTIONS.items()
    for field, kind in typing.get_type_hints(cls).items()
    if kind is bool
}
_MAY_BE_NULL = {
    f"{name}.{field}"
    for name, cls in _SECTIONS.items()
    for field, kind in typing.get_type_hints(cls).items()
    if type(None) in typing.get_args(kind)
}


def _reject_unknown(key: Any, known: Iterable[str]) -> None:
    if key not in known:
        raise UserError(f"unknown key {key!r}{nearest(str(key), known)}")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
