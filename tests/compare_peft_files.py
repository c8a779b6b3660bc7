"""Holds two folders that tests/make_peft_files.py wrote against each other; run by `make test-peft050`.

    python tests/compare_peft_files.py MADE KEPT

Bit for bit, but for what peft computed: outputs, gradients, and the prompts of P-tuning, of which peft saves what its
encoder gives. Another CPU rounds those otherwise.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch.testing import assert_close

OUTPUTS = "expected.safetensors"


def is_computed(path: Path) -> bool:
    """Whether peft computed what this file of tensors holds, instead of drawing it."""
    if path.name == OUTPUTS:
        return True
    config = path.with_name("adapter_config.json")
    return path.name.startswith("adapter_model.") and json.loads(config.read_text())["peft_type"] == "P_TUNING"


def compare(made: Path, kept: Path) -> int:
    """How many files agree. Each one of both folders has to."""
    files = {path.relative_to(kept) for path in kept.rglob("*") if path.is_file()}
    other = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    assert files, f"{kept} has no files"
    assert files == other, f"only one of the folders has {sorted(map(str, files ^ other))}"
    for path in sorted(files):
        if is_computed(kept / path):
            assert_close(load_file(made / path), load_file(kept / path), msg=lambda text, path=path: f"{path}: {text}")
        else:
            assert (made / path).read_bytes() == (kept / path).read_bytes(), f"{path} has other bytes"
    return len(files)


if __name__ == "__main__":
    made, kept = map(Path, sys.argv[1:])
    print(f"peft made the same {compare(made, kept)} files again")
