"""Loads the simulated CANN, and torch_npu on top of it.

    from npu_sim import runtime
    runtime.load()           # before anything imports torch_npu; the device is "npu" from now on

``TORCH_EPLB_NPU_SIM`` names the folder that `npu_sim.build` has filled. Nothing starts a thread or
touches the device before it is used, so a process may load and fork then.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

from npu_sim.build import LIBRARIES

__all__ = ["FOLDER_VARIABLE", "library", "load"]

FOLDER_VARIABLE = "TORCH_EPLB_NPU_SIM"


def load() -> None:
    """Import torch_npu on the simulated CANN and give its device operators. Idempotent."""
    if "torch_npu" in sys.modules:
        return
    library()
    # Or the import of torch imports torch_npu by itself, whether or not anyone wants it.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    with contextlib.redirect_stdout(None):  # it prints that CANN's variables are not set
        import torch_npu  # noqa: F401

    from npu_sim import kernels

    kernels.install()


@functools.cache
def library() -> ctypes.CDLL:
    """The runtime. Loaded for all, so that the dynamic linker finds it when torch_npu asks."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    runtime, *_ = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in LIBRARIES]
    return runtime
