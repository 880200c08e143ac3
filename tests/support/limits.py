"""A time limit for tests that could hang."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator

import pytest

LIMIT = 60


@pytest.fixture(autouse=True)
def hard_limit() -> Iterator[None]:
    """Fail a test that hangs; end the whole run if even that is not possible."""

    def overdue(*_: object) -> None:
        raise TimeoutError(f"the test took more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, overdue)
    signal.alarm(LIMIT)
    faulthandler.dump_traceback_later(2 * LIMIT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
