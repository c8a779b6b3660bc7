"""What Dynamo is told of our functions, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """The function, marked as `torch.compiler.assume_constant_result` does: Dynamo calls it and keeps what it gives.

    torch's own decorator imports `torch._dynamo` to set this one attribute: 70 MB and most of the time that
    `import peftfn` would take, for a program that compiles nothing.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  # a name of torch's, which its types do not have
    return function
