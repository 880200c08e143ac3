"""Progress bars: drawn for people, never into a pipe."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from torch_eplb.offline.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_drawn_when_nobody_looks() -> None:
    stream = io.StringIO()
    with progress_bar(stream) as progress:
        assert progress is None
    assert stream.getvalue() == ""


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_terminal_sees_label_and_steps(with_rich: bool, monkeypatch: Any) -> None:
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = Terminal()
    with progress_bar(stream) as progress:
        assert progress is not None
        for done in (10, 20):
            progress("flow", done, 20)
    assert "flow" in stream.getvalue()
    assert "20/20" in stream.getvalue()
    assert "steps" in stream.getvalue()
