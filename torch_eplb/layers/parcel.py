"""What travels with a token in one message: different dtypes, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Parcel"]


@dataclass(frozen=True)
class Parcel:
    """Hidden states, weights and integers of a row, one after the other in bytes.

    Attributes:
        fields: dtype and entries of each.
    """

    fields: tuple[tuple[torch.dtype, int], ...]

    @classmethod
    def of(cls, hidden: torch.Tensor, weights: torch.Tensor, *, integers: int = 0) -> Parcel:
        """Of rows as those of ``hidden [_, H]`` and ``weights [_, K]``, and so many int32."""
        return cls(
            (
                (hidden.dtype, hidden.shape[1]),
                (weights.dtype, weights.shape[1]),
                (torch.int32, integers),
            )
        )

    def _ends(self) -> list[int]:
        """Where each field ends; the next begins at a multiple of eight bytes."""
        ends, position = [], 0
        for dtype, entries in self.fields:
            position = -(-position // 8) * 8 + entries * dtype.itemsize
            ends.append(position)
        return ends

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Bytes of as many rows as ``like`` has, uninitialised."""
        width = -(-self._ends()[-1] // 8) * 8
        return like.new_empty((len(like), width), dtype=torch.uint8)

    def pack(self, *values: torch.Tensor) -> torch.Tensor:
        """Bytes of all rows, with the first fields' values ``[rows, entries]``."""
        buffer = self.empty(values[0])
        for field, given in zip(self.open(buffer), values, strict=False):
            field.copy_(given)
        return buffer

    def open(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The fields of all rows, as views ``[rows, entries]``."""
        return [
            buffer[:, end - entries * dtype.itemsize : end].view(dtype)
            for (dtype, entries), end in zip(self.fields, self._ends(), strict=True)
        ]
