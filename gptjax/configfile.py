"""Configs from YAML and the command line (through jsonargparse), and back to YAML."""

import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from etils import epath
from jsonargparse import ArgumentError, ArgumentParser

from gptjax.commandline import split_words
from gptjax.config import Config, RopeScaling, free_keys
from gptjax.configversions import FORMAT, NOW_SECTIONS, RENAMED, current_key, upgrade
from gptjax.errors import UserError, nearest
from gptjax.paths import user_path
from gptjax.presets import PRESETS

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
    options = [(_current(key, value), user_path(value) if key in PATHS else value) for key, value in line.options]
    file = user_path(line.positionals[0])
    values = _where_it_lies(read_yaml(file), file)
    # A preset of the command line must be there before the values that override it.
    presets = [value for key, value in options if key == "model.preset"]
    if presets:
        values["model"] = {**(values.get("model") or {}), "preset": presets[-1]}
    values = _fill(values)
    for key, value in (pair for pair in options if _in_optional_section(pair[0])):
        _put_option(values, key, value)
    options = [pair for pair in options if not _in_optional_section(pair[0])]
    words = line._replace(options=options, positionals=["-"]).words
    config = _parse(parser, lambda: parser.parse_args(words, namespace=parser.parse_object(values)))
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
    return yaml.safe_dump({"format": FORMAT, **_plain(dataclasses.asdict(config))}, sort_keys=False)


# Where the data and the tokenizer lie; a checkpoint knows by its hashes whether they are the same.
PLACES = ("data.path", "data.tokenizer")


def differing_keys(a: Config, b: Config, hashed: bool = False) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two configs differ and may not on resume, each with both values.

    The mixture is free where `b` asks for it.

    Args:
        hashed: whether a checkpoint's hashes are compared, too, so that data may lie elsewhere.
    """
    left, right = (_flatten(_plain(dataclasses.asdict(c))) for c in (a, b))
    free = (*free_keys(Config), *(("data.mixture",) if b.data.change_mixture else ()))
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
    """Return `values` with today's keys and the preset's values filled in.

    Raises:
        UserError: a key that no section has, an empty value, or an unknown preset.
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
    """Return nested values in which those of `above` win."""
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
    """Yield (key, type, whether it is a section) of every value of a config, those of sections included."""
    for name, kind in typing.get_type_hints(section).items():
        parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        sections = [part for part in parts if dataclasses.is_dataclass(part)]
        yield prefix + name, kind, bool(sections)
        for inner in sections:
            yield from _schema(inner, f"{prefix}{name}.")


_KEYS = [key for key, _, _ in _schema(Config)]
_SECTIONS = {key for key, _, is_section in _schema(Config) if is_section}
_MAY_BE_NULL = {key for key, kind, _ in _schema(Config) if type(None) in typing.get_args(kind)}
# The options of train.py, old names included, each with whether it is a flag.
CONFIG_OPTIONS = {key: kind is bool for key, kind, _ in _schema(Config)}
CONFIG_OPTIONS |= {old: CONFIG_OPTIONS[new] for old, new in {**NOW_SECTIONS, **RENAMED}.items()}
CONFIG_OPTIONS |= {f"model.rope_scaling.{name}": False for name in typing.get_type_hints(RopeScaling)}


def _current(key: str, value: str) -> str:
    """Return today's name of an option."""
    return current_key(key, plain=not value.startswith("{"))


def _in_optional_section(key: str) -> bool:
    """Return whether a key lies in a section that may be null; argparse cannot change a part of one."""
    section = key.rpartition(".")[0]
    return section in _SECTIONS and section in _MAY_BE_NULL


def _put_option(values: dict[str, Any], key: str, text: str) -> None:
    """Set a value of the command line in nested values."""
    *sections, name = key.split(".")
    for section in sections:
        values[section] = dict(values.get(section) or {})
        values = values[section]
    values[name] = yaml.load(text, _StrictLoader)


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
