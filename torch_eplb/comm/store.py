"""A store whose calls end: torch's wait without a limit for a server that is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

__all__ = ["BoundedStore", "StoreGone"]

_T = TypeVar("_T")


class StoreGone(Exception):
    """The store did not answer in time, or whoever holds it has ended."""


class BoundedStore:
    """The calls of a store that all ranks share, each with a time limit.

    A call that does not come back is left to its thread; until it does, further calls fail at once.

    Args:
        store: of `torch.distributed`.
        limit: seconds that a call may take.
    """

    def __init__(self, store: dist.Store, limit: float = 0.5) -> None:
        self._store = store
        self._limit = limit
        self._hanging: threading.Event | None = None

    def set(self, key: str, value: str) -> None:
        """Write a value."""
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> str | None:
        """A value, or None where there is none yet."""
        return self._call(lambda: self._store.get(key).decode() if self._has(key) else None)

    def has(self, key: str) -> bool:
        """Whether somebody has written ``key``."""
        return self._call(lambda: self._has(key))

    def add(self, key: str, amount: int) -> int:
        """Count; returns the sum so far."""
        return self._call(lambda: int(self._store.add(key, amount)))

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _call(self, call: Callable[[], _T]) -> _T:
        if self._hanging is not None and not self._hanging.is_set():
            raise StoreGone("an earlier call has not come back")
        done = threading.Event()
        outcome: list[_T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                outcome.append(call())
            except Exception as error:  # the caller gets it
                errors.append(error)
            finally:
                done.set()

        try:
            threading.Thread(target=run, name="torch_eplb-store", daemon=True).start()
        except RuntimeError as error:  # no thread to be had, or the interpreter ends
            raise StoreGone(str(error)) from error
        if not done.wait(self._limit):
            self._hanging = done
            raise StoreGone(f"no answer within {self._limit:g} s")
        if errors:
            raise StoreGone(str(errors[0])) from errors[0]
        return outcome[0]
