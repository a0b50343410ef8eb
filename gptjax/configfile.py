"""Read configs from YAML and the command line (with jsonargparse), and write them as YAML."""

import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from etils import epath
from jsonargparse import ArgumentError, ArgumentParser

from gptjax.config import Config, RopeScaling, free_keys
from gptjax.configversions import FORMAT, NOW_SECTIONS, RENAMED, current_key, upgrade
from gptjax.errors import UserError, nearest
from gptjax.presets import PRESETS
from gptjax.shell.commandline import split_words, wrong_value
from gptjax.shell.console import one_line
from gptjax.shell.paths import user_path

# Keys whose values are paths: `~` means the home directory there; elsewhere it is YAML's null.
PATHS = ("workdir", "init_from", "follow", "distill.teacher", "data.path", "data.tokenizer", "data.cache_dir")


_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))


def load_config(args: list[str]) -> Config:
    """Return the config of a command line: `CONFIG.yaml --model.n_layers 6 ...`.

    Raises:
        UserError: an unreadable file, an unknown key (the closest one is named), a wrong type, or values that
            contradict each other.
    """
    parser = _parser()
    line = split_words(args, CONFIG_OPTIONS, "train.py")
    if line is None:
        parser.print_help()
        raise SystemExit(0)
    if len(line.positionals) != 1:
        found = f"not {' and '.join(map(repr, line.positionals))}" if line.positionals else "and there is none"
        raise UserError(f"give one config file, such as configs/quickstart.yaml, {found}; --help lists every key")
    options = [(_current(key, value), user_path(value) if key in PATHS else value) for key, value in line.options]
    file = user_path(line.positionals[0])
    values = _follow_moved_run(read_yaml(file), file)
    # A preset given as a flag must be set before the values that override it.
    presets = [value for key, value in options if key == "model.preset"]
    if presets:
        values["model"] = {**(values.get("model") or {}), "preset": presets[-1]}
    values = _fill(values)
    for key, value in (pair for pair in options if _in_optional_section(pair[0])):
        put_value(values, key, parse_option(key, value))
    options = [pair for pair in options if not _in_optional_section(pair[0])]
    words = line._replace(options=options, positionals=["-"]).words
    config = _parse(parser, lambda: parser.parse_args(words, namespace=parser.parse_object(values)))
    if config.workdir:
        return config
    return dataclasses.replace(config, workdir=os.path.join("runs", Path(file).stem))


def _follow_moved_run(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Return the values of a run's own config.yaml, with paths inside the run's directory adapted to where it is now.

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
    """Return the config of nested plain values, as YAML gives them; missing values have their defaults.

    Raises:
        UserError: as in `load_config`.
    """
    parser = _parser()
    return _parse(parser, lambda: parser.parse_object(_fill(values)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping of a YAML file; raise UserError if the file is missing or holds something else."""
    try:
        text = epath.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read config file {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return values


def _parse_yaml(text: str, what: str) -> Any:
    """Return a value of YAML; raise UserError, which names `what`, where it is none or nested too deeply."""
    try:
        return yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{what} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{what} is nested too deeply") from None


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys; keys merged by `<<` may be overridden.

    As in YAML 1.2 and on the command line, 010 is ten, and 1:30 and 2020-01-01 are texts.
    """

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT, _TIMESTAMP)]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in given]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "").lower()
        bases = {"0x": 16, "0b": 2}
        return int(text, bases.get(text.lstrip("+-")[:2], 10))


# PyYAML's own forms without those of base 60, so that what its dumper writes without quotes stays a text.
_INTEGER = r"[-+]?(0b[0-1_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"
_FRACTION = r"([-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
_StrictLoader.add_implicit_resolver(_INT, re.compile(_INTEGER), "-+0123456789")
_StrictLoader.add_implicit_resolver(_FLOAT, re.compile(_FRACTION), "-+0123456789.")
_StrictLoader.add_constructor(_INT, _StrictLoader.construct_yaml_int)


def config_to_yaml(config: Config) -> str:
    """Return every value of the config as YAML, which `load_config` reads back to an equal config."""
    return yaml.safe_dump({"format": FORMAT, **_plain(dataclasses.asdict(config))}, sort_keys=False)


# Paths of data and tokenizer. They may change where a checkpoint's hashes show that the contents are the same.
PLACES = ("data.path", "data.tokenizer")


def differing_keys(a: Config, b: Config, hashed: bool = False) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two configs differ although a resume does not allow it, each with both values.

    The mixture may differ if `b` sets data.change_mixture, or follows a folder that says what the mixture is.

    Args:
        hashed: whether a checkpoint's hashes are compared as well, so that paths of data may differ.
    """
    left, right = (_flatten(_plain(dataclasses.asdict(c))) for c in (a, b))
    free = (*free_keys(Config), *(("data.mixture",) if b.data.change_mixture or b.follow else ()))
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
        description="Train a GPT, or resume the run that its directory already holds.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("config_file", metavar="CONFIG.yaml", help="the config file, such as configs/quickstart.yaml")
    parser.add_class_arguments(Config, None)
    return parser


def _parse(parser: ArgumentParser, read: Callable[[], Any]) -> Config:
    try:
        values = parser.instantiate(read())
    except ArgumentError as error:
        raise UserError(wrong_value(error)) from None
    except RecursionError:
        raise UserError("a value of the config is nested too deeply, or contains itself") from None
    return _with_user_paths(Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)}))


def _with_user_paths(config: Config) -> Config:
    """Return the config with paths that the operating system accepts: `~` expanded."""
    top = {key: user_path(getattr(config, key)) for key in ("workdir", "init_from", "follow") if getattr(config, key)}
    data = {
        key: user_path(getattr(config.data, key))
        for key in ("path", "tokenizer", "cache_dir")
        if getattr(config.data, key)
    }
    mixture = tuple(dataclasses.replace(source, path=user_path(source.path)) for source in config.data.mixture)
    if config.distill.teacher:
        top["distill"] = dataclasses.replace(config.distill, teacher=user_path(config.distill.teacher))
    return dataclasses.replace(config, **top, data=dataclasses.replace(config.data, **data, mixture=mixture))


def _fill(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with old keys renamed and the preset's values filled in.

    Raises:
        UserError: an unknown key, an empty value, or an unknown preset.
    """
    values = upgrade(values)
    _check_keys(values)
    preset = values.get("model", {}).get("preset")
    if preset is None:
        return {"config_file": "-", **values}
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"model.preset {preset!r} is not known{nearest(str(preset), PRESETS)}")
    return {"config_file": "-", **values, "model": _merged(PRESETS[preset], values["model"])}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two nested mappings merged; values of `above` take precedence."""
    both = {
        key: _merged(below[key], above[key]) for key in below if _is_dict(below[key]) and _is_dict(above.get(key))
    }
    return {**below, **above, **both}


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _check_keys(values: dict[str, Any], prefix: str = "") -> None:
    for key, given in values.items():
        name = f"{prefix}{key}" if prefix else key
        _reject_unknown(name, _KEYS)
        if given is None and name not in _MAY_BE_NULL:
            raise UserError(f"{name} is empty; give a value, or leave the key out")
        if name not in _SECTIONS or given is None:
            continue
        if not isinstance(given, dict):
            raise UserError(f"{name}: {given!r} must be a section of `key: value` lines")
        _check_keys(given, f"{name}.")


def _schema(section: type, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield (key, type, whether it is a section) of every key of a config, recursively."""
    for name, kind in typing.get_type_hints(section).items():
        parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        sections = [part for part in parts if dataclasses.is_dataclass(part)]
        yield prefix + name, kind, bool(sections)
        for inner in sections:
            yield from _schema(inner, f"{prefix}{name}.")


_KEYS = [key for key, _, _ in _schema(Config)]
_SECTIONS = {key for key, _, is_section in _schema(Config) if is_section}
_MAY_BE_NULL = {key for key, kind, _ in _schema(Config) if type(None) in typing.get_args(kind)}
# The options of train.py, old names included; true where the value may be omitted (a bool).
CONFIG_OPTIONS = {key: kind is bool for key, kind, _ in _schema(Config)}
CONFIG_OPTIONS |= {old: CONFIG_OPTIONS[new] for old, new in {**NOW_SECTIONS, **RENAMED}.items()}
CONFIG_OPTIONS |= {f"model.rope_scaling.{name}": False for name in typing.get_type_hints(RopeScaling)}


def _current(key: str, value: str) -> str:
    """Return the current name of an option."""
    return current_key(key, plain=not value.startswith("{"))


def _in_optional_section(key: str) -> bool:
    """Return whether a key is in a section that may be null, of which argparse cannot set a single key."""
    section = key.rpartition(".")[0]
    return section in _SECTIONS and section in _MAY_BE_NULL


def parse_option(key: str, text: str) -> Any:
    """Return the value of an option of the command line; raise UserError where it is no YAML."""
    return _parse_yaml(text, f"--{key}={one_line(text, 40)}")


def put_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a key such as `model.mlp.kind` in nested values, which are changed in place."""
    *sections, name = key.split(".")
    for section in sections:
        values[section] = dict(values.get(section) or {})
        values = values[section]
    values[name] = value


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
