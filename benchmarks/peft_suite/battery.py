"""The laws on what a test of peft's builds: sites, tensors, outputs, merged weights, gradients and files."""

from __future__ import annotations

import copy
import types
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftfn as pf
from peft_suite import compare, judge, procedures_files, procedures_outputs, procedures_training, spies, verdicts
from peft_suite.inventory import Case
from peft_suite.made import Made
from peft_suite.subject import cast, first
from peft_suite.verdicts import NotOfferedError, Verdict, WrongError


def verdict(case: Case, module: types.ModuleType) -> Verdict | None:
    """What the laws say of all that a test builds; `None` where it builds nothing that they could be asked about."""
    notes = spies.watch(case, module)
    found = [_on(lambda one=one: _laws(one)) for one in notes.built]
    found += [_on(lambda one=one: _refused(one)) for one in notes.refused]
    for one in found:
        if one.word in verdicts.BAD:
            return one
    if any(one.word == verdicts.RIGHT for one in found):
        return Verdict(verdicts.RIGHT)
    return found[0] if found else None


def _on(run: Any) -> Verdict:
    try:
        run()
    except Exception as error:  # every exception is a verdict
        return verdicts.of(error)
    return Verdict(verdicts.RIGHT)


def _refused(one: spies.Refused) -> None:
    """Fields that peft refuses are refused here, or hold what they say."""
    kind = judge.method_of(one.config_cls)
    fields = {name: value for name, value in one.fields.items() if name != "peft_type"}
    try:
        pf.PeftConfig.from_dict({"peft_type": kind, **fields})
    except (ValueError, TypeError):
        return
    raise WrongError(f"{one.config_cls.__name__}({fields}) was made, which peft refuses")


def _laws(one: spies.Built) -> None:
    if not spies.is_offered(one.config):
        raise NotOfferedError(f"method {judge.method_of(type(one.config))}")
    made = Made(one.model, one.config, _inputs(one.model) or {})
    made.config  # noqa: B018
    if one.error is not None:
        return _where_peft_raises(made)
    fresh = pf.init(made.model, made.config)
    if not procedures_training.has_encoder(made):
        compare.equal("sites of a fresh adapter", compare.names(fresh), compare.names(made.adapter))
        _same_shapes(fresh, made.adapter)
    if not made.inputs:
        return _same_weights(made)
    procedures_files.files(made, {})
    procedures_outputs.output(made)
    if not isinstance(one.config, (peft.PromptLearningConfig, peft.AdaptionPromptConfig)):
        procedures_outputs.merging(made, {})
    procedures_training.gradients(made, {})
    return None


def _same_shapes(fresh: pf.Adapter, loaded: pf.Adapter) -> None:
    for (site, name), tensor in compare.items(fresh):
        if tensor.dim() == loaded.params[site][name].dim():  # one with groups has two forms
            compare.equal(f"shape of {site}.{name}", tensor.shape, loaded.params[site][name].shape)
    for site, leaf in fresh.buffers.items():
        if "scaling" in leaf:
            compare.same(f"scaling of {site}", leaf["scaling"], loaded.buffers[site]["scaling"])


def _same_weights(made: Made) -> None:
    """Where no input is known: the merged weights are peft's, where it merges."""
    made.peft_model().merge_and_unload()
    if any(getattr(module, "groups", 1) > 1 for module in made.model.modules()):
        return  # peft's own tests leave merging into these out
    ours = pf.merge(made.model.state_dict(), made.adapter)
    procedures_outputs.same_weights(made, ours, made.peft_model(), torch.float32, compare.SHARE)


def _where_peft_raises(made: Made) -> None:
    """Where peft raises, a refusal is as right as an adapter whose merged weights compute what `apply` does."""
    try:
        fresh = procedures_files.moved(pf.init(made.model, made.config))
        if made.inputs:
            params = pf.merge(made.model.state_dict(), fresh)
            with torch.no_grad():
                merged = torch.func.functional_call(made.model, params, (), made.inputs, tie_weights=False)
            compare.close("merged output", first(merged), made.apply(fresh).double())
    except (ValueError, TypeError, KeyError) as error:
        if not verdicts.is_refusal(error):
            raise


def _inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Inputs that the base takes, of those that peft's tests use; `None` where it takes none of them."""
    ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
    tokens = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 1]])}
    plain = [torch.arange(90).view(9, 10), torch.arange(90.0).view(9, 10), torch.arange(40).view(4, 10) / 40]
    shaped = [torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16), torch.linspace(-1, 1, 9 * 32).view(9, 32)]
    names = ("x", "X", "input")
    candidates = [tokens, {**tokens, "decoder_input_ids": ids}, *({n: t} for t in (*plain, *shaped) for n in names)]
    for one in candidates:
        try:
            with torch.no_grad():
                output = first(model.eval()(**one))
                first(Made(model, None, one).run(cast(copy.deepcopy(model), torch.float64)))  # as the truth is
        except Exception:  # noqa: S112  # the next one may fit
            continue
        if isinstance(output, Tensor):
            return one
    return None
