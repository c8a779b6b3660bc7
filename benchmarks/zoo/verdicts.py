"""What a check finds: a verdict, its reason, and the numbers behind it."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from zoo.outputs import apart, largest

RIGHT, WRONG, CRASH, REFUSED, NOT_APPLICABLE = "right", "wrong", "crash", "refused", "not applicable"

# Of the largest number of the wanted output. Many models compute norms, softmaxes or positions in float32 even when
# their weights are float64; what rounding does there stays under 1e-6 in these models, and in models that are float32
# throughout under 1e-4. An adapter's effect has to be ten times this, and is most often a tenth of the output.
TOLERANCE = {True: 1e-5, False: 1e-3}
SEEN = 10.0


class Verdict(NamedTuple):
    """One finding."""

    verdict: str
    reason: str = ""
    numbers: Mapping[str, float] = {}


class NotApplicable(Exception):  # noqa: N818  # no error: the check has no meaning for the class
    """The check says nothing about this class, for the reason given."""


def judged(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, exact: bool
) -> Verdict:
    """Right where the two outputs agree and the adapter is seen to do something.

    Args:
        got: peftfn's.
        want: the reference's.
        base: the same without an adapter; None where it was seen elsewhere that the adapter has an effect.
        exact: the model computes in float64.
    """
    off, scale = apart(got, want), largest(want)
    allowed = TOLERANCE[exact] * scale
    numbers = {"off": off, "scale": scale}
    if base is not None:
        numbers["effect"] = effect = apart(want, base)
        if not effect > SEEN * allowed:
            same = off <= allowed
            return Verdict(NOT_APPLICABLE if same else WRONG, "by hand too the adapter changes nothing", numbers)
    if off <= allowed:
        return Verdict(RIGHT, "", numbers)
    if base is not None and apart(got, base) <= allowed:
        return Verdict(WRONG, "the adapter does nothing", numbers)
    return Verdict(WRONG, "another output", numbers)


def of_error(error: BaseException) -> Verdict:
    """A refusal where peftfn itself raised a sentence, a crash where anything else did."""
    if isinstance(error, NotApplicable):
        return Verdict(NOT_APPLICABLE, str(error))
    frames = traceback.extract_tb(error.__traceback__)
    last: Any = frames[-1] if frames else None
    text = f"{type(error).__name__}: {error}".replace("\n", " ")
    if (
        last is not None
        and "/peftfn/" in last.filename
        and isinstance(error, (ValueError, TypeError, KeyError, NotImplementedError))
    ):
        lines = [
            linecache.getline(last.filename, line).strip()
            for line in range(last.lineno - 1, (last.end_lineno or last.lineno) + 1)
        ]
        if any(line.startswith("raise ") for line in lines):
            return Verdict(REFUSED, text[:400])
    where = " < ".join(f"{frame.filename.split('/')[-1]}:{frame.lineno}" for frame in frames[::-1][:3])
    return Verdict(CRASH, f"{text[:400]} [{where}]")
