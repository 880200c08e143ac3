"""What a process holds, for tests that nothing is left behind."""

from __future__ import annotations

import gc

import psutil


def levels() -> dict[str, int]:
    """Of this process, after collecting garbage."""
    gc.collect()
    process = psutil.Process()
    return {
        "threads": process.num_threads(),
        "file descriptors": process.num_fds(),
        "child processes": len(process.children()),
        "shared memory": sum("/dev/shm" in m.path for m in process.memory_maps()),
        "MiB": process.memory_info().rss >> 20,
    }
