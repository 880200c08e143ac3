"""Runs a test's function on several real ranks, each in a process of its own.

    def body(rank, world_size, argument): ...      # module level, in the test's file
    results = run_ranks(body, 3, argument)

Processes come from a fork server that has torch imported already, so a rank starts in some
milliseconds. Whatever happens, every process is dead when `run_ranks` returns: at the time limit
they are killed, and the test fails with what each rank was doing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_preloaded = ["torch", "torch.distributed", "torch_eplb.balancer"]
_context.set_forkserver_preload(_preloaded)


def preload(*modules: str) -> None:
    """Have the fork server import these, too: for test files to call when they are imported.

    The server starts with the first test that needs it, when all files have been. What is not
    installed is left out.
    """
    _preloaded.extend(module for module in modules if module not in _preloaded)
    _context.set_forkserver_preload(_preloaded)


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time."""


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 90.0,
    backend: str = "gloo",
    may_die: tuple[int, ...] = (),
) -> list[Any]:
    """Call ``body(rank, world_size, *args)`` on every rank of a fresh process group.

    Args:
        body: a function at module level of a test file.
        world_size: number of ranks.
        args: passed on; must be picklable, and so must what the ranks return.
        timeout: seconds for everything.
        backend: of the default process group; "" starts none.
        may_die: ranks that may be killed by a signal; their result is minus the signal's number.

    Returns:
        What each rank returned.
    """
    source = inspect.getsourcefile(body)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "store")
        common = (rendezvous, backend, timeout)
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_entry,
                args=(theirs, source, body.__qualname__, rank, world_size, args, *common),
                daemon=False,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, processes, time.monotonic() + timeout, may_die)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
                process.close()


def _collect(
    pipes: list[Connection], processes: list[Any], deadline: float, may_die: tuple[int, ...]
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            for rank in waiting.values():
                # The child prints where it hangs (see _entry), which pytest shows.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(processes[rank].pid, signal.SIGUSR1)
                failures[rank] = "was still running at the time limit"
            time.sleep(0.5)
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                processes[rank].join(5)
                code = processes[rank].exitcode
                if rank in may_die and code is not None and code < 0:
                    results[rank] = code
                else:
                    failures[rank] = f"died with exit code {code}"
                continue
            if ok:
                results[rank] = value
            else:
                failures[rank] = value
        if failures and not may_die:
            # The others may wait for the failed rank: give them a moment to say so.
            deadline = min(deadline, time.monotonic() + 10)
    if failures:
        text = "\n".join(f"--- rank {rank}: {failures[rank]}" for rank in sorted(failures))
        raise RankFailed(f"{len(failures)} of {len(pipes)} ranks failed\n{text}")
    return [results[rank] for rank in range(len(pipes))]


def _entry(
    pipe: Connection,
    source: str,
    name: str,
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    rendezvous: str,
    backend: str,
    timeout: float,
) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    try:
        body = getattr(_load(source), name)
        if backend:
            dist.init_process_group(
                backend,
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
        result = body(rank, world_size, *args)
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not through interpreter shutdown: a group whose peer failed may wait in its destructor.
        os._exit(0)


def _load(source: str) -> Any:
    """The test's module, from its file: under importlib mode it has no name to import it by."""
    key = "_rank_body_" + os.path.basename(source).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(key, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    spec.loader.exec_module(module)
    return module
