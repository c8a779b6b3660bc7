"""A sample of the zoo: one class for each family and mechanism, held against the kept table."""
from __future__ import annotations
from typing import Any
SAMPLE: list[str] = []
def worse(found: dict[str, Any], version: str) -> int:
    return 0
