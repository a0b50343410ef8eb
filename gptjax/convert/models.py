"""Open a model from a run, a Hugging Face directory or id, or a GGUF file. Weights are read last, onto the shardings
that the caller names.
"""

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gptjax.checkpoint import Checkpoints, read_newest
from gptjax.config import Config, MeshConfig, ModelConfig, override, plain_values
from gptjax.configfile import config_from_dict
from gptjax.convert.base import (
    Base,
    SavedAdapter,
    as_float32,
    check_base,
    describe_base,
    find_base,
    hold_all,
    merged,
)
from gptjax.convert.configs import family_of, import_config, read_json
from gptjax.convert.families import FAMILIES
from gptjax.convert.foreign import broken_links, model_inside, no_model, quantized_by
from gptjax.convert.gguf import read_gguf
from gptjax.convert.hub import find_model
from gptjax.convert.matching import match_tensors
from gptjax.convert.mxfp4 import Mxfp4Folder
from gptjax.convert.safetensors import SafetensorsFolder
from gptjax.convert.weights import Layout, TensorSource, read_params
from gptjax.errors import UserError, choose
from gptjax.generate import LanguageModel
from gptjax.nn.backends import check_model_divides
from gptjax.nn.transformer import Params, abstract_model
from gptjax.nn.weights import WEIGHT_DTYPES
from gptjax.objectives import OBJECTIVES
from gptjax.optim import map_by_path
from gptjax.parametrization import Metadata
from gptjax.sharding import make_mesh, sharding
from gptjax.shell.paths import user_path
from gptjax.tokenizers import NoTokenizer, Tokenizer, read_huggingface_tokenizer, same_ids, tokenizer_from_dict


class Model(NamedTuple):
    """A model whose weights are not read yet.

    Attributes:
        config: the model's.
        tokenizer: the model's.
        path: its file or folder.
        meta: of a run, the plain values in its checkpoint, and its `step`; of an import, `origin`: its `model_type`
            and generation_config.json.
        is_run: whether it is one of our runs. If not, `read` can pad the vocabulary differently, and
            return fewer learned positions than the file has.
        read: abstract weights with their shardings -> weights; each device receives only its own shards. Of a run
            with adapters, they are merged.
        adapter: of a run with adapters; None for any other model.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    path: Path
    meta: dict[str, Any]
    is_run: bool
    read: Callable[[Params], Params]
    adapter: SavedAdapter | None = None


def open_model(path_or_id: str | os.PathLike[str]) -> Model:
    """Return the model of a run's directory, a Hugging Face directory or id, or a GGUF file.

    Raises:
        UserError: there is no model, or one that is damaged or cannot be run here.
    """
    path_or_id = user_path(path_or_id)
    if "://" in path_or_id:  # a run in a bucket
        return _open_run(path_or_id)
    path = find_model(path_or_id)
    if path.is_file():
        if path.suffix == ".gguf":
            return _open_tensors(path, *read_gguf(path))
        raise UserError(
            f"{path_or_id!r} is a file; give the directory of a model or run, here {str(path.parent)!r}, or a .gguf "
            "file"
        )
    if path.is_dir() and (reason := broken_links(path)):
        raise UserError(reason)
    if (path / "config.json").exists():
        return _open_huggingface(path)
    if (path / "checkpoints").is_dir():
        return _open_run(path_or_id)
    if path.is_dir() and (reason := no_model(path)):
        raise UserError(reason)
    inside = sorted(f.name for f in path.glob("*"))[:3] if path.is_dir() else []
    here = f"holds {', '.join(inside)}, but " if inside else "is empty: " if path.is_dir() else "does not exist: "
    within = model_inside(path)
    example = f", such as {str(within)!r}" if within else ""
    raise UserError(
        f"{path_or_id!r} {here}no checkpoint of a run, and no config.json of a Hugging Face model; train first, or "
        f"give the directory of one{example}"
    )


def load(
    path_or_id: str | os.PathLike[str], dtype: str | None = None, mesh: Mapping[str, int] | None = None
) -> LanguageModel:
    """Return the model of a path or id, ready to generate.

    Args:
        dtype: of the matrices: float32 or bfloat16, in which they are also multiplied, or int8, with a scale for each
            output channel; None computes as the model was trained, with float32 weights.
        mesh: devices on each axis of data, fsdp and tensor, such as {"fsdp": 4, "tensor": 2}; the weights are sharded
            as in training. None for the first device.

    Raises:
        UserError: as `open_model`; a dtype or a mesh that is unknown or does not fit the devices or the model.
    """
    if dtype not in (None, *WEIGHT_DTYPES):
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(WEIGHT_DTYPES)}")
    model = open_model(path_or_id)
    config = model.config if dtype in (None, "int8") else override(model.config, {"dtype": dtype})
    devices = None if mesh is None else _generation_mesh(config, mesh)
    params = model.read(on_first_device(config) if devices is None else on_mesh(config, devices))
    params = hold_all(params, abstract_model(config)[2], dtype or "float32")
    return LanguageModel(config, params, model.tokenizer, devices, delete=True)


def _generation_mesh(cfg: ModelConfig, axes: Mapping[str, int]) -> Mesh:
    """Return the mesh of these axes over the first devices."""
    if unknown := set(axes) - {"data", "fsdp", "tensor"}:
        raise UserError(f"mesh axis {min(unknown)!r} does not shard generation; give any of data, fsdp and tensor")
    sizes = MeshConfig(**{"data": 1, **axes}).axes
    wanted = math.prod(sizes.values())
    devices = jax.devices()
    mesh = make_mesh(sizes, devices[:wanted] if 0 < wanted <= len(devices) else devices)
    check_model_divides(cfg, mesh)
    return mesh


def on_first_device(cfg: ModelConfig) -> Params:
    """Return the abstract weights of a model, all on the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract_model(cfg)[1]
    )


def on_mesh(cfg: ModelConfig, mesh: Mesh) -> Params:
    """Return the abstract weights of a model, sharded over a mesh as in training."""
    _, params, metadata = abstract_model(cfg)

    def placed(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, metadata[path]["axes"]))

    return map_by_path(placed, params)


def _open_run(workdir: str) -> Model:
    checkpoints = Checkpoints(workdir)
    found = read_newest(checkpoints, checkpoints.meta, ("meta", "params"))
    if found is None:
        raise UserError(f"{workdir!r} holds no checkpoint; train first, or give the directory of a run")
    meta = {**found[1], "step": found[0]}

    def read(abstract: Params) -> Params:
        params = read_newest(checkpoints, lambda step: checkpoints.restore_params(step, abstract), ("meta", "params"))
        checkpoints.close()
        return params[1]

    config = config_from_dict(meta["config"])
    model = Model(config.model, tokenizer_from_dict(meta["tokenizer"]), Path(workdir), meta, True, read)
    if "base" not in meta:
        return model
    adapter = SavedAdapter(config.lora, meta["base"], read)
    return model._replace(read=partial(_read_merged, model, adapter), adapter=adapter)


def _read_merged(model: Model, adapter: SavedAdapter, abstract: Params) -> Params:
    """Return the weights of a run with adapters, merged with those of its base."""
    path = find_base(adapter.base, str(model.path))
    base = initial_model(path, model.config, model.tokenizer)
    return merged(
        base.read(abstract), adapter, model.config, lambda found: check_base(adapter.base, found, str(model.path))
    )


def _open_huggingface(folder: Path) -> Model:
    config = read_json(folder / "config.json")
    family_of(config)  # check the kind of model before its files
    source: TensorSource = SafetensorsFolder(folder, config.get("transformers_weights"))
    if quantized_by(config) == "mxfp4" and source.unreadable:
        source = Mxfp4Folder(source)
        if not source.unreadable:  # all is dequantized as it is read
            config = {key: value for key, value in config.items() if key != "quantization_config"}
    carried = ("tokenizer.json", "vocab.json", "tokenizer.model")
    has_tokenizer = any((folder / name).exists() for name in carried)
    tokenizer = read_huggingface_tokenizer(folder) if has_tokenizer else NoTokenizer()
    return _open_tensors(folder, config, source, tokenizer)


def _open_tensors(path: Path, config: dict[str, Any], source: TensorSource, tokenizer: Tokenizer) -> Model:
    """Return a model from a config.json's values, tensors under its family's names, and a tokenizer."""
    try:
        imported = import_config(config)
        layout = Layout(FAMILIES[config["model_type"]], imported.model, imported.absent)
        layout = match_tensors(layout, source, config)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from None
    model = layout.cfg
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{str(path)!r}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model has only "
            f"{model.vocab_size} embeddings; use the model's own tokenizer"
        )
    generation = path / "generation_config.json"
    origin = {"model_type": config["model_type"], "generation": read_json(generation) if generation.exists() else {}}
    return Model(
        model, tokenizer, path, {"origin": origin}, False, lambda abstract: read_params(layout, source, abstract)
    )


# Fields in which a model may differ from the one it starts from, since they change only how it runs or trains.
MAY_DIFFER = ("preset", "init", "dropout", "dtype")
# Fields that change what it computes, as intended when a context is extended or logits are capped: print a note.
DIFFER_WITH_NOTE = ("positions.theta", "positions.scaling", "logit_softcap")


def initial_model(path_or_id: str, wanted: ModelConfig, tokenizer: Tokenizer) -> Model:
    """Return the model from whose weights a run of this config can start.

    Raises:
        UserError: the model's shape, form or tokenizer differs from the run's.
    """
    model = open_model(path_or_id)
    given, now = (_resolved(cfg) for cfg in (model.config, wanted))
    differing = {field for field in given if given[field] != now[field]} - {
        *MAY_DIFFER,
        "context_length",
        "vocab_multiple",
    }
    fewer = now["context_length"] < given["context_length"] and not model.is_run
    if wanted.positions.kind == "learned" and given["context_length"] != now["context_length"] and not fewer:
        differing.add("context_length")
    if given["vocab_multiple"] != now["vocab_multiple"] and model.is_run:
        differing.add("vocab_multiple")
    if strange := [
        f"model.{f} {given[f]} there and {now[f]} here" for f in given if f in differing - {*DIFFER_WITH_NOTE}
    ]:
        raise UserError(
            f"init_from {path_or_id!r} is a model of another shape or form: {', '.join(strange)}; set these to "
            "its values"
        )
    for field in differing & {*DIFFER_WITH_NOTE}:
        print(f"note: init_from {path_or_id!r} has model.{field} {given[field]}, and this run {now[field]}")
    if model.tokenizer.kind != NoTokenizer.kind and not same_ids(model.tokenizer, tokenizer):
        raise UserError(
            f"init_from {path_or_id!r} has another tokenizer than data.tokenizer makes for this corpus, so its ids "
            f"mean other text; set data.tokenizer to {_tokenizer_of(model)}"
        )
    return model


def read_base(cfg: Config, tokenizer: Tokenizer, abstract: Params, metadata: Metadata) -> Base:
    """Return the model of `init_from` in the form in which a run with adapters holds it.

    Args:
        abstract: the weights that the run holds, without adapters, with their shardings.
        metadata: of each weight, by path.

    Raises:
        UserError: as `initial_model`; or it is a run with other adapters than those of the config.
    """
    path, adapter = cfg.init_from, None
    model = initial_model(path, cfg.model, tokenizer)
    if model.adapter is not None:
        there, here = (plain_values(lora) for lora in (model.adapter.lora, cfg.lora))
        if differing := [
            f"lora.{key} {there[key]} there and {here[key]} here" for key in here if there[key] != here[key]
        ]:
            raise UserError(
                f"init_from {path!r} is a run with other adapters: {', '.join(differing)}; set these to its values, "
                f"or merge it: gptjax convert to-hf {path} --merged true --out DIR"
            )
        adapter, owner = model.adapter, path
        path = find_base(adapter.base, owner)
        model = initial_model(path, cfg.model, tokenizer)
    params = model.read(as_float32(abstract))
    facts = describe_base(path, params)
    if adapter is not None:
        check_base(adapter.base, facts, owner)
    return Base(hold_all(params, metadata, cfg.lora.base_dtype), facts, None if adapter is None else adapter.read)


def teacher_config(cfg: Config, tokenizer: Tokenizer | None = None) -> ModelConfig | None:
    """Return the config of the model of `distill.teacher`, for an objective that learns from one; else None.

    Args:
        tokenizer: of the run; None does not compare.

    Raises:
        UserError: there is no such model, or it has another tokenizer or a shorter context.
    """
    path = cfg.distill.teacher
    if path is None or not choose(OBJECTIVES, cfg.train.objective, "train.objective").has_teacher:
        return None
    model = open_model(path)
    known = tokenizer is not None and model.tokenizer.kind != NoTokenizer.kind
    if known and not same_ids(model.tokenizer, tokenizer):
        raise UserError(
            f"distill.teacher {path!r} has another tokenizer than data.tokenizer makes for this corpus, so its ids "
            f"mean other text; set data.tokenizer to {_tokenizer_of(model)}"
        )
    theirs, T = model.config, cfg.model.context_length
    if theirs.positions.kind == "learned" and theirs.context_length < T:
        raise UserError(
            f"distill.teacher {path!r} has positions for {theirs.context_length} tokens; lower model.context_length "
            f"{T} to that"
        )
    return theirs if model.is_run else override(theirs, {"vocab_multiple": cfg.model.vocab_multiple})


def read_teacher(path: str, abstract: Params) -> Base:
    """Return the weights of a teacher on the shardings of abstract ones, and what a checkpoint says of them."""
    params = open_model(path).read(abstract)
    return Base(params, describe_base(path, params))


def _resolved(cfg: ModelConfig) -> dict[str, Any]:
    bias = cfg.bias if cfg.attention.qkv_bias is None else cfg.attention.qkv_bias
    derived = {"n_kv_heads": cfg.kv_heads, "head_dim": cfg.d_head, "mlp.width": cfg.mlp_width}
    return plain_values(cfg) | derived | {"attention.qkv_bias": bias}


def _tokenizer_of(model: Model) -> str:
    if (model.path / "tokenizer.json").exists() or (model.path / "vocab.json").exists():
        return str(model.path)
    return str(model.meta.get("config", {}).get("data", {}).get("tokenizer", model.tokenizer.kind))
