"""Forked processes, as users make them without thinking of process groups and planners."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable


def in_fork(act: Callable[[], None]) -> None:
    """Run ``act`` in a forked process, which must end well and soon."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise TimeoutError("the forked process hangs")
        time.sleep(0.01)
    assert ended[1] == 0
