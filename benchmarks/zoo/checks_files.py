"""Adapter files both ways: peftfn reads what peft wrote, peft reads what peftfn wrote."""

from __future__ import annotations

import peftfn as pf
from zoo import by_hand, with_peft
from zoo.case import Case, called, output_of
from zoo.verdicts import NOT_APPLICABLE, RIGHT, WRONG, Verdict, judged


def load(case: Case) -> Verdict:
    """peft's `all-linear` file, read here, against peft's own output."""
    theirs = with_peft.all_linear(case)
    folder = with_peft.files_of(theirs)
    try:
        adapter = pf.load(folder, case.model)
    finally:
        with_peft.clear(folder)
    got = output_of(lambda: pf.apply(case.model, adapter, case.batch))
    with with_peft.peft_at_work():
        want = called(theirs, case.batch)
    return _held(case, got, want, adapter)


def save(case: Case) -> Verdict:
    """peftfn's file, read by peft, against the weights put in by hand."""
    theirs, complaints = with_peft.reads(case, case.lora)
    if complaints:
        return Verdict(WRONG, f"peft: {complaints[0][:200]}")
    want = case.wanted[0]
    with with_peft.peft_at_work():
        got = called(theirs, case.batch)
    verdict = judged(got, want, case.base, case.exact)
    if verdict.verdict != WRONG:
        return verdict
    ours = judged(output_of(lambda: pf.apply(case.model, case.lora, case.batch)), want, case.base, case.exact)
    if ours.verdict == RIGHT:
        return Verdict(NOT_APPLICABLE, "peft's own output is not the one by hand; every key was read", verdict.numbers)
    return verdict


def _held(case: Case, got: dict, theirs: dict, adapter: pf.Adapter) -> Verdict:
    verdict = judged(got, theirs, case.base, case.exact)
    if verdict.verdict == RIGHT:
        return verdict
    by = judged(got, called(by_hand.adapted(case.model, adapter), case.batch), case.base, case.exact)
    if by.verdict == RIGHT:
        return Verdict(RIGHT, "as by hand, where peft is off", by.numbers | {"peft off": verdict.numbers["off"]})
    return verdict if by.verdict == WRONG else by
