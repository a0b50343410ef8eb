"""Import models as runs, and export runs as Hugging Face directories. Both are written to a temporary folder, then
renamed.
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import yaml

from gptjax.checkpoint import Checkpoints
from gptjax.config import CheckpointConfig
from gptjax.configfile import config_from_dict, config_to_yaml
from gptjax.convert.base import describe_base
from gptjax.convert.card import model_card
from gptjax.convert.families import FAMILIES
from gptjax.convert.forms import export_config, exported_form, family_for
from gptjax.convert.models import Model, on_first_device, open_model
from gptjax.convert.peft import CONFIG, check_base_of, read_adapter, read_adapter_config, write_adapter
from gptjax.convert.safetensors import write_safetensors
from gptjax.convert.weights import Layout, without_multipliers, write_value
from gptjax.errors import UserError
from gptjax.shell.paths import local_path, user_path
from gptjax.tokenizers import HuggingFaceTokenizer, Tokenizer, byte_level_bpe, printable_bytes
from gptjax.tokenizers.auto import files_beside

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
END = "<|endoftext|>"  # name of the byte tokenizer's end of a document


def import_model(path_or_id: str, out: str, base: str | None = None) -> None:
    """Write a Hugging Face model, a GGUF file or a PEFT adapter as a run, with a checkpoint at step 0.

    Args:
        base: the model that an adapter belongs to; None: the one that its adapter_config.json names.

    Raises:
        UserError: as `open_model`; `out` is not empty or cannot be written; an adapter for another base.
    """
    folder = Path(user_path(path_or_id))
    if (folder / CONFIG).exists():
        _import_adapter(folder, out, base)
        return
    if base is not None:
        raise UserError(f"--base {base!r} is for adapters, and {path_or_id!r} is none; leave it out")
    model = open_model(path_or_id)
    if model.is_run:
        raise UserError(f"{path_or_id!r} is already a run; give a Hugging Face directory or id, or a .gguf file")
    _write_run(model, out, {}, {"origin": model.meta["origin"]}, lambda: model.read(on_first_device(model.config)))


def _import_adapter(folder: Path, out: str, base: str | None) -> None:
    """Write a PEFT adapter as a run: its checkpoint holds the adapter, and names the base."""
    values = read_adapter_config(folder)
    path = base or values.get("base_model_name_or_path") or ""
    try:
        model = open_model(path)
    except UserError as error:
        raise UserError(f"the base of the adapter {str(folder)!r}: {error}; give it with --base") from None
    kind = family_for(model.config, model.meta.get("origin", {}).get("model_type"))
    lora, adapters = read_adapter(folder, values, Layout(FAMILIES[kind], model.config))
    facts = describe_base(path, model.read(on_first_device(model.config)))
    check_base_of(folder, facts)
    lora_values = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    _write_run(model, out, {"lora": lora_values}, {"base": facts}, lambda: jax.tree.map(jnp.asarray, adapters))


def _write_run(
    model: Model, out: str, sections: dict[str, Any], facts: dict[str, Any], params: Callable[[], Any]
) -> None:
    """Write a run that continues from a model.

    Args:
        sections: of the config, besides model and data.
        facts: of the checkpoint's plain values, besides config and tokenizer.
        params: returns the weights of the checkpoint.
    """
    with new_folder(out) as folder:
        files = tokenizer_files(model.tokenizer)
        if ends := end_tokens(model.tokenizer):
            files["generation_config.json"] = json.dumps(ends) + "\n"  # read again with the tokenizer beside it
        data = {"tokenizer": os.path.join(out, "tokenizer.json")} if files else {}
        # This config continues training: it starts from these weights and has these ids.
        out = user_path(out)
        values = {"model": dataclasses.asdict(model.config), "data": data, "init_from": out, "workdir": out}
        config = config_to_yaml(config_from_dict({**values, **sections}))
        for name, text in {**files, "config.yaml": config}.items():
            (folder / name).write_text(text, encoding="utf-8")
        meta = {"config": yaml.safe_load(config), "tokenizer": model.tokenizer.to_dict(), "corpus": None}
        checkpoints = Checkpoints(str(folder), CheckpointConfig())
        checkpoints.save(0, params(), None, {**meta, "val/loss": None, **facts}, None)
        checkpoints.close()


def export_adapter(run: str, out: str) -> str | None:
    """Write a run's adapters as a directory that `peft` loads, and return the base that it names.

    Write nothing, and return None, where the run has no adapters.

    Raises:
        UserError: as `open_model`; no family has the model's form; `out` is not empty.
    """
    model = open_model(run)
    if model.adapter is None:
        return None
    with new_folder(out) as folder:
        return write_adapter(model, model.adapter, folder)


def export_model(run: str, out: str, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write a run's model as a directory that `transformers` loads: config, weights, tokenizer, model card.

    Raises:
        UserError: as `open_model`; no family has the model's form; `out` is not empty or cannot be written.
    """
    model = open_model(run)
    origin = model.meta.get("origin", {})
    kind = family_for(model.config, origin.get("model_type"))
    layout = Layout(FAMILIES[kind], exported_form(model.config, kind))
    ends = {"bos_token_id": getattr(model.tokenizer, "bos_id", None), "eos_token_id": model.tokenizer.eos_id}
    config = export_config(model.config, kind, dtype) | ends
    generation = {**ends, **origin.get("generation", {}), **end_tokens(model.tokenizer)}
    with new_folder(out) as folder:
        params = without_multipliers(model.config, model.read(on_first_device(model.config)))
        shapes = {name: tensor.shape for name, tensor in layout.tensors.items()}
        write_safetensors(folder, shapes, DTYPES[dtype], lambda name: write_value(layout, params, name))
        for name, values in {"config.json": config, "generation_config.json": generation}.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
        for name, text in _files_for(model.tokenizer, kind).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(model_card(model, FAMILIES[kind].title, dtype), encoding="utf-8")


def _files_for(tokenizer: Tokenizer, kind: str) -> dict[str, str]:
    """Return the tokenizer's files for a model of this type; print a note where AutoTokenizer would ignore them."""
    files = tokenizer_files(tokenizer)
    if not files:
        return files
    files, followed = files_beside(files, kind)
    if not followed:
        print(
            f"note: AutoTokenizer cuts text by the rules of {kind!r}, which are not this tokenizer's; load it with "
            "transformers.PreTrainedTokenizerFast.from_pretrained for the same ids"
        )
    return files


def end_tokens(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """Return generation_config.json's `eos_token_id`: every id that ends a text; nothing without one."""
    ends = list(tokenizer.eos_ids)
    return {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the files, by name, from which `AutoTokenizer` makes equal ids; none for a model without a tokenizer."""
    files = _TOKENIZER_FILES[tokenizer.kind](tokenizer)
    if files and tokenizer.chat_template is not None and not isinstance(tokenizer, HuggingFaceTokenizer):
        files["chat_template.jinja"] = tokenizer.chat_template
    return files


def _own_files(text: str, **facts: Any) -> dict[str, str]:
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **facts}
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(facts, indent=2) + "\n"}


def _byte_files(tokenizer: Tokenizer) -> dict[str, str]:
    letters = printable_bytes()
    vocab = {letters[byte]: byte for byte in range(256)} | {END: tokenizer.eos_id}
    whole = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _own_files(byte_level_bpe(vocab, [], [whole], [END]), eos_token=END)


def _char_files(tokenizer: Tokenizer) -> dict[str, str]:
    alphabet = tokenizer.to_dict()["alphabet"]
    # Without merges every character is a token. A character outside the alphabet is dropped; our tokenizer raises.
    made = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.decoder = tokenizers.decoders.Fuse()
    return _own_files(made.to_str())


def _hf_files(tokenizer: HuggingFaceTokenizer) -> dict[str, str]:
    eos = None if tokenizer.eos_id is None else tokenizer.eos_token
    return _own_files("", eos_token=eos) | tokenizer.files


def _tiktoken_files(tokenizer: Tokenizer) -> dict[str, str]:
    spec, letters = tokenizer.to_dict(), printable_bytes()
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"].split())}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [" ".join(map(written, _merged_from(token, ranks))) for token in ranks if len(token) > 1]
    vocab = {written(token): rank for token, rank in ranks.items()} | spec["special_tokens"]
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(spec["pattern"]), behavior="isolated")
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _own_files(byte_level_bpe(vocab, merges, [words, as_bytes], list(spec["special_tokens"])), eos_token=END)


def _marked_files(tokenizer: Any) -> dict[str, str]:
    files = tokenizer_files(tokenizer.text)
    made = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    made.add_special_tokens(list(tokenizer.marks))
    if any(made.token_to_id(mark) != id for mark, id in tokenizer.marks.items()):
        raise UserError("the text's tokenizer has unused ids, so its tags and pictures cannot be exported")
    return files | {"tokenizer.json": made.to_str()}


def _merged_from(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts whose merge makes a token: those left by byte-pair encoding with only the lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


_TOKENIZER_FILES: dict[str, Callable[[Any], dict[str, str]]] = {
    "byte": _byte_files,
    "char": _char_files,
    "hf": _hf_files,
    "marked": _marked_files,
    "tiktoken": _tiktoken_files,
    "none": lambda tokenizer: {},
}


@contextlib.contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` on success, and removed on failure.

    Raises:
        UserError: `out` exists and is not empty, or cannot be written.
    """
    path = local_path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out {out!r} exists and is not empty; give a new folder")
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id, as in a container
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write --out {out!r}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
