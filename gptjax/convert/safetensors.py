"""The safetensors format: eight bytes of length, a JSON header, raw little-endian values. Read with every claim of
the header checked, written tensor by tensor.

Source: github.com/huggingface/safetensors, README, "Format". (Its library knows no bfloat16 in numpy, and writes a
file only from all of its tensors at once.)
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# Bytes a value, of types that may lie in a file but hold no weights: masks, counters, quantized values.
OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4}
SIZES = {**{name: dtype.itemsize for name, dtype in DTYPES.items()}, **OTHER_SIZES, "U64": 8, "I64": 8}
MAX_HEADER_BYTES = 100_000_000  # as the reference implementation
MAX_SHARD_BYTES = 5_000_000_000  # as transformers writes them

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor in a file: its type, shape, and where its bytes begin."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFolder:
    """The tensors of a folder: model.safetensors, or the shards that its index names. Values are mapped, not read.

    Args:
        prefix: that of the family's names. Where no name has it, as in files of a bare model (GPT-2's first ones),
            all are given it.

    Attributes:
        shapes: by name.

    Raises:
        UserError: no such file, a pickle instead, a shard that is missing, a damaged or dishonest file.
    """

    def __init__(self, folder: Path, prefix: str):
        if (folder / INDEX).exists():
            self._entries = _read_sharded(folder)
        elif (folder / NAME).exists():
            self._entries = read_header(folder / NAME)
        else:
            raise UserError(_nothing_here(folder))
        if not any(name.startswith(prefix) for name in self._entries):
            self._entries = {prefix + name: entry for name, entry in self._entries.items()}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The values as they are in the file, in its shape and dtype; a view of the mapped file."""
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.file}: {name} is {entry.dtype}; only {', '.join(DTYPES)} can be read, so convert it first"
            )
        return np.memmap(entry.file, DTYPES[entry.dtype], mode="r", offset=entry.offset, shape=entry.shape)


def _nothing_here(folder: Path) -> str:
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(pattern))
    if pickles:
        return (
            f"{str(folder / pickles[0])!r} is a pickle, which can run any program when it is loaded; get the "
            f"model's safetensors, or in Python: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return f"{str(folder)!r} holds no {NAME}; copy the whole model"


def _read_sharded(folder: Path) -> dict[str, Entry]:
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / INDEX} is damaged: it has no weight_map; copy it anew") from None
    if outside := [file for file in files if Path(file).name != file]:
        raise UserError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of its own folder")
    if missing := [file for file in files if not (folder / file).exists()]:
        raise UserError(
            f"{len(missing)} of {len(files)} shards are missing from {str(folder)!r}: {', '.join(missing[:3])}; "
            "copy the whole model"
        )
    entries: dict[str, Entry] = {}
    for file in files:
        header = read_header(folder / file)
        promised = {name for name, where in names.items() if where == file}
        if lost := sorted(promised ^ header.keys()):
            raise UserError(f"{folder / file} and {INDEX} disagree about {', '.join(lost[:3])}; copy both anew")
        entries |= header
    return entries


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file, after every claim of its header is checked against the file's true length.

    Raises:
        UserError: a file cut short, or a header that does not describe it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(
                f"{file} claims a header of {length} bytes and has {size} in all; it is cut short or no safetensors "
                "file: copy it anew"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found = {name: _entry(file, 8 + length, claim) for name, claim in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file} has a header that is not one of safetensors; copy it anew") from None
    end = 8 + length
    for name, entry in sorted(found.items(), key=lambda item: (item[1].offset, _bytes(item[1]))):
        if entry.offset != end:
            raise UserError(f"{file}: {name} is said to begin at byte {entry.offset} instead of {end}; copy it anew")
        end += _bytes(entry)
    if end != size:
        raise UserError(f"{file} should be {end} bytes and is {size}; it is cut short or damaged: copy it anew")
    return found


def _entry(file: Path, base: int, claim: Mapping[str, Any]) -> Entry:
    begin, end = claim["data_offsets"]
    entry = Entry(file, claim["dtype"], tuple(claim["shape"]), base + begin)
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *entry.shape)) or end - begin != _bytes(entry):
        raise ValueError
    return entry


def _bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * SIZES[entry.dtype]


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    value: Callable[[str], np.ndarray],
    max_shard_bytes: int | None = None,
) -> None:
    """Write tensors in this order, holding one at a time; with an index, where one file would be too long.

    Args:
        value: the tensor of a name, in the shape given; cast to `dtype` here.
    """
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > (max_shard_bytes or MAX_SHARD_BYTES):
            shards.append([])
        shards[-1].append(name)
    of_many = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = [NAME] if len(shards) == 1 else of_many
    for file, names in zip(files, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the values are aligned
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                stream.write(np.ascontiguousarray(value(name), dtype).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
