"""Training: gradients, steps of an optimizer, checkpointed blocks, and which layers are adapted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftfn as pf
from peft_suite import by_hand, compare
from peft_suite.procedures_files import moved
from peft_suite.subject import Subject, first, quiet, saved
from peft_suite.table import procedure
from peft_suite.verdicts import WrongError

STEPS, RATE = 3, 1e-3


def loss(output: Any) -> Tensor:
    """A scalar that depends on every number of the output, each in its own way."""
    tensor = first(output)
    weights = torch.linspace(-1.0, 1.0, tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape)
    return (weights * tensor).sum() + (tensor * tensor).mean()


def has_encoder(subject: Subject) -> bool:
    """Whether peft's file holds what a network makes, and not the network that is trained."""
    return subject.config_cls.__name__ == "PromptEncoderConfig" or bool(subject.kwargs.get("prefix_projection"))


def double(adapter: pf.Adapter) -> pf.Adapter:
    """The adapter in float64, its buffers as well."""
    return torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, adapter)


def their_gradients(subject: Subject, model: Any) -> pf.Adapter:
    """peft's gradients as an adapter: a copy of its model with gradients for values, through its file."""
    trained = [one for one in model.parameters() if one.requires_grad]
    with quiet():
        grads = torch.autograd.grad(loss(model(**subject.inputs_for(model))), trained, allow_unused=True)
    holder = copy.deepcopy(model)
    slots = [one for one in holder.parameters() if one.requires_grad]
    with torch.no_grad():
        for slot, grad in zip(slots, grads, strict=True):
            slot.copy_(torch.zeros_like(slot) if grad is None else grad)
    return pf.load(saved(holder), subject.model)


def our_gradients(subject: Subject, adapter: pf.Adapter) -> pf.Adapter:
    """Our gradients by `torch.func.grad`, which `backward` has to agree with."""

    def of(params: Any) -> Tensor:
        return loss(pf.apply(subject.model, adapter.replace(params=params), subject.inputs))

    grads = adapter.replace(params=torch.func.grad(of)(adapter.params))
    leaves = adapter.replace(params=torch.utils._pytree.tree_map(torch.clone, adapter.params))
    pf.leaves(leaves)
    loss(pf.apply(subject.model, leaves, subject.inputs)).backward()
    backward = {
        path: {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaf.items()}
        for path, leaf in leaves.params.items()
    }
    compare.adapters("backward against torch.func.grad", adapter.replace(params=backward), grads)
    return grads


@procedure("training", "training_prompt_learning_tasks", "inference_safetensors")
def gradients(subject: Subject, _: Mapping[str, Any]) -> None:
    """Every gradient is peft's, the base gets none, and what was trained is read back from peft's file."""
    before = compare.state(subject.model)
    if has_encoder(subject):
        _of_encoder(subject)
    elif by_hand.is_needed(subject.model_id):
        _slope(subject, moved(pf.init(subject.model, subject.config)))
    else:
        ours = our_gradients(subject, subject.adapter)
        exact = their_gradients(subject, subject.exact)
        compare.adapters("gradient", ours, exact, their_gradients(subject, subject.reference))
    compare.untouched(subject.model, before)
    compare.close("output", subject.apply(), subject.truth, subject.rounded)


def _of_encoder(subject: Subject) -> None:
    """The gradients of the network that makes a prompt, which peft's files do not hold: from its own parameters."""
    fresh = pf.init(subject.model, subject.config)
    (site, leaf), *_ = [item for item in fresh.params.items() if "embedding" in item[1]]
    kept = [
        {
            name.removeprefix("default.").replace(".", "_").replace("embedding_weight", "embedding"): one
            for name, one in model.prompt_encoder.named_parameters()
        }
        for model in (subject.exact, subject.reference)
    ]
    compare.equal("names of the network", sorted(leaf), sorted(kept[0]))
    rest = {path: dict(one) for path, one in subject.adapter.params.items() if path != site}
    same = {name: kept[1][name].detach().clone() for name in leaf}
    ours = our_gradients(subject, fresh.replace(params={**rest, site: same}))
    with quiet():
        grads = [
            dict(zip(names, torch.autograd.grad(loss(model(**subject.inputs_for(model))), names.values()), strict=True))
            for names, model in zip(kept, (subject.exact, subject.reference), strict=True)
        ]
    alone = [fresh.replace(params={site: {name: one[name] for name in leaf}}) for one in grads]
    compare.adapters("gradient", fresh.replace(params={site: ours.params[site]}), *alone)


def _slope(subject: Subject, adapter: pf.Adapter) -> None:
    """The gradient along a direction is the slope of the loss there, in float64."""
    model, h = subject.base(torch.float64), 1e-6
    start = double(adapter)
    way = moved(start.replace(params=torch.utils._pytree.tree_map(torch.zeros_like, start.params)), seed=9)

    def of(params: Any) -> Tensor:
        return loss(pf.apply(model, start.replace(params=params), subject.inputs_for(model)))

    grads = our_gradients(subject, adapter)
    ahead, back = (
        of(torch.utils._pytree.tree_map(lambda t, d, s=s: t + s * h * d, start.params, way.params)) for s in (1, -1)
    )
    along = sum((g.double() * way.params[p[0]][p[1]]).sum() for p, g in compare.items(grads))
    size = sum(g.double().abs().mul(way.params[p[0]][p[1]].abs()).sum() for p, g in compare.items(grads))
    if not abs(float(along - (ahead - back) / (2 * h))) <= 1e-4 * float(size):
        raise WrongError(
            f"gradient along a direction: {float(along):.6g}, the slope is {float((ahead - back) / 2 / h):.6g}"
        )


@procedure("only_params_are_updated", "parameters_after_loading_model")
def steps(subject: Subject, _: Mapping[str, Any]) -> None:
    """Three steps of SGD on a bound model give the adapter that peft's three steps give; the base stays as it was."""
    if by_hand.is_needed(subject.model_id):
        gradients(subject, {})
        return
    theirs, model = copy.deepcopy(subject.exact), subject.base(torch.float64)
    subject.config  # noqa: B018
    start = pf.load(saved(theirs), model)
    before, bound = compare.state(model), pf.bind(model, start)
    trained = [one for one in bound.parameters() if one.requires_grad]
    compare.equal("how many are trained", sum(one.numel() for one in trained), pf.count(start).trained)
    for module in (theirs, bound):
        optimizer = torch.optim.SGD(
            [one for one in module.parameters() if one.requires_grad], lr=RATE / _scale(subject)
        )
        for _step in range(STEPS):
            optimizer.zero_grad()
            with quiet():
                loss(module(**subject.inputs_for(module))).backward()
            optimizer.step()
    ours = pf.unbind(bound)
    compare.untouched(model, before)
    reached, start = pf.load(saved(theirs), model), pf.load(saved(subject.exact), model)
    compare.equal("sites", compare.names(ours), compare.names(reached))
    for (site, name), tensor in compare.items(reached):
        from_there = start.params[site][name]
        compare.close(f"step of {site}.{name}", ours.params[site][name] - from_there, tensor - from_there, share=1e-6)


def _scale(subject: Subject) -> float:
    """Their inputs go up to 89: steps in proportion."""
    return max(float(one.double().abs().max()) for one in subject.inputs.values()) ** 2


@procedure("training_layer_indexing")
def layer_indexing(subject: Subject, _: Mapping[str, Any]) -> None:
    """With `layers_to_transform=[0]` the sites, outputs and gradients are peft's, and fewer than without."""
    one = subject.with_(layers_to_transform=[0])
    fresh = pf.init(one.model, one.config)
    compare.equal("sites of a fresh adapter", compare.names(fresh), compare.names(one.adapter))
    compare.close("output", one.apply(), one.truth, one.rounded)
    compare.adapters("gradient", our_gradients(one, one.adapter), their_gradients(one, one.exact))
    whole = pf.init(subject.model, subject.config)
    if not len(fresh.params) < len(whole.params):
        raise WrongError(f"{len(fresh.params)} sites with layers_to_transform=[0], {len(whole.params)} without")


@procedure("training_gradient_checkpointing", "prompt_learning_with_gradient_checkpointing")
def checkpointing(subject: Subject, extra: Mapping[str, Any]) -> None:
    """Gradients with checkpointed blocks are those without, on a bound model in training mode without dropout."""
    model = without_dropout(subject.base())
    subject = subject.without("dropout")
    subject.config  # noqa: B018
    if subject.config_cls.__name__ == "PrefixTuningConfig":
        _refused(subject, model)
        return
    adapter = subject.adapter if not has_encoder(subject) else moved(pf.init(subject.model, subject.config))
    found: list[pf.Adapter] = []
    for checkpointed in (False, True):
        bound = pf.bind(
            model, adapter.replace(params=torch.utils._pytree.tree_map(torch.clone, adapter.params))
        ).train()
        if checkpointed:
            bound.enable_input_require_grads()
            bound.gradient_checkpointing_enable({"use_reentrant": extra.get("use_reentrant", True)})
        with quiet():
            loss(bound(**subject.inputs)).backward()
        trained = {name: one for name, one in bound.named_parameters() if one.requires_grad}
        grads = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in trained.items()}
        found.append(adapter.replace(params={"": grads}))
    compare.adapters("gradient with checkpointing", found[1], found[0])
    if not any(bool(tensor.any()) for _, tensor in compare.items(found[1])):
        raise WrongError("gradients with checkpointing: all zero")


def _refused(subject: Subject, model: nn.Module) -> None:
    """A prefix lives in a cache, which checkpointed blocks do not get: peft refuses it as well."""
    model.gradient_checkpointing_enable()
    try:
        pf.bind(model, subject.adapter).train()(**subject.inputs)
    except ValueError:
        return
    raise WrongError("a prefix under checkpointed blocks was run without a word")


def without_dropout(model: nn.Module) -> nn.Module:
    """The module with every probability of dropout at 0, those that are plain numbers included."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)
    return model


@procedure("prepare_for_training")
def prepared(subject: Subject, _: Mapping[str, Any]) -> None:
    """Embeddings of a bound model require grad once that is asked for, never those of the base; the same for k bits."""
    tokens = subject.inputs["input_ids"]
    subject.config  # noqa: B018
    adapter = pf.init(subject.model, subject.config)
    for base in (subject.base().requires_grad_(False), pf.prepare_for_kbit_training(subject.base())):
        bound = pf.bind(base, adapter)
        if bound.get_input_embeddings()(tokens).requires_grad and not _trains_embedding(adapter):
            raise WrongError("embeddings require grad before it was asked for")
        bound.enable_input_require_grads()
        if not bound.get_input_embeddings()(tokens).requires_grad:
            raise WrongError("embeddings do not require grad after enable_input_require_grads")
        if base.get_input_embeddings()(tokens).requires_grad:
            raise WrongError("embeddings of the base require grad")


def _trains_embedding(adapter: pf.Adapter) -> bool:
    return any("embedding" in name for leaf in adapter.params.values() for name in leaf)


@procedure("model_attr")
def bound_class(subject: Subject, _: Mapping[str, Any]) -> None:
    """A bound model is of the base's class, with its methods, and computes what `apply` does."""
    bound = pf.bind(subject.model, subject.adapter)
    compare.equal("class", type(bound), type(subject.model))
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        compare.equal(f"has {name}", hasattr(bound, name), hasattr(subject.model, name))
    compare.same("bound output", subject.run(bound), subject.apply())


@procedure("in_features_out_features_exposed")
def exposed(subject: Subject, _: Mapping[str, Any]) -> None:
    """An adapted layer of a bound model still says its sizes."""
    bound = pf.bind(subject.model, subject.adapter)
    for name, module in subject.model.named_modules():
        for attribute in ("in_features", "out_features"):
            if hasattr(module, attribute):
                compare.equal(
                    f"{name}.{attribute}", getattr(bound.get_submodule(name), attribute), getattr(module, attribute)
                )


@procedure("get_base_model_state_dict")
def base_state(subject: Subject, _: Mapping[str, Any]) -> None:
    """Of a bound model, the entries with the base's names are the base's, but for what the adapter replaces."""
    bound, base = pf.bind(subject.model, subject.adapter).state_dict(), subject.model.state_dict()
    replaced = {f"{site}.{name}" for site, leaf in subject.adapter.params.items() for name in leaf}
    compare.equal("missing names", sorted(set(base) - set(bound)), [])
    for name, tensor in base.items():
        if name not in replaced:
            compare.same(f"{name} of a bound model", bound[name], tensor)
    unused = peft.get_base_model_state_dict(subject.reference)
    compare.equal("names", sorted(base), sorted(unused))


@procedure("adding_multiple_adapters_with_bias_raises")
def two_biases(subject: Subject, _: Mapping[str, Any]) -> None:
    """Two adapters that train the same biases cannot be active together: refused, with the base whole."""
    one = subject.with_(bias="all")
    fresh = pf.init(one.model, one.config)
    before = compare.state(one.model)
    if not any("bias" in leaf for leaf in fresh.params.values()):
        return  # the base has no bias: there is nothing that both would replace
    try:
        pf.apply(one.model, (fresh, fresh.replace()), one.inputs)
    except ValueError:
        compare.untouched(one.model, before)
        return
    raise WrongError("two adapters that replace the same biases were applied without a word")
