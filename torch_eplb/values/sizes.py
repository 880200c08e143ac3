"""Sizes in bytes, from numbers and from text."""

from __future__ import annotations

import re

__all__ = ["parse_bytes"]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_bytes(value: int | str, name: str = "value") -> int:
    """Bytes from an int or from text with a unit.

    >>> parse_bytes("64MiB"), parse_bytes("1.5 GB"), parse_bytes(4096)
    (67108864, 1500000000, 4096)

    Raises:
        TypeError: neither int nor str.
        ValueError: not a size, or negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f'{name} must be an int (bytes) or text like "64MiB", got {value!r}')
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = _UNITS.get(match.group(2).upper()) if match else None
        if match is None or unit is None:
            raise ValueError(
                f"{name}={value!r} is not a size: write bytes as an int, or a number with one of "
                "B, KB, MB, GB, KiB, MiB, GiB"
            )
        value = int(float(match.group(1)) * unit)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value
