"""Compressed streams, decompressed chunk by chunk."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.errors import UserError


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(".zst files need the package zstandard: pip install 'gptjax[data]'") from None
    return zstandard.ZstdDecompressor().decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {"gz": lambda: zlib.decompressobj(wbits=31), "zst": _zstandard}


def decompressed(chunks: Iterator[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress members, or frames, one after another.

    Args:
        new: returns a new decompressor, a value of DECOMPRESSORS.

    Raises:
        EOFError: the data is truncated.
    """
    decompressor = None
    for data in chunks:
        while data:
            decompressor = decompressor or new()
            yield decompressor.decompress(data)
            data = decompressor.unused_data if decompressor.eof else b""  # the next member, or frame
            decompressor = None if decompressor.eof else decompressor
    if decompressor is not None:
        raise EOFError("it is compressed and truncated; download it again")
