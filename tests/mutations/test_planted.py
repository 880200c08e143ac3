"""The list of planted faults is up to date; `python tests/mutations` says who catches them."""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # where `python tests/mutations` finds it, too

from planted import FAULTS, ROOT, Fault
from planted_on_devices import FAULTS_ON_DEVICES

ALL = FAULTS + FAULTS_ON_DEVICES


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted_and_its_tests_exist(fault: Fault, tmp_path: Path) -> None:
    (tmp_path / "torch_eplb" / fault.file).parent.mkdir(parents=True)
    target = tmp_path / "torch_eplb" / fault.file
    shutil.copy(ROOT / "torch_eplb" / fault.file, target)
    fault.plant(tmp_path)
    ast.parse(target.read_text())
    assert fault.tests
    for test in fault.tests:
        path, _, name = test.partition("[")[0].partition("::")
        assert (ROOT / path).exists(), test
        assert f"def {name}(" in (ROOT / path).read_text() if name else True, test


def test_the_page_on_devices_names_the_test_of_each_fault() -> None:
    rows = [line for line in (ROOT / "docs/devices.md").read_text().splitlines() if "::" in line]
    told = {}
    for row in rows:
        *_, tests, fault = (cell.strip() for cell in row.strip("|").split("|"))
        path, _, name = tests.strip("`").partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), row
        told[fault] = tests.strip("`")
    known = {fault.name: fault for fault in ALL}
    assert set(told) - {""} <= set(known)
    for fault in FAULTS_ON_DEVICES:
        assert told[fault.name] in [test.partition("[")[0] for test in fault.tests], fault.name


def test_names_are_their_own() -> None:
    names = [fault.name for fault in ALL]
    assert len(set(names)) == len(names) >= 40
