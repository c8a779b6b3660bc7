"""Outputs, merging and half precision: what an adapted model computes, against peft in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import peftfn as pf
from peft_suite import by_hand, compare
from peft_suite.subject import Subject, first, quiet, saved
from peft_suite.table import procedure
from peft_suite.verdicts import WrongError


def output(subject: Subject) -> Tensor:
    """The output of `apply`, held against peft's."""
    ours = subject.apply()
    compare.close("output", ours, subject.truth, subject.rounded)
    return ours


@procedure("forward_output_finite")
def finite(subject: Subject, _: Mapping[str, Any]) -> None:
    """`apply` gives peft's output, of finite numbers."""
    if not bool(torch.isfinite(output(subject)).all()):
        raise WrongError("output: not finite")


@procedure(
    "disable_adapter",
    "disable_adapters",
    "disable_adapters_with_merging",
    "disable_adapter_is_reentrant",
    "disable_adapters_exiting_context_irregular_state",
    "disable_adapters_exiting_context_restores_previous_state",
    "unload_adapter",
)
def disabled(subject: Subject, _: Mapping[str, Any]) -> None:
    """After a call, a gradient, a merge and a bound module's call the base is what it was, and the adapter is on."""
    before, plain = compare.state(subject.model), subject.run(subject.model)
    adapted = output(subject)
    compare.differ("the adapter", adapted, plain)
    with contextlib.suppress(ValueError):  # a prompt cannot be merged
        pf.merge(subject.model.state_dict(), subject.adapter)
    fresh = pf.init(subject.model, subject.config)
    grads = torch.func.grad(lambda p: first(pf.apply(subject.model, fresh.replace(params=p), subject.inputs)).sum())
    grads(fresh.params)
    compare.same("bound output", subject.run(pf.bind(subject.model, subject.adapter)), adapted)
    compare.untouched(subject.model, before)
    compare.same("output without adapters", subject.apply(()), plain)
    compare.same("output of the base afterwards", subject.run(subject.model), plain)
    compare.same("output with the adapter again", subject.apply(), adapted)


def merged(
    subject: Subject, adapter: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of the base with merged weights, and they."""
    model = subject.model if dtype == torch.float32 else subject.base(dtype)
    params = pf.merge(model.state_dict(), subject.adapter if adapter is None else adapter)
    with torch.no_grad():
        result = torch.func.functional_call(model, params, (), subject.inputs, tie_weights=False)
    return first(result), params


@procedure("merge_layers", "safe_merge", "merge_layers_is_idempotent", "merge_layers_is_deterministic_in_train_mode")
def merging(subject: Subject, _: Mapping[str, Any]) -> None:
    """The merged base gives peft's output, has peft's merged weights, and is the same when it is made again."""
    before = compare.state(subject.model)
    ours, params = merged(subject)
    compare.close("merged output", ours, subject.truth, subject.rounded)
    compare.close("merged output against apply", ours, subject.apply().double(), subject.rounded)
    compare.differ("merging", ours, subject.run(subject.model))
    compare.untouched(subject.model, before)
    compare.equal("names of merged weights", sorted(params), sorted(subject.model.state_dict()))
    again = pf.merge(subject.base().train().state_dict(), subject.adapter)
    for name, tensor in again.items():
        compare.same(f"merged again, {name}", tensor, params[name])
    same_weights(subject, params, subject.peft_model(), torch.float32, compare.SHARE)


@procedure("merge_layers_fp16")
def merging_half(subject: Subject, _: Mapping[str, Any]) -> None:
    """Merging into a float16 base gives float16 weights whose output is as near to float64 as peft's."""
    dtype = torch.float16
    model = subject.peft_model(dtype).to(dtype)
    base = subject.base(dtype)
    params = pf.merge(base.state_dict(), pf.load(saved(model), base))
    same_weights(subject, params, model, dtype, share=4 * torch.finfo(dtype).eps)


def same_weights(subject: Subject, params: Mapping[str, Tensor], model: Any, dtype: torch.dtype, share: float) -> None:
    """Raise where merged weights are not those that peft's model merges to; it is used up."""
    exact = subject.widened(model, dtype)
    with quiet():
        theirs = None if by_hand.is_needed(subject.model_id) else model.merge_and_unload().state_dict()
        wanted = (exact if theirs is None else exact.merge_and_unload()).state_dict()
    for name in sorted(set(params) & set(wanted)):
        if theirs is not None:
            compare.equal(f"dtype of merged {name}", params[name].dtype, theirs[name].dtype)
        compare.close(f"merged {name}", params[name], wanted[name], theirs and theirs[name], share=share)


@procedure("merge_layers_nan")
def merging_nan(subject: Subject, _: Mapping[str, Any]) -> None:
    """Merging an adapter that holds a NaN is refused, and leaves the base whole."""
    before = compare.state(subject.model)
    params = {
        path: {name: t * float("nan") for name, t in leaf.items()} for path, leaf in subject.adapter.params.items()
    }
    try:
        pf.merge(subject.model.state_dict(), subject.adapter.replace(params=params))
    except ValueError:
        compare.untouched(subject.model, before)
        return
    raise WrongError("an adapter of NaN was merged without a word")


@procedure("merge_layers_multi")
def merging_several(subject: Subject, _: Mapping[str, Any]) -> None:
    """Each of two adapters merged alone, and both, one after the other and together, give peft's outputs."""
    other = subject.with_(seed=1)
    for one in (subject, other):
        ours, _params = merged(one)
        compare.close("merged output", ours, one.truth, one.rounded)
    together, _params = merged(subject, (subject.adapter, other.adapter))
    step = pf.merge(subject.model.state_dict(), subject.adapter)
    after = pf.merge(step, other.adapter)
    with torch.no_grad():
        result = first(torch.func.functional_call(subject.model, after, (), subject.inputs, tie_weights=False))
    compare.close("merged one after the other", result, together.double())
    compare.differ("the second", together, merged(subject)[0])


def _forward_half(subject: Subject, dtype: torch.dtype, **kwargs: Any) -> None:
    subject.config  # noqa: B018
    model = subject.peft_model(dtype, **kwargs)
    exact = subject.run(subject.widened(model, dtype))
    try:
        theirs = None if by_hand.is_needed(subject.model_id) else subject.run(_fed(model, dtype))
    except RuntimeError:
        theirs = None  # peft's test lets it be where torch has no kernel for the dtype
    base = _fed(subject.base(dtype), dtype)
    adapter = pf.load(saved(model), base)
    compare.close("output", subject.apply(adapter, base), exact, theirs, share=8 * torch.finfo(dtype).eps)


def _fed(model: Any, dtype: torch.dtype) -> Any:
    """A toy model that turns its input into this dtype."""
    for module in model.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):
            module.dtype = dtype
    return model


@procedure("forward_float16")
def float16(subject: Subject, _: Mapping[str, Any]) -> None:
    """The output of a float16 base with float32 adapters is as near to float64 as peft's."""
    _forward_half(subject, torch.float16)


@procedure("forward_bfloat16")
def bfloat16(subject: Subject, _: Mapping[str, Any]) -> None:
    """The same in bfloat16."""
    _forward_half(subject, torch.bfloat16)


@procedure("forward_float16_no_autocast")
def float16_whole(subject: Subject, _: Mapping[str, Any]) -> None:
    """The same where the adapter is float16 as well."""
    _forward_half(subject, torch.float16, autocast_adapter_dtype=False)


@procedure("forward_bfloat16_no_autocast")
def bfloat16_whole(subject: Subject, _: Mapping[str, Any]) -> None:
    """The same in bfloat16."""
    _forward_half(subject, torch.bfloat16, autocast_adapter_dtype=False)


@procedure("passing_input_embeds_works")
def embeddings(subject: Subject, _: Mapping[str, Any]) -> None:
    """Given embeddings in place of tokens, `apply` gives the output that peft gives for them."""
    with torch.no_grad():
        given = {"inputs_embeds": subject.model.get_input_embeddings()(subject.inputs["input_ids"])}
        exact = {"inputs_embeds": subject.exact.get_input_embeddings()(subject.inputs["input_ids"])}
        ours = first(pf.apply(subject.model, subject.adapter, given))
        with quiet():
            compare.close(
                "output of embeddings", ours, first(subject.exact(**exact)), first(subject.reference(**given))
            )


@procedure("forward_with_labels")
def labels(subject: Subject, _: Mapping[str, Any]) -> None:
    """With labels, the loss is peft's."""
    given = subject.inputs | {"labels": torch.tensor([1, 0])}
    with torch.no_grad(), quiet():
        ours = pf.apply(subject.model, subject.adapter, given)
        # peft adds AdaLoRA's regulariser to the loss by itself; here it is the caller's to add.
        extra = pf.adalora.regulariser(subject.adapter) if subject.config.peft_type == "ADALORA" else 0.0
        compare.close("loss", ours.loss + extra, subject.exact(**given).loss, subject.reference(**given).loss)
    compare.close("output", ours.logits, subject.truth, subject.rounded)
