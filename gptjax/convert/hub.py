"""Find the folder of a model: a path, or an id of the Hugging Face hub, from its local cache or by a download."""

import importlib.util
import os
import re
from pathlib import Path

from gptjax.convert.safetensors import has_weights
from gptjax.errors import UserError
from gptjax.shell.paths import user_path

# Files to download: weights, config and tokenizer, never a pickle; and files to skip: those in subfolders, and the
# second copy of the weights in their maker's format.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
LEFT_OUT = ["*/*", "consolidated*"]
# Renamed ids: the cache may have them under either name.
MOVED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def find_model(path_or_id: str) -> Path:
    """Return the file or folder of a model.

    Raises:
        UserError: it is neither here nor in the cache, and cannot be downloaded.
    """
    path = Path(user_path(path_or_id))
    if path.exists() or not _is_id(path_or_id):
        return path
    return _cached(path_or_id) or _download(path_or_id)


def _is_id(name: str) -> bool:
    """Return whether a name is an id of the hub, `org/name` or a name without a slash, and not a path into an
    existing folder.
    """
    owner, slash, _ = name.partition("/")
    return bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name)) and not (slash and Path(owner).is_dir())


def cache_folder() -> Path:
    """Return where huggingface_hub keeps models, by its own rules."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _cached(name: str) -> Path | None:
    for known in (name, MOVED.get(name, name)):
        folder = cache_folder() / f"models--{known.replace('/', '--')}"
        main = folder / "refs" / "main"
        commits = [main.read_text().strip()] if main.exists() else []
        newest = sorted((folder / "snapshots").glob("*"), key=lambda f: f.stat().st_mtime, reverse=True)
        for snapshot in (*(folder / "snapshots" / commit for commit in commits), *newest):
            # A snapshot may be partial, with only the tokenizer or some of the shards.
            if (snapshot / "config.json").exists() and has_weights(snapshot):
                return snapshot
    return None


def _download(name: str) -> Path:
    instead = "or copy its config.json, *.safetensors and tokenizer.json into a folder, and give that"
    here = f"{name!r} is no path here, and is not in the Hugging Face cache {cache_folder()}"
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"{here}; to download it: pip install 'gptjax[hf]', {instead}")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=PATTERNS, ignore_patterns=LEFT_OUT))
    except Exception as error:  # of the network, of the hub, of the disk: many kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{here}, and cannot be downloaded ({type(error).__name__}: {reason}); try again, {instead}"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{name!r} has no safetensors on the hub, so its weights are pickles or GGUF files; give a .gguf file of "
            "it, or in Python: AutoModelForCausalLM.from_pretrained(ID).save_pretrained(NEW_DIR)"
        )
    return folder
