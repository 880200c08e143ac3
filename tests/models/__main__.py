"""Tries every MoE architecture of the installed transformers, and writes the table of them.

    python tests/models                            # all, and docs/models.md
    python tests/models mixtral qwen3_next         # these, and nothing is written

Each is shrunk to a few thousand parameters, drawn at random and wrapped on two ranks; see
`sweep.Trial` for what is compared. The exit status is 1 if a model that is not refused does
something else than the unwrapped one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from models import shrink, sweep, table  # noqa: E402

PAGE = ROOT / "docs" / "models.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="model types; default all")
    arguments = parser.parse_args()
    known = [name for name, _, _ in shrink.architectures()]
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"no model type with experts: {', '.join(unknown)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = sweep.sweep(arguments.names or known, folder, print)
    outcomes = table.outcomes(found)
    below = table.written(outcomes, time.monotonic() - began)
    print(below)
    if not arguments.names:
        above, mark, _ = PAGE.read_text(encoding="utf-8").partition(table.MARK)
        PAGE.write_text(f"{above}{mark}\n{below}", encoding="utf-8")
    return int(any(outcome.is_wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
