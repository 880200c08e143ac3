"""Imported by the fork server of tests, so that ranks start with torch_npu at hand."""

import torch._dynamo  # noqa: F401 (shapes of results are found with it: a second in every rank)

from npu_sim import runtime

runtime.load()
