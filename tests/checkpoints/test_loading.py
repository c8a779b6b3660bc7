"""How an adapter gets from its files to a device, and what is imported on the way."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_library_imports_no_compiler_no_transformers_and_no_hub_client() -> None:
    heavy = ("torch._dynamo", "sympy", "transformers", "huggingface_hub")
    code = f"import sys, peftfn; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
