"""The shell commands of the documentation, checked without running them.

What is checked is what can be wrong: that programs, files, tox environments, extras and variables
exist, and that a program's own parser takes the arguments.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.pages import Block, PageError
from support.programs import ROOT, run
from support.ranks import run_ranks

__all__ = ["Command", "check", "split"]


def parse_only(rank: int, world_size: int, kind: str, program: str, arguments: list[str]) -> str:
    """Run a program up to where it has parsed its arguments; what it has said. A process's body."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        parse(self, *args, **kwargs)
        raise _ParsedError

    argparse.ArgumentParser.parse_args = stop  # type: ignore[method-assign]
    sys.argv = [program, *arguments]
    said = io.StringIO()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if kind == "module":
                runpy.run_module(program, run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, os.path.dirname(program))
                runpy.run_path(program, run_name="__main__")
    except _ParsedError:
        return "the arguments are right"
    except SystemExit:
        return said.getvalue()
    return "the program has not parsed its arguments"


class _ParsedError(BaseException):
    """The arguments were right; not to be caught by the program."""


def collect_only(rank: int, world_size: int, arguments: list[str]) -> str:
    """What pytest says that it would run. A process's body."""
    import pytest

    said = io.StringIO()
    os.chdir(ROOT)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        pytest.main(["--collect-only", "-q", "-s", "-p", "no:cacheprovider", *arguments])
    return said.getvalue()


class Command:
    """One command of a block: variables that are set before it, and its words."""

    def __init__(self, words: list[str]) -> None:
        self.variables: dict[str, str] = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            self.variables[name] = value
        self.words = words


def split(code: str) -> list[Command]:
    """The commands of a block; ``&&`` separates two, and a backslash joins lines."""
    commands: list[Command] = []
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                commands.append(Command(words))
                words = []
    return commands


def check(command: Command, block: Block, others: list[Block]) -> None:
    """Check one command.

    Args:
        command: of the block.
        block: named in errors.
        others: the blocks of its page, whose programs it may name.

    Raises:
        AssertionError: something is wrong with it.
        PageError: no check knows this program.
    """
    for name in command.variables:
        known = name == "OMP_NUM_THREADS" or any(
            f'"{name}"' in path.read_text(encoding="utf-8")
            for path in [*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("torch_eplb/**/*.py")]
        )
        assert known, f"{block}: nothing reads the variable {name}"
    if command.words[0] == "torchrun":
        _check_torchrun(command.words[1:], block, others)
        return
    if command.words[0] != "python":
        raise PageError(f"{block}: no check knows the program {command.words[0]}")
    if command.words[1] != "-m":
        check_script(command.words[1], command.words[2:])
        return
    module, arguments = command.words[2], command.words[3:]
    if module not in MODULES:
        raise PageError(f"{block}: no check knows python -m {module}")
    MODULES[module](arguments)


def check_script(script: str, arguments: list[str]) -> None:
    assert (ROOT / script).is_file(), f"{script} does not exist"
    output = _parse("path", script, tuple(arguments))
    assert "the arguments are right" in output, output
    _check_files(arguments)


def _check_our_module(arguments: list[str]) -> None:
    output = _parse("module", "torch_eplb", tuple(arguments))
    assert "the arguments are right" in output, output
    _check_files(arguments)


@functools.cache
def _parse(kind: str, program: str, arguments: tuple[str, ...]) -> str:
    # In a process of its own, of those that have torch imported already.
    return str(run_ranks(parse_only, 1, kind, program, list(arguments), backend="")[0])


def _check_files(arguments: list[str]) -> None:
    """Files that are read exist; those behind ``--out`` and ``--json`` are written."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if "/" in word and before not in ("--out", "--json"):
            assert (ROOT / word).exists(), f"{word} does not exist"


def _check_tox(arguments: list[str]) -> None:
    """The environment exists, and its program takes what is behind the two dashes."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = arguments[:end], arguments[end + 1 :]
    names = options[1].split(",") if options else tox["tox"]["envlist"].split(", ")
    assert options[:1] in ([], ["-e"]), f"tox {options}"
    for name in names:
        assert f"testenv:{name}" in tox, f"tox.ini has no environment {name}"
        commands = tox[f"testenv:{name}"]["commands"]
        program = commands.split()
        if rest:
            takes = re.search(r"\{posargs(:[^}]*)?\}$", commands)
            assert takes, f"the environment {name} takes no arguments"
        if rest and program[:3] == ["python", "-m", "pytest"]:
            output = run_ranks(collect_only, 1, rest, backend="")[0]
            assert re.search(r"[1-9]\d*(/\d+)? tests? collected", output), output
        elif program[0] == "python" and program[1].endswith(".py"):
            check_script(program[1], rest)


def _check_pip(arguments: list[str]) -> None:
    """It installs what setup.cfg names."""
    assert arguments[0] == "install", arguments
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    named = {re.split(r"[><=]", line)[0] for extra in extras.values() for line in extra.split()}
    for requirement in arguments[1:]:
        name, _, wanted = requirement.rstrip("]").partition("[")
        assert name in named | {".", setup["metadata"]["name"]}, f"setup.cfg does not name {name}"
        assert all(extra in extras for extra in wanted.split(",") if extra), requirement


def _check_torchrun(arguments: list[str], block: Block, others: list[Block]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    if (ROOT / parsed.training_script).is_file():
        check_script(parsed.training_script, parsed.training_script_args)
        return
    programs = [other for other in others if other.word("file") == parsed.training_script]
    assert len(programs) == 1, f"{block}: no block of the page is {parsed.training_script}"
    tested = programs[0].number("torchrun")
    assert tested in (0, int(parsed.nproc_per_node)), f"{block}: other ranks"


MODULES: dict[str, Callable[[list[str]], None]] = {
    "torch_eplb": _check_our_module,
    "tox": _check_tox,
    "pip": _check_pip,
}


def run_all(commands: list[Command], folder: Path) -> None:
    """Run our own commands one after the other, where ``examples/`` is; files they write exist."""
    (folder / "examples").symlink_to(ROOT / "examples")
    for command in commands:
        assert command.words[:3] == ["python", "-m", "torch_eplb"], command.words
        run(*command.words[1:], cwd=folder)
        for before, word in zip(command.words, command.words[1:], strict=False):
            if before in ("--out", "--json"):
                assert (folder / word).stat().st_size > 0, word
