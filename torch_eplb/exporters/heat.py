"""Heat maps without a drawing library: a colour for every number, and a PNG file of them.

Imports numpy only.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RAMP", "heat", "png", "relative"]

# From below the mean through white, which is the mean, to far above it; blue and red are told
# apart by all, and printed in grey both are darker than white.
RAMP = np.array(
    [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]],
    dtype=np.float64,
)


def relative(load: NDArray[Any]) -> NDArray[np.float64]:
    """Each row over its mean; 1 in rows without load."""
    load = np.asarray(load, dtype=np.float64)
    mean = load.mean(axis=-1, keepdims=True)
    return np.divide(load, mean, out=np.ones_like(load), where=mean > 0)


def heat(values: NDArray[Any], most: float) -> NDArray[np.uint8]:
    """Colours ``[rows, columns, 3]`` of numbers around 1.

    Args:
        values: ``[rows, columns]``; 1 is white.
        most: what gets the darkest red; 0 gets the darkest blue.
    """
    values = np.asarray(values, dtype=np.float64)
    above = (values - 1) / max(most - 1, 1e-9)
    place = np.clip(np.where(values > 1, above, values - 1), -1, 1) * 2 + 2
    low = np.clip(np.floor(place).astype(int), 0, len(RAMP) - 2)
    part = (place - low)[..., None]
    return np.rint(RAMP[low] * (1 - part) + RAMP[low + 1] * part).astype(np.uint8)


def png(colours: NDArray[np.uint8]) -> bytes:
    """``[rows, columns, 3]`` as a PNG file, a pixel per entry."""
    rows, columns, _ = colours.shape
    # Every row is preceded by its filter, which is none.
    lines = np.zeros((rows, 1 + 3 * columns), dtype=np.uint8)
    lines[:, 1:] = colours.reshape(rows, -1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
