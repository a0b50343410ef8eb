"""Prepare what a job's container gets from outside: environment variables, volumes, and paths that exist in it."""

import dataclasses
import os
import re
from pathlib import Path, PurePosixPath

from gptjax.apps.launch.clusters import XLA_FLAGS
from gptjax.config import Config
from gptjax.data.sources import DOWNLOADS
from gptjax.errors import UserError
from gptjax.shell.paths import user_path
from gptjax.tokenizers import TIKTOKEN_FILES

CONFIG_FOLDER = "/etc/gptjax"  # where a pod finds the run's config
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
HUB_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"  # of a model, such as gpt2 or openai-community/gpt2
HOME = os.path.expanduser("~")  # of this machine; configs contain it in place of ~
# Values of data.path and data.tokenizer that are not paths.
DATA_NAMES = (*DOWNLOADS, "shakespeare")
TOKENIZER_NAMES = ("byte", "char", *TIKTOKEN_FILES)


def parse_variables(given: list[str] | None) -> dict[str, str]:
    """Return the environment variables of `--env NAME=VALUE`; a value may contain anything.

    Raises:
        UserError: a text that is not NAME=VALUE, a name that no shell accepts, or a name given twice.
    """
    found: dict[str, str] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(VARIABLE, name):
            raise UserError(f"--env {text!r} is not NAME=VALUE; write it as --env HF_HOME=/data/hub")
        if name in found:
            raise UserError(f"--env {name} is given twice; give it once")
        found[name] = value
    return found


def merge_xla_flags(variables: dict[str, str], platform: str) -> dict[str, str]:
    """Return the variables with the platform's compiler flags before the user's own, which win."""
    name, flags = XLA_FLAGS[platform]
    text = " ".join([*flags, *variables.get(name, "").split()])
    return {**({name: text} if text else {}), **{k: v for k, v in variables.items() if k != name}}


def parse_volumes(given: list[str] | None) -> dict[str, str]:
    """Return, for `--volume SOURCE:/PATH`, each path inside the container and the source that is mounted there.

    Raises:
        UserError: a text that is not SOURCE:/PATH, or a path given twice.
    """
    found: dict[str, str] = {}
    for text in given or []:
        source, _, path = text.rpartition(":")
        path = path.rstrip("/")
        if not source or not path.startswith("/") or ".." in path.split("/"):
            raise UserError(f"--volume {text!r} is not SOURCE:/PATH; write it as --volume shared-disk:/data")
        if path in found or path == CONFIG_FOLDER:
            raise UserError(f"--volume {text!r}: something else is mounted at {path}; give another path")
        found[path] = source
    return found


def check_paths(cfg: Config, volumes: dict[str, str]) -> None:
    """Check that a config's inputs exist in a container, and that the run's directory outlives it.

    Args:
        volumes: mount points inside the container.

    Raises:
        UserError: the run's directory is on no volume, or an input is a path of this machine only.
    """
    workdir = cfg.workdir or ""
    if "://" not in workdir and not _is_mounted(workdir, volumes):
        raise UserError(
            f"workdir {workdir} would vanish with the container; give --workdir gs://BUCKET/NAME, or mount a disk "
            "that all hosts share with --volume SOURCE:/PATH and give --workdir /PATH/NAME"
        )
    data = {"data.path": cfg.data.path} if not (cfg.data.mixture or cfg.follow) else {}
    data |= {"follow": cfg.follow} if cfg.follow else {}
    data |= {f"data.mixture {part.label}": part.path for part in cfg.data.mixture}
    inputs = {key: path for key, path in data.items() if path not in DATA_NAMES}
    if cfg.data.tokenizer is not None and cfg.data.tokenizer not in TOKENIZER_NAMES:
        inputs["data.tokenizer"] = cfg.data.tokenizer
    models = {"init_from": cfg.init_from, "distill.teacher": cfg.distill.teacher}
    inputs |= {key: path for key, path in models.items() if path is not None and not _is_on_hub(path)}
    home = user_path("~").rstrip("/") + "/"
    for key, path in inputs.items():
        at_home = path.startswith(home) and not _is_mounted(path, volumes)
        if "://" not in path and (at_home or not path.startswith("/")):
            raise UserError(
                f"{key} {path} is a path on this machine and not in the container; give an absolute path of the "
                "image or of a --volume, or a bucket's address"
            )


def check_model(model: str, volumes: dict[str, str]) -> None:
    """Check that a model exists in a container: on a volume, in a bucket or on the hub.

    Args:
        volumes: mount points inside the container.

    Raises:
        UserError: it is a path of this machine only.
    """
    if "://" not in model and not _is_on_hub(model) and not _is_mounted(model, volumes):
        raise UserError(
            f"model {model} is a path on this machine and not in the container; give --volume CLAIM:/PATH and a path "
            "below it, a bucket's address, or a Hugging Face id"
        )


def prepare_container(
    cfg: Config, env: list[str] | None, volume: list[str] | None
) -> tuple[Config, dict[str, str], dict[str, str]]:
    """Return a run's config as its container needs it, its environment variables, and path -> what is mounted there.

    Args:
        env, volume: as the options of a command gave them.

    Raises:
        UserError: as `parse_variables`, `parse_volumes` and `check_paths`.
    """
    volumes = parse_volumes(volume)
    check_paths(cfg, volumes)
    return for_container(cfg), parse_variables(env), volumes


def for_container(cfg: Config) -> Config:
    """Return the config with a token cache below this machine's home directory moved to the container's."""
    folder = cfg.data.cache_dir
    if not folder.startswith(f"{HOME}/"):
        return cfg
    moved = f"~/{folder.removeprefix(f'{HOME}/')}"
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_dir=moved))


def _is_on_hub(model: str) -> bool:
    return re.fullmatch(HUB_ID, model) is not None and not Path(model).exists()


def _is_mounted(path: str, volumes: dict[str, str]) -> bool:
    parents = {str(parent) for parent in (PurePosixPath(path), *PurePosixPath(path).parents)}
    return ".." not in path.split("/") and not parents.isdisjoint(volumes)
