"""Medians with their quartiles, as the rows of results have them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and what a quarter and three quarters of the values are below; one value has no spread."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}
