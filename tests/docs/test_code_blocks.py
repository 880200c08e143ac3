"""Every block of code in the documentation runs, or is checked as far as it can be.

How a block is tested stands in a hidden comment before it; see `support.pages`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from support import page_commands, page_jobs
from support.page_setups import PRELUDES, SETUPS, run_blocks
from support.pages import Block, PageError, find_blocks, pages, program, text_of
from support.programs import ROOT, run
from support.ranks import preload, run_ranks

from torch_eplb.files.expert_map import parse_expert_map

preload("transformers.models.qwen3_moe.modeling_qwen3_moe")


def blocks(page: str) -> list[Block]:
    return list(find_blocks(text_of(page), page))


def all_blocks(language: str) -> list[Block]:
    """Of all pages, up to a block that cannot be tested; the page's own test fails then."""
    found = []
    for page in pages():
        with contextlib.suppress(PageError):
            for block in find_blocks(text_of(page), page):
                found += [block] if block.language == language else []
    return found


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_can_be_tested(page: str) -> None:
    for block in blocks(page):
        known = PRELUDES if is_program(block) else SETUPS
        assert block.word("setup") in {None, *known}, f"{block}: there is no such setup"


def is_program(block: Block) -> bool:
    return "torchrun" in block.words or "launched" in block.words


def stories() -> list[list[Block]]:
    """Blocks of a page that run in the same setup run in one, in order; programs each by itself."""
    found: dict[Any, list[Block]] = {}
    for block in all_blocks("python"):
        lone = is_program(block) or block.word("setup") is None
        shared = (block.page, block.number("ranks"), block.word("setup"))
        found.setdefault(str(block) if lone else shared, []).append(block)
    return list(found.values())


def name_of(story: list[Block]) -> str:
    return "+".join([str(story[0]), *(str(block.line) for block in story[1:])])


@pytest.mark.parametrize("story", stories(), ids=name_of)
def test_a_block_of_python_runs(story: list[Block], tmp_path: Path) -> None:
    block = story[0]
    if is_program(block):
        run_program(block, tmp_path)
        return
    ranks = block.number("ranks")
    codes = [(part.code, part.page, part.line) for part in story]
    setup = block.word("setup") or "nothing"
    backend = "gloo" if ranks else ""
    run_ranks(run_blocks, max(ranks, 1), codes, setup, str(tmp_path), backend=backend)


def run_program(block: Block, folder: Path) -> None:
    """With torchrun; what replaces a part of a program is as if started by it, which is faster."""
    setup = block.word("setup")
    ranks = block.number("torchrun") or block.number("launched")
    device = block.word("device")
    without_device = device is not None and not has_devices(device, ranks)
    code = program(block, blocks(block.page), without_device=without_device)
    code = (PRELUDES[setup] if setup and without_device else "") + code
    if "into" in block.words or "launched" in block.words:
        with socket.create_server(("localhost", 0)) as server:
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
        codes = [(code, f"{block}'s program", 1)]
        run_ranks(run_blocks, ranks, codes, "nothing", str(folder), address, backend="")
        return
    path = folder / (block.word("file") or "program.py")
    path.write_text(code)
    output = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        str(path),
        cwd=folder,
        environment={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    assert "Traceback" not in output, output


def has_devices(kind: str, number: int) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return (
        accelerator is not None
        and accelerator.type == kind
        and torch.accelerator.device_count() >= number
    )


@pytest.mark.parametrize("block", all_blocks("sh"), ids=str)
def test_the_commands_of_a_block_are_right(block: Block, tmp_path: Path) -> None:
    commands = page_commands.split(block.code)
    assert commands
    for command in commands:
        page_commands.check(command, block, blocks(block.page))
    if "run" in block.words:
        page_commands.run_all(commands, tmp_path)


@pytest.mark.parametrize("block", all_blocks("json"), ids=str)
def test_a_block_of_json_is_what_it_is_said_to_be(block: Block) -> None:
    layers, experts, ranks = map(int, str(block.word("expert_map")).split("x"))
    parse_expert_map(block.code, num_layers=layers, num_experts=experts, num_ranks=ranks)


@pytest.mark.parametrize("block", all_blocks("bash"), ids=str)
def test_a_job_of_slurm_can_be_submitted(block: Block, tmp_path: Path) -> None:
    page_jobs.check_slurm(block.code, tmp_path)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_a_block_of_yaml_is_what_it_is_said_to_be(block: Block) -> None:
    if "kubernetes" in block.words:
        page_jobs.check_kubernetes(block.code)
    else:
        page_jobs.check_alerts(block.code)


def test_the_readme_is_read_in_a_sitting() -> None:
    assert len(text_of("README.md").splitlines()) <= 200


# ---- the tests of these tests -------------------------------------------------------------------

FENCE = "```"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{FENCE}python\nx = 1\n{FENCE}\n", "say how it is tested"),
        (f"{FENCE}\nx = 1\n{FENCE}\n", "no test knows the language ''"),
        (f"{FENCE}cobol\n{FENCE}\n", "no test knows the language 'cobol'"),
        (f"<!-- test: alone, dance -->\n{FENCE}python\n{FENCE}\n", "unknown .*: dance"),
        (f"<!-- test: alone, ranks=2 -->\n{FENCE}python\n{FENCE}\n", "say how it is tested"),
        ("<!-- test: alone -->\n\nA sentence.\n", "page.md:1: .* no block of code"),
        ("<!-- test: alone -->\n", "no block of code"),
        ("A sentence.\n\n    python x.py\n", "page.md:3: code is fenced"),
        (f"{FENCE}text\npython x.py\n{FENCE}\n", "looks like code"),
        (f"{FENCE}json\n{{}}\n{FENCE}\n", "say what it is"),
        (f"{FENCE}yaml\na: 1\n{FENCE}\n", "say what it is: one of"),
        (f"{FENCE}sh\npython x.py\n", "never closed"),
        (f"see {FENCE}sh\n", "a line of its own"),
    ],
)
def test_a_block_that_no_test_knows_is_an_error(text: str, message: str) -> None:
    with pytest.raises(PageError, match=message):
        list(find_blocks(text, "page.md"))


def test_blocks_are_found_with_their_lines_and_words() -> None:
    text = f"# T\n\n<!-- test: ranks=2, setup=moved -->\n{FENCE}python\nx = 1\ny = 2\n{FENCE}\n"
    (block,) = find_blocks(text, "page.md")
    assert (block.line, block.language, block.code) == (5, "python", "x = 1\ny = 2\n")
    assert block.words == {"ranks": ["2"], "setup": ["moved"]}


def test_a_block_that_is_wrong_fails_with_its_page_and_line(tmp_path: Path) -> None:
    block = Block("docs/page.md", 7, "python", "x = 1\nassert x == 2\n", {"alone": [""]})
    with pytest.raises(AssertionError, match=r"docs/page\.md\", line 8"):
        test_a_block_of_python_runs([block], tmp_path)


def test_a_part_of_a_program_takes_the_place_of_the_lines_that_it_begins_and_ends_like() -> None:
    whole = Block(
        "p.md", 1, "python", "import a\nx = f(1)  # one\ny = 2\nd.init('cpu')\nend()\n",
        {"torchrun": ["2"], "file": ["a.py"]},
    )  # fmt: skip
    words = {"torchrun": ["2"], "into": ["a.py"], "else": ["'gpu':'cpu'"]}
    part = Block("p.md", 9, "python", "x = f('gpu')\nd.init('nccl')\n", words)
    expected = "import a\nx = f({})\nd.init('nccl')\nend()\n"
    for without, device in ((False, "'gpu'"), (True, "'cpu'")):
        assert program(part, [whole], without_device=without) == expected.format(device)
    with pytest.raises(PageError, match="0 blocks of the page are called"):
        program(part, [part], without_device=False)
    missing = Block("p.md", 9, "python", part.code, {**words, "else": ["'npu':'cpu'"]})
    with pytest.raises(PageError, match="there is no 'npu'"):
        program(missing, [whole], without_device=True)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("python examples/no_such.py", "no_such.py does not exist"),
        ("python examples/benchmarks/planning.py --no-such", "unrecognized arguments: --no-such"),
        ("python -m torch_eplb plan a.npz --ranks 2", "arguments are required: --out"),
        ("python -m torch_eplb simulate examples/data/no.npz", "no.npz does not exist"),
        ("python -m tox -e no_such", "has no environment no_such"),
        ("python -m tox -e lint -- --short", "lint takes no arguments"),
        ("python -m tox -e tests -- tests/no_such", "not found: .*no_such"),
        ("python -m tox -e demo -- --no-such", "unrecognized arguments: --no-such"),
        ("python -m pip install no_such", "does not name no_such"),
        ("python -m pip install torch-eplb[no_such]", "no_such"),
        ("torchrun --nproc-per-node 2 no_such.py", "no block of the page is no_such.py"),
        ("torchrun --nproc-per-node 3 quick.py", "other ranks"),
        ("NO_SUCH=1 python -m tox", "nothing reads the variable NO_SUCH"),
        ("python -m no_such", "no check knows python -m no_such"),
        ("cargo run", "no check knows the program cargo"),
    ],
)
def test_a_command_that_is_wrong_is_found(code: str, message: str) -> None:
    block = Block("page.md", 1, "sh", code)
    quick = Block("page.md", 5, "python", "", {"torchrun": ["2"], "file": ["quick.py"]})
    (command,) = page_commands.split(code)
    with pytest.raises((AssertionError, PageError), match=message):
        page_commands.check(command, block, [block, quick])


def test_a_job_that_is_wrong_is_found(tmp_path: Path) -> None:
    (slurm,) = all_blocks("bash")
    manifest = next(block for block in all_blocks("yaml") if "kubernetes" in block.words)
    alerts = next(block for block in all_blocks("yaml") if "alerts" in block.words)
    for old, new, message in (
        ("--nodes=2", "--noodles=2", "noodles"),
        ("| head", "| | head", "syntax error"),
        ("--rdzv-id", "--rdzv-it", "unrecognized arguments"),
        ("serve.py", "", "required"),
    ):
        assert old in slurm.code
        with pytest.raises(AssertionError, match=message):
            page_jobs.check_slurm(slurm.code.replace(old, new, 1), tmp_path)
    for old, new, message in (
        ("completionMode", "completionMood", "completionMood"),
        ("subdomain: serve", "subdomain: other", "subdomain"),
        ("nproc-per-node=8", "nproc-per-nod=8", "unrecognized arguments"),
        ("job-name: serve", "job-name: server", "selects"),
    ):
        assert old in manifest.code
        with pytest.raises(Exception, match=message):
            page_jobs.check_kubernetes(manifest.code.replace(old, new, 1))
    for old, new, message in (
        ("max(torch_eplb_disabled)", "max(torch_eplb_disabled", "unclosed"),
        ("par_now_mean", "par_then_mean", "torch_eplb_par_then_mean_ratio"),
        ("expr:", "expression:", "expr"),
    ):
        assert old in alerts.code
        with pytest.raises(Exception, match=message):
            page_jobs.check_alerts(alerts.code.replace(old, new, 1))


def test_commands_are_split_like_a_shell_splits_them() -> None:
    commands = page_commands.split("A=1 B=2 x 'a b' \\\n  c && y   # z\n# nothing\n\nw\n")
    assert [command.words for command in commands] == [["x", "a b", "c"], ["y"], ["w"]]
    assert commands[0].variables == {"A": "1", "B": "2"}
