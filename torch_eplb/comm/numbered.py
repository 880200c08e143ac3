"""Objects by number: graphs and their operations hold numbers, and keep nothing alive by them."""

from __future__ import annotations

import itertools
import weakref
from typing import Generic, TypeVar

__all__ = ["Numbered"]

_T = TypeVar("_T")


class Numbered(Generic[_T]):
    """Numbers objects; forgets those that nobody else holds.

    >>> class Model: pass
    >>> models, model = Numbered(), Model()
    >>> models.get(models.add(model)) is model
    True
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._held: weakref.WeakValueDictionary[int, _T] = weakref.WeakValueDictionary()

    def add(self, held: _T) -> int:
        """A number for ``held``, of its own."""
        number = next(self._numbers)
        self._held[number] = held
        return number

    def get(self, number: int) -> _T | None:
        """What has the number, or None if it is gone."""
        return self._held.get(number)
