"""Which tests are collected where."""

from __future__ import annotations

import os

# They need torch_npu on a simulated CANN, which `tox -e npu` builds.
collect_ignore = [] if "TORCH_EPLB_NPU_SIM" in os.environ else ["npu"]
