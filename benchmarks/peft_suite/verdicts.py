"""What came of a case: right, wrong, a crash, a refusal with its reason, or something that is not offered here."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import NamedTuple

import peft

import peftfn

RIGHT, WRONG, CRASH, REFUSED, OUT = "right", "wrong", "crash", "refused", "out of time"
NOT_OFFERED, VALUES, LEFT, UNFIT, UNWRITTEN = (
    "not offered",
    "no meaning",
    "left out by peft",
    "not run",
    "no counterpart",
)
BAD = (WRONG, CRASH, REFUSED, OUT)
PACKAGE, PEFT = Path(peftfn.__file__).parent, Path(peft.__file__).parent


class Verdict(NamedTuple):
    """A word, and why."""

    word: str
    why: str = ""


class WrongError(AssertionError):
    """A result that is not the reference's."""


class NotOfferedError(Exception):
    """The case needs what this library does not have; the text names it."""


class UnfitError(Exception):
    """The case cannot be run here; the text says why."""


def of(error: BaseException) -> Verdict:
    """The verdict that an exception is."""
    text = re.sub(r"/\S*/(?=\w+[.]\w)", "", " ".join(str(error).split()))[:400]  # whose folder it was is no matter
    if isinstance(error, WrongError):
        return Verdict(WRONG, text)
    if isinstance(error, NotOfferedError):
        return Verdict(NOT_OFFERED, text)
    if isinstance(error, UnfitError):
        return Verdict(UNFIT, text)
    if isinstance(error, OSError) and "huggingface.co" in text:
        return Verdict(UNFIT, "a model hub")
    if is_of_peft(error):
        return Verdict(LEFT, f"peft itself raises {type(error).__name__}: {text}")
    named = f"{type(error).__name__}: {text}"
    return Verdict(REFUSED if is_refusal(error) else CRASH, named)


def is_refusal(error: BaseException) -> bool:
    """Whether the package itself raised it, in a `raise` of its own: it says what was given and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not Path(frames[-1].filename).is_relative_to(PACKAGE):
        return False
    return isinstance(error, (ValueError, TypeError, KeyError, NotImplementedError)) and "raise" in _statement(frames)


def is_of_peft(error: BaseException) -> bool:
    """Whether it came out of peft, with none of this package in between."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    through = {
        name for name, folder in (("peft", PEFT), ("peftfn", PACKAGE)) if any(f.is_relative_to(folder) for f in files)
    }
    return through == {"peft"}


def _statement(frames: traceback.StackSummary) -> str:
    last = frames[-1]
    lines = Path(last.filename).read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[(last.lineno or 1) - 1 : last.end_lineno or last.lineno or 1])


def unsupported(error: ValueError) -> NotOfferedError | None:
    """The same where a config is refused because peftfn has no such method or no such field."""
    text = " ".join(str(error).split())
    method = re.search(r"peft_type='?(\w+)'?, which this version of peftfn does not read", text)
    if method:
        return NotOfferedError(f"method {method[1]}")
    field = re.search(r"\((\w+)=.*?\): peft has this field", text)
    if field:
        return NotOfferedError(f"field {field[1]}")
    start = re.search(r"init_lora_weights='(\w+)'(?:; expected| goes with a base)", text)
    return NotOfferedError(f"init_lora_weights {start[1]}") if start else None
