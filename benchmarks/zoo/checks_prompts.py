"""Prompts and prefixes: `apply`, `generate`, gradients, rows of unlike length, against tokens and caches by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import peftfn as pf
from zoo import prompts_by_hand as hand
from zoo.case import Case, called, filled, output_of
from zoo.checks_generate import decoded, prepared
from zoo.checks_transforms import ROUNDING, loss_of, raise_if_bare_fails
from zoo.outputs import apart
from zoo.verdicts import CRASH, RIGHT, WRONG, NotApplicable, Verdict, judged, of_error

TOKENS = 3


def prompt_of(case: Case, seed: int = 0, tokens: int = TOKENS) -> pf.Adapter:
    _asked(case)
    return filled(pf.init(case.model, pf.PromptTuningConfig(num_virtual_tokens=tokens, task_type=case.task)), seed)


def prefix_of(case: Case, seed: int = 0, tokens: int = TOKENS) -> pf.Adapter:
    _asked(case)
    try:
        adapter = pf.init(case.model, pf.PrefixTuningConfig(num_virtual_tokens=tokens, task_type=case.task))
    except ValueError as error:
        if not hand.takes_keys(case.model):
            raise NotApplicable(f"refused, and rightly: the model takes no cache of keys: {error}") from error
        raise
    return filled(adapter, seed)


def _asked(case: Case) -> None:
    if case.task is None:
        raise NotApplicable("peft has no task for it")
    if not case.is_text:
        raise NotApplicable("its input is no text")


def prompt(case: Case) -> Verdict:
    adapter = prompt_of(case)

    def by_hand() -> dict[str, Tensor]:
        return hand.text_part(case, called(hand.prompted(case, adapter), hand.longer(case, case.batch, TOKENS)))

    with as_bare(by_hand):
        got = hand.text_part(case, output_of(lambda: pf.apply(case.model, adapter, case.batch)))
    with hand.reference():
        want = by_hand()
    return judged(got, want, hand.text_part(case, case.base), case.exact)


@contextlib.contextmanager
def as_bare(by_hand: Callable[[], Any]) -> Any:
    """Where a crash says nothing of peftfn if the bare model cannot do it by hand either."""
    try:
        yield
    except Exception as error:
        if of_error(error).verdict == CRASH:
            with hand.reference():
                by_hand()
        raise


def prompt_grad(case: Case) -> Verdict:
    """The gradient of a prompt, against the one of an embedding by hand."""
    adapter = prompt_of(case)
    torch.manual_seed(0)
    try:
        found = torch.func.grad(
            lambda p: loss_of(hand.text_part(case, hand.run(case.model, case.batch, adapter.replace(params=p))))
        )(adapter.params)
    except Exception as error:
        raise_if_bare_fails(case, error)
        raise
    (got,) = [leaf["prompt_embeddings"][:TOKENS] for leaf in found.values() if "prompt_embeddings" in leaf]
    with hand.reference():
        made = hand.prompted(case, adapter)
        loss = loss_of(hand.text_part(case, hand.run(made, hand.longer(case, case.batch, TOKENS))))
        (want,) = torch.autograd.grad(loss, hand.rows_of(made))
    off = apart({"": got}, {"": want}) / max(float(want.abs().max()), 1e-30)
    return Verdict(RIGHT if off <= ROUNDING[case.exact] else WRONG, "", {"off": off, "scale": float(want.abs().max())})


def prompt_generate(case: Case) -> Verdict:
    adapter, batch = prompt_of(case), prepared(case)

    def by_hand() -> dict[str, Tensor]:
        return decoded(hand.prompted(case, adapter), hand.longer(case, batch, TOKENS))

    with as_bare(by_hand):
        got = decoded(pf.bind(case.model, adapter), batch)
    with hand.reference():
        want = by_hand()
    return judged(got, want, None, case.exact)


def prompt_rows(case: Case) -> Verdict:
    """Rows with a prompt of two tokens, none, and one of three, against each row by itself."""
    return _finite(case, lambda one: _rows(one, prompt_of(one), prompt_of(one, 1, 2), hand.prompted_row))


def prefix(case: Case) -> Verdict:
    adapter = prefix_of(case)
    got = hand.text_part(case, output_of(lambda: pf.apply(case.model, adapter, case.batch)))
    want = hand.text_part(case, output_of(lambda: hand.prefixed(case, adapter, case.batch)))
    return judged(got, want, hand.text_part(case, case.base), case.exact)


def prefix_generate(case: Case) -> Verdict:
    """Against greedy decoding by hand: every step from the start, with a new cache that has the prefix alone."""
    adapter, batch = prefix_of(case), prepared(case)
    with as_bare(lambda: decoded(case.model, batch)):
        got = decoded(pf.bind(case.model, adapter), batch)
    verdict = judged(got, hand.greedy(case, adapter, batch), None, case.exact)
    if verdict.verdict == WRONG and not hand.decodes_as_it_reads(case, batch):
        return judged(got, hand.continued(case, adapter, batch), None, case.exact)
    return verdict


def prefix_rows(case: Case) -> Verdict:
    return _finite(case, lambda one: _rows(one, prefix_of(one), prefix_of(one, 1, 2), hand.prefixed_row))


def _finite(case: Case, check: Callable[[Case], Verdict]) -> Verdict:
    """The check, in float32 where the model's mask of -1.8e308 becomes -inf in a softmax of float32."""
    verdict = check(case)
    return check(case.rounded()) if case.exact and verdict.numbers.get("off") == float("inf") else verdict


def _rows(case: Case, long: pf.Adapter, short: pf.Adapter, alone: Any) -> Verdict:
    batch = case.rows(0, 1, 2)
    got = output_of(lambda: pf.apply(case.model, pf.stack([long, short]), batch, index=torch.tensor([1, -1, 0])))
    with hand.reference():
        bare = [hand.text_part(case, called(case.model, case.rows(number))) for number in range(3)]
        want = [alone(case, short, case.rows(0)), bare[1], alone(case, long, case.rows(2))]
    verdict = judged(hand.text_part(case, got), _joined(want), _joined(bare), case.exact)
    if verdict.verdict == WRONG and not hand.ignores_masked(case):
        return verdict._replace(reason=f"{verdict.reason}; the bare model does not ignore masked places before a row")
    return verdict


def _joined(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in outputs]) for name in outputs[0]}
