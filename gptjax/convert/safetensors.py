"""The safetensors format: eight bytes of length, a JSON header, raw little-endian values. Read with every claim of
the header checked, written tensor by tensor.

Source: github.com/huggingface/safetensors, README, "Format". (Its library knows no bfloat16 in numpy, and writes a
file only from all of its tensors at once.)
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.convert.foreign import no_weights
from gptjax.errors import UserError
from gptjax.shell.paths import LFS_POINTER, refuse_lfs_pointer

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# Bits of a value, for types that hold no plain weights: masks, counters, quantized values.
OTHER_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16"), 16),
    **dict.fromkeys(("U32", "I32"), 32),
    **dict.fromkeys(("U64", "I64", "C64"), 64),
}
BITS = {**{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}, **OTHER_BITS}
MAX_HEADER_BYTES = 100_000_000  # as the reference implementation
# What Python raises where JSON that was read is not of the form expected, or nested too deeply.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
MAX_SHARD_BYTES = 5_000_000_000  # as transformers writes them

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor in a file: its type, shape, and where its bytes begin."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFolder:
    """The tensors of a folder. Values are mapped, not read.

    The files are those that `transformers` prefers: the one that config.json names as `transformers_weights`, else
    model.safetensors, else the shards that model.safetensors.index.json names. As there, an index counts only for
    the files that it names: all of their tensors are read, and of two of one name the last file's.

    Args:
        named: the `transformers_weights` of config.json.

    Attributes:
        shapes: by name.
        unreadable: the dtypes, by name, of tensors whose values are no plain floats.

    Raises:
        UserError: no such file, a pickle instead, a shard that is missing, a damaged or dishonest file.
    """

    def __init__(self, folder: Path, named: str | None = None):
        file = _weights_file(folder, named)
        self._entries = _read_sharded(file) if file.suffix == ".json" else read_header(file)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def unreadable(self) -> dict[str, str]:
        return {name: entry.dtype for name, entry in self._entries.items() if entry.dtype not in DTYPES}

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors, by their names so far, other names."""
        self._entries = {names.get(name, name): entry for name, entry in self._entries.items()}

    def split(self, name: str, names: Sequence[str]) -> None:
        """Replace a tensor by equal parts of its rows, each [R, N]."""
        fused = self._entries.pop(name)
        shape = (math.prod(fused.shape[:-1]) // len(names), fused.shape[-1])
        size = _bytes(fused) // len(names)
        for number, part in enumerate(names):
            self._entries[part] = fused._replace(shape=shape, offset=fused.offset + number * size)

    def read(self, name: str) -> np.ndarray:
        """Return the values, floats or bytes, as they are in the file, in its shape; a view of the mapped file."""
        entry = self._entries[name]
        dtype = np.dtype(np.uint8) if entry.dtype == "U8" else DTYPES[entry.dtype]
        return np.memmap(entry.file, dtype, mode="r", offset=entry.offset, shape=entry.shape)


def _weights_file(folder: Path, named: str | None) -> Path:
    """Return the file of weights, or the index of its shards, that `transformers` reads."""
    if named is not None:
        inside = isinstance(named, str) and Path(named).name == named
        if not inside or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(
                f"config.json: transformers_weights {named!r} is no .safetensors file or index of this folder; "
                "name one, or remove the key"
            )
        if not (folder / named).is_file():
            raise UserError(f"config.json: transformers_weights {named!r} is not there; copy it, or remove the key")
        return folder / named
    for name in (NAME, INDEX):
        if (folder / name).is_file():
            return folder / name
    raise UserError(no_weights(folder))


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds a whole file of weights, or every shard that its index names."""
    if not (folder / INDEX).is_file():
        return any(folder.glob("*.safetensors"))
    try:
        files = {*json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
    except MALFORMED:
        return True  # damaged: reading it raises the error
    return (folder / NAME).is_file() or all((folder / str(file)).exists() for file in files)


def _read_sharded(index: Path) -> dict[str, Entry]:
    folder = index.parent
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(names.values()))
    except MALFORMED:
        raise UserError(f"{index} is damaged: it has no weight_map; copy it again") from None
    if outside := [file for file in files if Path(file).name != file]:
        raise UserError(f"{index} names {outside[0]!r}, which is not a file of its own folder")
    if missing := [file for file in files if not (folder / file).exists()]:
        raise UserError(
            f"{len(missing)} of {len(files)} shards are missing from {str(folder)!r}: {', '.join(missing[:3])}; "
            "copy the whole model"
        )
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= read_header(folder / file)
    if lost := sorted(names.keys() - entries.keys()):
        raise UserError(
            f"{index} and its shards disagree about {', '.join(lost[:3])}, which no shard holds; copy all again"
        )
    return entries


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of one file, after every claim of its header is checked against the file's true length.

    Raises:
        UserError: a file cut short, or a header that does not describe it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        refuse_lfs_pointer(file, stream.read(len(LFS_POINTER)))
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(
                f"{file} claims a header of {length} bytes and has {size} in all; it is cut short or no safetensors "
                "file: copy it again"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            found = {name: _entry(file, 8 + length, claim) for name, claim in header.items()}
        except MALFORMED:
            raise UserError(f"{file} has a header that is not one of safetensors; copy it again") from None
    end = 8 + length
    for name, entry in sorted(found.items(), key=lambda item: (item[1].offset, _bytes(item[1]))):
        if entry.offset != end:
            raise UserError(f"{file}: {name} is said to begin at byte {entry.offset} instead of {end}; copy it again")
        end += _bytes(entry)
    if end != size:
        raise UserError(f"{file} should be {end} bytes and is {size}; it is cut short or damaged: copy it again")
    return found


def read_facts(file: Path) -> dict[str, str]:
    """Return what the header of a file says besides its tensors; the file has passed `read_header`."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    facts = header.get("__metadata__")
    return facts if isinstance(facts, dict) else {}


def _entry(file: Path, base: int, claim: Mapping[str, Any]) -> Entry:
    begin, end = claim["data_offsets"]
    entry = Entry(file, claim["dtype"], tuple(claim["shape"]), base + begin)
    if entry.dtype not in BITS:
        raise UserError(f"{file}: a tensor has dtype {entry.dtype}, which is not known; known: {', '.join(BITS)}")
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *entry.shape)) or end - begin != _bytes(entry):
        raise ValueError
    return entry


def _bytes(entry: Entry) -> int:
    return -(-math.prod(entry.shape) * BITS[entry.dtype] // 8)


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    value: Callable[[str], np.ndarray],
    max_shard_bytes: int | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in this order, holding one at a time; with an index, where one file would be too long.

    Args:
        value: the tensor of a name, in the shape given; cast to `dtype` here.
        facts: for the header of each file, which loaders pass over.
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
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(facts or {})}}
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
