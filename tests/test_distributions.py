"""The source distribution and the wheel: what is in them, and that what is installed runs.

With ``tox -e build`` the same is done as a packager does it, in environments of their own.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.pages import pages
from support.programs import ROOT, run

import torch_eplb

BUILD = "import setuptools.build_meta as build; print(build.build_{0}('dist'))"


def build_sdist(folder: Path) -> Path:
    """Of what git knows of, as from a clean clone."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if known.returncode:
        pytest.skip(f"git does not know this folder: {known.stderr.strip()}")
    for name in known.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("examples/data/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder / "dist" / run("-c", BUILD.format("sdist"), cwd=folder).splitlines()[-1]


def build_wheel(sdist: Path, folder: Path) -> Path:
    """Of the source distribution alone."""
    with tarfile.open(sdist) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source / "dist" / run("-c", BUILD.format("wheel"), cwd=source).splitlines()[-1]


def has_the_pages_and_their_site(sdist: Path) -> None:
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {path for path in pages() if not path.startswith("examples/")} <= names
    assert {"docs/site/conf.py", "docs/pictures/par_over_time.png", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith("tests/")]


def has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    info = f"torch_eplb-{torch_eplb.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"torch_eplb", info}
    assert f"{info}/licenses/LICENSE" in names
    files = [*(ROOT / "torch_eplb").rglob("*.py"), ROOT / "torch_eplb" / "py.typed"]
    ours = {str(path.relative_to(ROOT)) for path in files}
    assert {name for name in names if name.startswith("torch_eplb/")} == ours


def runs_where_it_is_installed(wheel: Path, folder: Path) -> None:
    place = folder / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(wheel))
    smoke = ROOT / "tests" / "support" / "smoke.py"
    said = run(str(smoke), str(ROOT), cwd=folder, environment={"PYTHONPATH": str(place)})
    assert "collecting load" in said


def test_what_is_built_is_whole_and_runs(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    for name in ("source", "unpacked"):
        (tmp_path / name).mkdir()
    sdist = build_sdist(tmp_path / "source")
    has_the_pages_and_their_site(sdist)
    wheel = build_wheel(sdist, tmp_path / "unpacked")
    has_the_package_and_nothing_else(wheel)
    runs_where_it_is_installed(wheel, tmp_path)
