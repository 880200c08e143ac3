"""Arrays of others as numpy arrays, tensors included, without importing what made them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["host_array"]


def host_array(value: Any) -> NDArray[Any]:
    """``value`` as a numpy array: an array, nested lists, or a tensor on any device.

    Raises:
        ValueError: the lists are ragged.
    """
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu()
    return np.asarray(value)
