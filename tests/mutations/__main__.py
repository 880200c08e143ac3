"""Plants faults in the package, one at a time, and runs the tests that must notice each.

    python tests/mutations                     # all of them, and the table of who catches what
    python tests/mutations --sample 8          # some, others on every day
    python tests/mutations lost-agreement      # those whose names contain this
    python tests/mutations --npu               # those that only a device shows; tox -e npu does it

Each fault is planted in a copy of the tree, so the tree itself is never touched and several can be
tried at once. A fault is caught when a test fails; tests that cannot even be collected catch
nothing. The exit status is 1 if a fault is not caught.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from planted import FAULTS, ROOT, Fault
from planted_on_devices import FAULTS_ON_DEVICES

LIMIT_SECONDS = 300.0
_TESTS_FAILED = 1  # pytest's exit status


@dataclass(frozen=True)
class Outcome:
    """What the tests said to a fault; ``caught_by`` is None if nothing noticed."""

    fault: Fault
    caught_by: str | None
    seconds: float
    output: str


def copy_tree(target: Path) -> None:
    """The package and its tests, and what the tests read."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, target, ignore=ignored)


def try_out(fault: Fault) -> Outcome:
    """Plant a fault in a copy of the tree, and run its tests there."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        fault.plant(tree)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line"]
        path = os.pathsep.join((str(tree), str(tree / "tests")))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            result = subprocess.run(
                [*command, "-p", "no:cacheprovider", *fault.tests],
                cwd=tree,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace")
            return Outcome(fault, "the time limit", time.monotonic() - start, output)
    failed = re.search(r"^FAILED (\S+)", result.stdout, re.MULTILINE)
    caught = failed.group(1) if failed and result.returncode == _TESTS_FAILED else None
    return Outcome(fault, caught, time.monotonic() - start, result.stdout)


def row(outcome: Outcome, chosen: Sequence[Fault]) -> str:
    """A row of the table: what was planted where, and who has noticed."""
    fault, caught = outcome.fault, outcome.caught_by or "NOT CAUGHT"
    caught = caught.removeprefix("tests/").split("[")[0]
    name = fault.name.ljust(max(len(each.name) for each in chosen))
    file = fault.file.ljust(max(len(each.file) for each in chosen))
    return f"{name}  {file}  {outcome.seconds:4.0f} s  {caught}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/mutations", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of faults; all by default")
    parser.add_argument("--sample", type=int, help="try only so many, drawn by the day")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults at once")
    parser.add_argument("--npu", action="store_true", help="faults that only a device shows")
    options = parser.parse_args()
    if options.npu and "TORCH_EPLB_NPU_SIM" not in os.environ:
        parser.error("--npu needs torch_npu on a simulated CANN: python -m tox -e npu")
    faults = FAULTS_ON_DEVICES if options.npu else FAULTS
    chosen = [f for f in faults if not options.names or any(n in f.name for n in options.names)]
    if not chosen:
        parser.error(f"no fault has a name with any of {', '.join(options.names)}")
    if options.sample is not None and options.sample < len(chosen):
        draw = random.Random(datetime.date.today().toordinal())
        chosen = draw.sample(chosen, options.sample)
    missed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(try_out, chosen):
            print(row(outcome, chosen), flush=True)
            if outcome.caught_by is None:
                missed.append(outcome)
    for outcome in missed:
        print(f"\n{outcome.fault.name}: what its tests said\n{outcome.output[-2000:]}")
    print(f"\n{len(chosen) - len(missed)} of {len(chosen)} planted faults were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
