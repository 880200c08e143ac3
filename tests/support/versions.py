"""What older versions of torch do not have; `setup.cfg` has the range."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn import functional as F

__all__ = [
    "ALONE",
    "COPIES_FIRST",
    "UNSORTED",
    "needs_grouped",
    "needs_known_hooks",
    "needs_unsorted",
]


def _known(function: Any, **options: Any) -> dict[str, Any]:
    """The options, if the function takes them."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}


ALONE = _known(dcp.save, no_dist=True)
"""DCP in one process of a group; outside of a group nothing need be said."""

COPIES_FIRST = (
    importlib.util.find_spec("torch.distributed.checkpoint._state_dict_stager") is not None
)
"""Whether ``dcp.async_save`` copies tensors that are on the host before it returns."""

UNSORTED = _known(dist.new_group, sort_ranks=False)
"""Groups whose ranks keep the order that they are given in."""

needs_unsorted = pytest.mark.skipif(not UNSORTED, reason="this torch sorts the ranks of a group")
needs_grouped = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm"
)
needs_known_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell which hooks on saved tensors there are",
)
