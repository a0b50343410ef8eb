"""Weights in MXFP4: floats of 4 bits, of which 32 share a factor. gpt-oss's experts are published so.

Sources: Open Compute Project, OCP Microscaling Formats (MX) Specification 1.0, section 5; `transformers` 5.24,
integrations/mxfp4.py (`convert_moe_packed_tensors`).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from gptjax.convert.safetensors import SafetensorsFolder

BLOCKS, SCALES = "_blocks", "_scales"  # endings of the two tensors that hold a weight
BLOCK_BYTES = 16  # of the values that share a factor, two in a byte
VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)  # by three bits; the fourth is the sign
EXPONENT_OF_ONE = 127


class Mxfp4Folder:
    """The tensors of a folder (a `TensorSource`), those in MXFP4 as bfloat16 tensors [E, D, F].

    NAME_blocks [E, F, D / 32, 16] and NAME_scales [E, F, D / 32], both uint8, are the tensor NAME.
    """

    def __init__(self, folder: SafetensorsFolder):
        self._folder = folder
        names = [name.removesuffix(BLOCKS) for name in folder.shapes if name.endswith(BLOCKS)]
        self._packed = {name: name for name in names if self._is_packed(name)}

    def _is_packed(self, name: str) -> bool:
        """Return whether both tensors of a weight are there, of the right shapes."""
        blocks, scales = (self._folder.shapes.get(name + ending, ()) for ending in (BLOCKS, SCALES))
        bytes_alone = all(self._folder.unreadable.get(name + ending) == "U8" for ending in (BLOCKS, SCALES))
        return bytes_alone and len(blocks) == 4 and blocks == (*scales, BLOCK_BYTES)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = dict(self._folder.shapes)
        for name, stored in self._packed.items():
            n_experts, width, n_blocks, _ = shapes.pop(stored + BLOCKS)
            del shapes[stored + SCALES]
            shapes[name] = (n_experts, 2 * BLOCK_BYTES * n_blocks, width)
        return shapes

    @property
    def unreadable(self) -> dict[str, str]:
        parts = {stored + ending for stored in self._packed.values() for ending in (BLOCKS, SCALES)}
        return {name: dtype for name, dtype in self._folder.unreadable.items() if name not in parts}

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors, by their names so far, other names."""
        self._folder.rename({old: new for old, new in names.items() if old not in self._packed})
        self._packed = {names.get(name, name): stored for name, stored in self._packed.items()}

    def split(self, name: str, names: Sequence[str]) -> None:
        """Replace a tensor, not in MXFP4, by equal parts of its rows."""
        self._folder.split(name, names)

    def read(self, name: str) -> np.ndarray:
        """Return the values."""
        if name not in self._packed:
            return self._folder.read(name)
        stored = self._packed[name]
        return dequantize(self._folder.read(stored + BLOCKS), self._folder.read(stored + SCALES))


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the values of blocks [E, F, D / 32, 16], in bfloat16, which holds each exactly: [E, D, F].

    The lower four bits of a byte are the first of its two values.
    """
    table, out = _pairs(), np.empty(blocks.shape, np.uint32)
    for expert, made in enumerate(out):  # few indices at a time
        np.take(table, (scales[expert].astype(np.uint16)[..., None] << 8) | blocks[expert], out=made)
    n_experts, width = blocks.shape[:2]
    return out.view(jnp.bfloat16).reshape(n_experts, width, -1).swapaxes(1, 2)


@lru_cache(maxsize=1)
def _pairs() -> np.ndarray:
    """Return the two bfloat16 values of every byte under every factor, as 32 bits: [factors x bytes]."""
    signed = np.concatenate([VALUES, -VALUES])
    both = np.stack([np.tile(signed, 16), np.repeat(signed, 16)], axis=-1)  # of each byte
    with np.errstate(over="ignore", invalid="ignore"):  # the largest factors make infinities
        factors = np.ldexp(np.float32(1), np.arange(256) - EXPONENT_OF_ONE)
        return (factors[:, None, None] * both).astype(jnp.bfloat16).view(np.uint32).ravel()
