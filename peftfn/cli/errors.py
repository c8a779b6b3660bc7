"""Errors that a person at a terminal can act on: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import torch

from peftfn.core import files

P = ParamSpec("P")


class UserError(Exception):
    """The input cannot be used; the message says what was given, what was expected and what to do."""


# What the library, transformers, the tokenizers and the file system raise for input that cannot be used.
# Anything else is a defect and keeps its traceback.
_INPUT_ERRORS = (UserError, ValueError, TypeError, KeyError, OSError, ImportError)


def need(module: str) -> Any:
    """The imported optional `module`, or a `UserError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'this command needs the package {module!r} ({error}): pip install "peftfn[cli]"') from error


def sentence(error: BaseException) -> str:
    """What `error` says, on one line."""
    if isinstance(error, OSError) and error.errno in files.NO_ROOM:
        return (
            f"{error.filename or 'a file'} cannot be written: {error.strerror}; make room, and the same command goes "
            "on where it stopped"
        )
    # str(KeyError("x")) is the repr of the message, quotes included
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def one_sentence(command: Callable[P, None]) -> Callable[P, None]:
    """`command`, with wrong input ending in one sentence and exit code 2 (or whole: `PEFTFN_TRACEBACK=1`)."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except _INPUT_ERRORS as error:
            if os.environ.get("PEFTFN_TRACEBACK"):
                raise
            print(f"peftfn: {sentence(error)}", file=sys.stderr)
            sys.exit(2)
        except torch.OutOfMemoryError:
            print(
                "peftfn: out of memory; try a smaller --batch-size (with a larger --grad-accumulation)", file=sys.stderr
            )
            sys.exit(2)
        except KeyboardInterrupt as error:
            print(f"peftfn: {sentence(error)}", file=sys.stderr)
            sys.exit(130)  # 128 + SIGINT, as shells have it

    return guarded
