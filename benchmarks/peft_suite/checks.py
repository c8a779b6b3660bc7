"""All counterparts: importing them enters them in the table."""

from __future__ import annotations

from peft_suite import (  # noqa: F401
    procedures_files,
    procedures_outputs,
    procedures_several,
    procedures_training,
    tests_config,
    tests_matching,
    tests_several,
)
