"""Gradients, stacks under `vmap`, and rows that have adapters of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import peftfn as pf
from zoo import by_hand
from zoo.batches import signature
from zoo.case import Case, called, output_of
from zoo.outputs import apart, tensors
from zoo.verdicts import CRASH, NOT_APPLICABLE, RIGHT, WRONG, NotApplicable, Verdict, judged, of_error

ROUNDING = {True: 1e-5, False: 2e-2}  # of a gradient's largest number: sums over all tokens, in the model's precision


def loss_of(output: Any) -> Tensor:
    """One number that every tensor of an output moves."""
    return torch.stack([t.nan_to_num(0, 0, 0).clamp(-1e6, 1e6).square().mean() for t in tensors(output).values()]).sum()


def grad(case: Case) -> Verdict:
    """`torch.func.grad` and `backward()`, each against the gradient through weights put in by hand."""
    made = case.hands[0]
    try:
        torch.manual_seed(0)
        want = by_hand.gradients(made, case.lora, loss_of(made(**case.batch)))
    except RuntimeError as error:
        raise NotApplicable(f"the model itself has no gradient: {str(error)[:150]}") from error
    off: dict[str, float] = {}
    excused = ""
    for name, gradients in (("backward", _by_backward), ("func.grad", _by_grad)):
        torch.manual_seed(0)
        try:
            off[name] = _off(gradients(case), want)
        except Exception as error:  # noqa: BLE001  # either way may fail alone
            said = of_error(error)
            excused = _bare_fails(case) if said.verdict == CRASH and name == "func.grad" else ""
            if not excused:
                return said._replace(reason=f"{name}: {said.reason}")
    bad = [name for name, value in off.items() if not value <= ROUNDING[case.exact]]
    numbers = off | {"scale": max(float(t.abs().max()) for leaf in want.values() for t in leaf.values() if t.numel())}
    return Verdict(
        WRONG if bad else RIGHT, f"{', '.join(bad)} is off by more than rounding" if bad else excused, numbers
    )


def _by_grad(case: Case) -> Any:
    return torch.func.grad(lambda p: loss_of(pf.apply(case.model, case.lora.replace(params=p), case.batch)))(
        case.lora.params
    )


def _by_backward(case: Case) -> Any:
    params = {path: {n: t.clone().requires_grad_() for n, t in leaf.items()} for path, leaf in case.lora.params.items()}
    loss_of(pf.apply(case.model, case.lora.replace(params=params), case.batch)).backward()
    return {
        path: {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaf.items()}
        for path, leaf in params.items()
    }


def _off(found: Any, want: Any) -> float:
    """The largest difference, each gradient's of its adapter's largest number."""
    scale = max(float(t.abs().max()) for leaf in want.values() for t in leaf.values())
    return max(apart(found[path], want[path]) for path in want) / max(scale, 1e-30)


def raise_if_bare_fails(case: Case, error: Exception) -> None:
    """Raises NotApplicable for a crash where torch.func.grad of the bare model, by its own weights, fails as well."""
    if of_error(error).verdict == CRASH and (said := _bare_fails(case)):
        raise NotApplicable(said) from error


def _bare_fails(case: Case) -> str:
    """How torch.func.grad of the bare model fails; nothing where it does not."""
    weights = {n: p.detach() for n, p in case.model.named_parameters()}
    try:
        torch.func.grad(lambda w: loss_of(torch.func.functional_call(case.model, w, (), dict(case.batch))))(weights)
    except Exception as alone:  # noqa: BLE001  # it is asked whether it fails
        said = f"{type(alone).__name__}: {str(alone)[:150]}".replace("\n", " ")
        return f"torch.func.grad of the bare model fails too: {said}"
    return ""


def vmap(case: Case) -> Verdict:
    """Two adapters as one stack under `torch.vmap`, against each by hand."""
    adapters = case.loras
    want = _stacked(case.wanted)
    try:
        got = output_of(
            lambda: torch.vmap(lambda one: tensors(pf.apply(case.model, one, case.batch)), randomness="same")(
                pf.stack(adapters)
            )
        )
    except Exception as error:
        if of_error(error).verdict == CRASH and (alone := _vmap_bare_fails(case, adapters, case.batch)):
            without = {**case.batch, "use_cache": False}
            if "use_cache" not in signature(case.model) or _vmap_bare_fails(case, adapters, without):
                return Verdict(NOT_APPLICABLE, f"torch.vmap of the bare model fails too: {alone}")
            said = of_error(error)
            return said._replace(reason=f"the bare model runs with use_cache=False: {said.reason}")
        raise
    return judged(got, want, _stacked([case.base, case.base]), case.exact)


def _stacked(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in outputs]) for name in outputs[0]}


def _vmap_bare_fails(case: Case, adapters: list[pf.Adapter], batch: Mapping[str, Any]) -> str:
    """What torch says of the bare model under vmap over stacked weights; nothing where it runs."""
    every = dict(case.model.named_parameters(remove_duplicate=False))
    weights = [pf.merge(every, one) for one in adapters]
    stacked = {name: torch.stack([one[name].detach() for one in weights]) for name in weights[0]}

    def one(weights: Any) -> dict[str, Tensor]:
        return tensors(torch.func.functional_call(case.model, weights, (), dict(batch), tie_weights=False))

    try:
        output_of(lambda: torch.vmap(one, randomness="same")(stacked))
    except Exception as error:  # noqa: BLE001  # it is asked whether it fails
        return f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
    return ""


def rows(case: Case) -> Verdict:
    """Three rows with the second adapter, none and the first, against each row by itself, by hand."""
    batch = case.rows(0, 1, 2)
    base = called(case.model, batch)
    alone = [called(case.model, case.rows(number)) for number in range(3)]
    kept = {name for name, t in base.items() if t.shape[0] == 3 and _rows_alone(t, [one.get(name) for one in alone])}
    if not kept:
        raise NotApplicable(
            "the bare model's rows are not what they are by themselves, or its output has no axis of rows"
        )
    hands = [case.hands[1], case.model, case.hands[0]]
    want = [called(model, case.rows(number)) for number, model in enumerate(hands)]
    got = output_of(lambda: pf.apply(case.model, pf.stack(case.loras), batch, index=torch.tensor([1, -1, 0])))
    wanted = {name: torch.cat([one[name] for one in want]) for name in kept}
    return judged(
        {name: t for name, t in got.items() if name in kept}, wanted, {name: base[name] for name in kept}, case.exact
    )


def _rows_alone(together: Tensor, alone: list[Tensor | None]) -> bool:
    if any(one is None or one.shape != together[:1].shape for one in alone):
        return False
    rows_ = torch.cat([one for one in alone if one is not None])
    return apart({"": together}, {"": rows_}) <= 1e-4 * max(float(rows_.abs().nan_to_num(0, 0, 0).max()), 1e-30)
