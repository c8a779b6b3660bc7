"""Adapters of layers and of bare parameters: what `apply`, `bind` and `merge` give against weights put in by hand."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)

import peftfn as pf
from zoo import by_hand, with_peft
from zoo.case import Case, called, filled, output_of
from zoo.verdicts import RIGHT, WRONG, NotApplicable, Verdict, judged


def against_hand(case: Case, adapter: pf.Adapter) -> Verdict:
    """`apply` against a copy with the adapter's weights put in by hand."""
    want = case.wanted[0] if adapter is case.lora else called(by_hand.adapted(case.model, adapter), case.batch)
    verdict = judged(output_of(lambda: pf.apply(case.model, adapter, case.batch)), want, case.base, case.exact)
    if verdict.verdict == WRONG and (lost := by_hand.not_called(case.model, adapter, case.batch)):
        return verdict._replace(reason=f"{verdict.reason}; the base reads past {len(lost)} layers' forward: {lost[0]}")
    return verdict


def lora(case: Case) -> Verdict:
    return against_hand(case, case.lora)


def sites(case: Case) -> Verdict:
    """`all-linear` means the layers that it means in peft."""
    theirs = with_peft.lora_sites(with_peft.all_linear(case))
    ours = {path for path, leaf in case.lora.params.items() if any("lora_" in name for name in leaf)}
    if ours == theirs:
        return Verdict(RIGHT, "", {"sites": len(ours)})
    said = f"only here: {sorted(ours - theirs)[:3]}, only in peft: {sorted(theirs - ours)[:3]}"
    return Verdict(WRONG, said, {"sites": len(ours), "peft": len(theirs)})


def default(case: Case) -> Verdict:
    """LoRA on the layers that peft has by default for this kind of model."""
    if case.model.config.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise NotApplicable("peft has no default layers for this model type")
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type=case.layer_task)
    theirs = with_peft.lora_sites(with_peft.made(case, config))
    adapter = filled(pf.init(case.model, pf.LoraConfig(r=4, lora_alpha=6, task_type=case.layer_task)))
    ours = {path for path, leaf in adapter.params.items() if any("lora_" in name for name in leaf)}
    if ours != theirs:
        return Verdict(
            WRONG, f"other layers: only here {sorted(ours - theirs)[:3]}, only in peft {sorted(theirs - ours)[:3]}"
        )
    return against_hand(case, adapter)


def ia3(case: Case) -> Verdict:
    """IA3 on peft's default layers, or on all linear ones."""
    known = case.model.config.model_type in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    given: Any = {} if known else {"target_modules": case.targets, "feedforward_modules": []}
    adapter = filled(pf.init(case.model, pf.IA3Config(task_type=case.layer_task, **given)))
    return against_hand(case, adapter)


def convolutions(case: Case) -> Verdict:
    """LoRA on every ungrouped convolution."""
    if not case.convolutions:
        raise NotApplicable("it has none")
    config = pf.LoraConfig(r=4, lora_alpha=6, target_modules=case.convolutions)
    return against_hand(case, filled(pf.init(case.model, config)))


def experts(case: Case) -> Verdict:
    """LoRA on the experts' bare parameters."""
    names = {
        name.rpartition(".experts.")[2]
        for name, parameter in case.model.named_parameters()
        if ".experts." in name and parameter.ndim == 3
    }
    if not names:
        raise NotApplicable("no experts in bare parameters")
    targets = sorted(f"experts.{name}" for name in names)
    adapter = filled(pf.init(case.model, pf.LoraConfig(r=2, target_modules=[], target_parameters=targets)))
    return against_hand(case, adapter)


def bind(case: Case) -> Verdict:
    bound = pf.bind(case.model, case.lora)
    return judged(called(bound, case.batch), case.wanted[0], case.base, case.exact)


def merge(case: Case) -> Verdict:
    """The merged weights in a model of their own, put there by name."""
    merged = pf.merge(dict(case.model.named_parameters()), case.lora)
    got = output_of(lambda: torch.func.functional_call(case.model, merged, (), dict(case.batch)))
    return judged(got, case.wanted[0], case.base, case.exact)
