"""Names in the documentation: what it tells can be reached, and what can be reached it tells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.models import ToyModel
from support.pages import pages, text_of
from support.programs import run

import torch_eplb
from torch_eplb.testing import fake_process_group

# Not behind "from": what a statement imports it imports by itself.
NAME = re.compile(r"(?<![\w/.])(?<!from )torch_eplb((?:\.[A-Za-z_]\w*)+)(?![\w/])")


def documented() -> list[str]:
    """Every dotted name behind ``torch_eplb.``, in all pages."""
    return sorted({match[1:] for page in pages() for match in NAME.findall(text_of(page))})


REACH = """
import os, sys
import numpy, torch  # which take long; of torch_eplb each name has its own

for name in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        import torch_eplb
        try:
            eval(f"torch_eplb.{name}")
        except AttributeError as error:
            print(f"torch_eplb.{name}: {error}", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
print("all tried")
"""


def test_documented_names_need_no_more_than_import_torch_eplb(tmp_path: Path) -> None:
    said = run("-c", REACH, *documented(), "balancers", cwd=tmp_path, timeout=120)
    missing = "torch_eplb.balancers: module 'torch_eplb' has no attribute 'balancers'"
    assert said.splitlines() == [missing, "all tried"]


@pytest.mark.parametrize("name", sorted({*torch_eplb.__all__, *torch_eplb._MODULES}))
def test_every_public_name_is_documented(name: str) -> None:
    assert name in {name.partition(".")[0] for name in documented()}


def test_what_is_said_of_a_wrapped_model_is_there() -> None:
    said = {name for page in pages() for name in re.findall(r"\bbalancer\.(\w+)", text_of(page))}
    said.discard("py")
    assert {"module", "stats", "placement", "state_dict"} <= said
    with fake_process_group(world_size=2), torch_eplb.wrap(ToyModel()) as balancer:
        assert [name for name in sorted(said) if not hasattr(balancer, name)] == []
