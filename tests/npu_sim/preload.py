"""Imported by the fork server of tests, so that ranks start with torch_npu at hand."""

import torch._dynamo  # what finds results' shapes imports it, a second in every rank
from npu_sim import runtime

runtime.load()
