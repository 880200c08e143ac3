"""How many threads numpy's libraries start; imports nothing, to be read before numpy is."""

from __future__ import annotations

__all__ = ["ONE_THREAD"]

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}
"""Environment variables, read when numpy is imported. Planning multiplies many small matrices:
threads that wait for each other beside busy cores made it fifteen times slower."""
