"""Builds the simulated CANN for the installed torch_npu, in seconds, with g++ and nm.

    python -m npu_sim.build FOLDER

The wheel has the headers that the sources are compiled against, so that the compiler checks every
signature; and the wheel's libraries say which functions they want to be linked to. Those that the
sources do not define become stubs, which say so and return an error when they are called.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["LIBRARIES", "build"]

SOURCES = Path(__file__).parent / "src"
FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror")
RUNTIME, OPERATORS = "libascendcl.so", "libopapi.so"
# Further names under which the wheel links or opens what is in the first two.
ALIASES = {
    RUNTIME: (
        "libhccl.so",
        "libacl_op_compiler.so",
        "libge_runner.so",
        "libgraph.so",
        "libacl_tdt_channel.so",
        "libhcomm.so",
    ),
    OPERATORS: ("libcust_opapi.so",),
}
LIBRARIES = (RUNTIME, *ALIASES[RUNTIME], OPERATORS, *ALIASES[OPERATORS])
"""In the order in which they must be loaded."""

_CANN = re.compile(r"(acl|Hccl|rt[A-Z]|Msprof)\w*")
_NOT_SUPPORTED = {"Hccl": 5, "": 207000}  # HCCL_E_NOT_SUPPORT, ACL_ERROR_RT_FEATURE_NOT_SUPPORT


def build(folder: Path) -> Path:
    """Build into ``folder``, unless what is there is up to date.

    Raises:
        RuntimeError: a tool or torch_npu is missing (the message says what to install), or a source
            does not compile.
    """
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"the simulated NPU is built with {' and '.join(missing)}, not found here: install a "
            "C++ compiler (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)"
        )
    wheel = _find_wheel()
    stamp, wanted = folder / "stamp", _fingerprint(wheel)
    if not (stamp.exists() and stamp.read_text() == wanted):
        folder.mkdir(parents=True, exist_ok=True)
        _compile_all(wheel, folder)
        stamp.write_text(wanted)
    return folder


def _find_wheel() -> Path:
    """The folder of torch_npu, which is not imported: that takes what is to be built here."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "torch_npu is not installed: pip install --no-deps torch-npu==2.13.0 (tox -e npu does)"
        )
    return Path(spec.origin).parent


def _fingerprint(wheel: Path) -> str:
    """Changes with whatever the libraries are made from."""
    parts = [Path(__file__).read_bytes(), str(wheel).encode(), (wheel / "version.py").read_bytes()]
    parts += [source.read_bytes() for source in sorted(SOURCES.iterdir())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _compile_all(wheel: Path, folder: Path) -> None:
    includes = [f"-I{wheel / 'include'}", f"-I{wheel / 'include/third_party/acl/inc'}"]
    with tempfile.TemporaryDirectory() as scratch:
        objects = {source: Path(scratch, f"{source.stem}.o") for source in SOURCES.glob("*.cpp")}

        def compile_one(source: Path) -> None:
            _run("g++", *FLAGS, *includes, "-c", source, "-o", objects[source])

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, objects))
        operators = objects.pop(SOURCES / "opapi.cpp")
        stubs = Path(scratch, "stubs.cpp")
        stubs.write_text(_stubs(_undefined(wheel) - _defined(*objects.values())))
        _link(folder, RUNTIME, *objects.values(), stubs)
        _link(folder, OPERATORS, operators, needs=RUNTIME)
    for library, names in ALIASES.items():
        for name in names:
            _link(folder, name, needs=library)


def _link(folder: Path, name: str, *inputs: Path, needs: str | None = None) -> None:
    needed = ["-Wl,--no-as-needed", folder / needs] if needs else []
    path = folder / name
    _run("g++", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", path, *inputs, *needed, "-pthread")


def _undefined(wheel: Path) -> set[str]:
    """The functions of CANN that the wheel's libraries are linked to."""
    names = set()
    for library in [*wheel.glob("_C*.so"), *wheel.glob("lib/*.so")]:
        names |= _symbols("-D", "--undefined-only", library)
    return {name for name in names if _CANN.fullmatch(name)}


def _defined(*objects: Path) -> set[str]:
    return _symbols("--defined-only", *objects)


def _symbols(*arguments: str | Path) -> set[str]:
    lines = _run("nm", *arguments).splitlines()
    return {line.split()[-1] for line in lines if line and not line.endswith(":")}


def _stubs(names: set[str]) -> str:
    # Said once, however often it is called.
    lines = ["#include <atomic>", "#include <cstdio>", 'extern "C" {']
    for name in sorted(names):
        code = next(value for prefix, value in _NOT_SUPPORTED.items() if name.startswith(prefix))
        say = f'fprintf(stderr, "[npu_sim] {name} is not simulated\\n")'
        once = f"static std::atomic_flag said; if (!said.test_and_set()) {say};"
        lines.append(f"long {name}() {{ {once} return {code}; }}")
    return "\n".join([*lines, "}", ""])


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
