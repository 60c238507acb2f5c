"""Coders to measure side by side: the codec's levels, zstd-3, and two packages if installed.

Each is a pair of functions over one frame's bytes, as fast as its package allows: contexts are kept
from call to call, and one thread does the work.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from stages.codec import DENSE, FAST, INT8, RAW, AnyProfile, decode, encode
from stages.codec_dense_profile import DenseProfile
from stages.codec_profile import Profile

Rows = NDArray[np.unsignedinteger[Any]]
MAX_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Coder:
    """`prepared` makes what `encode` takes, untimed, as one package overwrites its input.

    `joined` makes one piece of what `encode` returned, untimed: ours are sent in parts.
    """

    name: str
    prepared: Callable[[Rows], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    exact: bool = True
    joined: Callable[[Any], bytes] = bytes


def coders(dtype: str, profile: Profile, dense: DenseProfile | None) -> list[Coder]:
    """Every coder that is at hand for the dtype; the profiles are of the same boundary."""
    return [
        _ours(RAW, RAW, dtype, None),
        _ours(FAST, FAST, dtype, None),
        _ours("fast, profile", FAST, dtype, profile),
        *([_ours(DENSE, DENSE, dtype, dense)] if dense else []),
        _ours(INT8, INT8, dtype, None),
        _zstd3(),
        *([_zipnn(dtype)] if importlib.util.find_spec("zipnn") else []),
        *([_openzl(dtype)] if importlib.util.find_spec("openzl") else []),
    ]


def _ours(name: str, level: str, dtype: str, profile: AnyProfile | None) -> Coder:
    known = {profile.id: profile} if profile else {}
    return Coder(
        name,
        lambda rows: rows,
        lambda rows: encode(rows, dtype, rows.shape, level, profile),
        lambda frame: decode(frame, max_bytes=MAX_BYTES, profiles=known).buffer,
        exact=level != INT8,
        joined=lambda encoded: encoded.tobytes(),
    )


def _zstd3() -> Coder:
    compressor = zstandard.ZstdCompressor(level=3)
    decompressor = zstandard.ZstdDecompressor()
    return Coder(
        "zstd-3", lambda rows: rows.tobytes(), compressor.compress, decompressor.decompress
    )


def _zipnn(dtype: str) -> Coder:
    from zipnn import ZipNN  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415  optional

    coder = ZipNN(bytearray_dtype=dtype, threads=1)
    return Coder(
        "zipnn",
        lambda rows: bytearray(rows.tobytes()),
        coder.compress,
        coder.decompress,
    )


def _openzl(dtype: str) -> Coder:
    """OpenZL's Huffman graph: exponents apart and coded, the rest stored.

    Of float16 the rest is 11 bits in two bytes, which are split and coded as well.
    """
    import openzl.ext as zl  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415  optional

    compressor = zl.Compressor()
    huffman, store = zl.graphs.Huffman()(compressor), zl.graphs.Store()(compressor)
    rest = zl.nodes.TransposeSplit()(compressor, huffman) if dtype == "float16" else store
    node = {
        "bfloat16": zl.nodes.BFloat16Deconstruct,
        "float16": zl.nodes.Float16Deconstruct,
        "float32": zl.nodes.Float32Deconstruct,
    }[dtype]
    compressor.select_starting_graph(node()(compressor, rest, huffman))
    context = zl.CCtx()
    context.ref_compressor(compressor)
    context.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
    context.set_parameter(zl.CParam.StickyParameters, 1)
    opener = zl.DCtx()
    return Coder(
        "openzl",
        lambda rows: rows.reshape(-1),
        lambda rows: context.compress([zl.Input(zl.Type.Numeric, rows)]),
        lambda frame: opener.decompress(frame)[0].content.as_bytes(),
    )
