"""A child interpreter that plans: starting, feeding, reading, naming its death, ending it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_eplb.planner.frames import Frame, FrameReader, FrameWriter, Kind
from torch_eplb.planner.hosts import TERMINATE_SECONDS, HostFailed
from torch_eplb.planner.messages import (
    PlannerSettings,
    ReceivedPlan,
    Refusal,
    Request,
    check_reply,
    one_line,
)
from torch_eplb.values.threads import ONE_THREAD

__all__ = ["ProcessHost"]

_log = logging.getLogger("torch_eplb.planner")

TAIL_BYTES = 2048
"""Of what the child prints, the end is kept, to name the cause of its death."""

EXIT_GRACE_SECONDS = 1.0
"""How long a child whose channel closed may take to exit before that is a cause of its own."""

KILL_SECONDS = 1.0

# The only code that is handed to the child. No import before the path is set: with -c, a file in
# the working directory could stand in for a module of the standard library.
BOOT = (
    "import sys; a = sys.argv[1:4]; sys.path[:] = sys.argv[4:]; del sys.argv[1:]; "
    "from torch_eplb.planner.worker import main; main(a)"
)


class ProcessHost:
    """A child interpreter on the other end of a socket pair.

    Args:
        settings: sent first; the policy must be a name or importable.
        command: the child's command line from its socket's descriptor; tests put stand-ins here.

    Raises:
        HostFailed: the operating system could not start it.
    """

    def __init__(
        self, settings: PlannerSettings, command: Callable[[int], list[str]] | None = None
    ) -> None:
        self._settings = settings
        self._request: Request | None = None
        self._answer: ReceivedPlan | Refusal | None = None
        self._ready = False
        self._closed_at: float | None = None
        self._tail = b""
        self.last_sign = time.monotonic()
        try:
            self._open(command or _command)
        except OSError as error:
            raise HostFailed(one_line(f"planner process could not be started: {error}")) from error
        self._reader = FrameReader(self._socket, [Kind.READY], max_body=0)
        self._writer = FrameWriter(self._socket)
        self._writer.queue(settings.to_frame())
        self._poller = select.poll()
        self._poller.register(self._socket, select.POLLIN | select.POLLOUT)
        self._poller.register(self._output, select.POLLIN)

    def _open(self, command: Callable[[int], list[str]]) -> None:
        with contextlib.ExitStack() as on_error, contextlib.ExitStack() as theirs:
            ours, their_end = socket.socketpair()
            on_error.callback(ours.close)
            theirs.callback(their_end.close)
            read, write = os.pipe()
            on_error.callback(os.close, read)
            theirs.callback(os.close, write)
            self._process = _spawn(command(their_end.fileno()), their_end.fileno(), write)
            on_error.pop_all()
        ours.setblocking(False)
        os.set_blocking(read, False)
        self._socket, self._output = ours, read

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def busy(self) -> bool:
        return not self._ready or self._request is not None

    def start(self, request: Request) -> None:
        self._request = request
        self._expect()
        self._writer.queue(request.to_frame())
        self._watch_for(select.POLLIN | select.POLLOUT)
        self.last_sign = time.monotonic()

    def poll(self) -> ReceivedPlan | Refusal | None:
        for descriptor, event in self._poller.poll(0):
            if descriptor == self._output:
                self._read_output()
            elif self._closed_at is None:
                try:
                    if event & select.POLLOUT:
                        self._write()
                    if event & ~select.POLLOUT:
                        self._read()
                except EOFError:
                    self._poller.unregister(self._socket)
                    self._closed_at = time.monotonic()
        answer, self._answer = self._answer, None
        if answer is None and self._closed_at is not None:
            self._exit()
        return answer

    def overdue(self, limit: float) -> str:
        if self._process.poll() is not None:
            return self._cause_of_death()
        doing = "did not get ready" if not self._ready else "gave no answer"
        return f"planner process {doing} within {limit:g} s"

    def abandon(self) -> None:
        self._process.kill()  # SIGKILL ends stopped processes, too
        self._close_channel()

    def gone(self, patience: float) -> bool:
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        self._close_channel()
        self._process.terminate()
        if not self.gone(TERMINATE_SECONDS):
            self._process.kill()
            self.gone(KILL_SECONDS)

    def disown(self) -> None:
        self._close_channel()
        self._process.returncode = 0  # Popen must neither wait for it nor warn about it

    def _write(self) -> None:
        before = self._writer.bytes_sent
        self._writer.write()
        if self._writer.bytes_sent > before:
            self.last_sign = time.monotonic()
        if not self._writer.pending:
            self._watch_for(select.POLLIN)

    def _read(self) -> None:
        before = self._reader.bytes_received
        try:
            frame = self._reader.read()
            if frame is not None:
                self._accept(frame)
        except EOFError:
            raise
        except Exception as error:  # a border: no bytes from outside may raise in the server
            raise HostFailed(one_line(f"answer refused: {error}")) from error
        if self._reader.bytes_received > before:
            self.last_sign = time.monotonic()

    def _accept(self, frame: Frame) -> None:
        if not self._ready:
            self._ready = True
        elif self._request is not None:
            self._answer = check_reply(frame, self._request, self._settings)
            self._request = None
        self._expect()

    def _expect(self) -> None:
        """Tell the reader what may come next: whatever was not asked for is refused unread."""
        self._reader.max_body = 0
        if not self._ready:
            self._reader.kinds = frozenset([Kind.READY])
        elif self._request is None:
            self._reader.kinds = frozenset()
        else:
            self._reader.kinds = frozenset([Kind.REPLY, Kind.ERROR])
            self._reader.max_body = self._request.reply_limit()

    def _exit(self) -> None:
        """The channel is closed: raise with the cause, once the process has exited."""
        if self._process.poll() is not None:
            raise HostFailed(self._cause_of_death())
        if time.monotonic() - (self._closed_at or 0.0) > EXIT_GRACE_SECONDS:
            raise HostFailed("planner process closed its channel")

    def _cause_of_death(self) -> str:
        self._read_output()
        status = self._process.returncode
        if status < 0:
            try:
                name = signal.Signals(-status).name
            except ValueError:
                name = f"signal {-status}"
            if -status == signal.SIGKILL:
                return "planner process was killed by SIGKILL (by the system, if memory ran out)"
            ended = f"was killed by {name}"
        else:
            ended = f"exited with status {status}"
        lines = self._tail.decode(errors="replace").strip().splitlines()
        return one_line(f"planner process {ended}" + (f": {lines[-1]}" if lines else ""))

    def _read_output(self) -> None:
        if self._output < 0:
            return
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return
        if not data:
            self._poller.unregister(self._output)
            self._close_output()
            return
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        _log.debug("planner process prints: %s", one_line(data.decode(errors="replace")))

    def _watch_for(self, events: int) -> None:
        if self._closed_at is None:
            self._poller.modify(self._socket, events)

    def _close_channel(self) -> None:
        self._socket.close()
        self._close_output()

    def _close_output(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1


def _command(descriptor: int) -> list[str]:
    # Only the main thread surely lives as long as the process; see worker._settle.
    lasting = threading.current_thread() is threading.main_thread()
    path = [os.path.abspath(p) for p in sys.path if isinstance(p, str)]
    # Last, so that it decides nothing unless the package is found in no other way.
    path.append(str(Path(__file__).resolve().parents[2]))
    arguments = [str(descriptor), str(os.getpid()), str(int(lasting)), *path]
    return [sys.executable or "python3", "-u", "-c", BOOT, *arguments]


def _spawn(command: list[str], channel: int, output: int) -> subprocess.Popen[bytes]:
    # Its own process group from the first instruction on; before Python 3.11 the child sets it.
    group: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[channel],
        env={**os.environ, **ONE_THREAD},
        **group,
    )
