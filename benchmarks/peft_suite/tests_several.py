"""Tables of several adapters on one toy model: active together, one for each row, combined."""

from __future__ import annotations

import types
from typing import Any

import peft
import torch

import peftfn as pf
from peft_suite import compare, judge, verdicts
from peft_suite.inventory import Case
from peft_suite.made import Made, seeded
from peft_suite.procedures_several import EXACT, OF_DELTAS, mixed_rows
from peft_suite.subject import cast, quiet, saved
from peft_suite.table import test
from peft_suite.verdicts import NotOfferedError, WrongError

CUSTOM = "test_custom_models"


def _pair(case: Case, module: types.ModuleType) -> tuple[Made, Made]:
    """The base of a row of the table of active adapters, with its two configs; peft's own skipping is asked first."""
    group, given = getattr(module, case.group)(), case.params
    cls = given["config_cls"]
    if case.test != "test_multiple_active_adapters_forward":
        module._skip_if_merging_not_supported(given["test_name"], cls, given["config_kwargs_1"])
    module._skip_tests_with_multiple_adapters_with_target_parameters(cls, given["config_kwargs_2"])
    first = Made(seeded(group.resolve_model_cls, given["tuner_method"]), cls(**given["config_kwargs_1"]))
    second = first.beside(cls(**given["config_kwargs_2"]))
    first.config, second.config  # noqa: B018
    return first, second


def _together(first: Made, second: Made) -> Any:
    """peft's model in float64 with both of them active."""
    model = peft.PeftModel.from_pretrained(first.base(torch.float64), str(first.folder), "one")
    model.load_adapter(str(second.folder), "two")
    model = cast(model, torch.float64).eval()
    for module in model.modules():
        if isinstance(module, (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.AuxiliaryTrainingWrapper)):
            module.set_adapter(["one", "two"])
    return model


@test(
    CUSTOM,
    "test_multiple_active_adapters_forward",
    "test_multiple_active_adapters_merge_and_unmerge",
    "test_merge_layers_multi",
    "test_sequential_merge_matches_batch_merge",
    "test_unmerge_after_sequential_merge_restores_base",
)
def active_together(case: Case, module: types.ModuleType) -> None:
    """`apply` of both is peft's output of both, and so is merging both, together and one after the other."""
    first, second = _pair(case, module)
    both, before = (first.adapter, second.adapter), compare.state(first.model)
    with quiet():
        truth = first.run(_together(first, second))
    ours = first.apply(both)
    compare.close("output of both", ours, truth)
    for single in (first, second):
        compare.close("output of one", single.apply(), single.truth, single.rounded)
        compare.differ("the other one", ours, single.apply())
    at_once = pf.merge(first.model.state_dict(), both)
    stepwise = pf.merge(pf.merge(first.model.state_dict(), first.adapter), second.adapter)
    for params in (at_once, stepwise):
        with torch.no_grad():
            merged = torch.func.functional_call(first.model, params, (), first.inputs, tie_weights=False)
        compare.close("output of merged weights", merged, truth)
    compare.untouched(first.model, before)
    _as_cat(first, second, truth)


def _as_cat(first: Made, second: Made, truth: torch.Tensor) -> None:
    if first.config.peft_type == "LORA" and not first.kwargs.get("target_parameters"):
        mixed = pf.combine([first.adapter, second.adapter], [1.0, 1.0], "cat")
        compare.close("output of cat", first.apply(mixed), truth)


def _rows(case: Case, module: types.ModuleType) -> tuple[Made, Made]:
    """The base and the two configs of a row of the tables of mixed batches."""
    configs = [case.params["config0"], case.params["config1"]]
    kind = judge.method_of(type(configs[0]))
    if kind not in judge.OFFERED:
        raise NotOfferedError(f"method {kind}")
    named = case.test.removeprefix("test_mixed_adapter_batches_")
    bases = {"lora_conv1d": "ModelEmbConv1D", "lora_conv2d": "ModelConv2D", "mha": "ModelMha", "unsupp": "MLPWithGRU"}
    base = next((name for start, name in bases.items() if named.startswith(start)), "MLP")
    inputs = {"X": torch.arange(270).view(6, 5, 3, 3)} if base == "ModelConv2D" else None
    first = Made(seeded(getattr(module, base)), configs[0], inputs)
    return first, first.beside(configs[1])


@test(
    CUSTOM,
    *[
        f"test_mixed_adapter_batches_{name}"
        for name in (
            "mlp",
            "different_target_layers",
            "multiple_modules_to_save",
            "unsupported_layer_raises",
            "partly_overlapping_target_layers",
            "lora_conv1d_emb",
            "lora_conv1d_emb_multiple_modules_to_save",
            "lora_conv2d",
            "mha_raises",
        )
    ],
)
def rows(case: Case, module: types.ModuleType) -> None:
    """Each row of a batch is that of its own adapter; where peft raises, a refusal is as right."""
    first, second = _rows(case, module)
    try:
        mixed_rows(first, second)
    except (ValueError, TypeError) as error:
        if not (case.test.endswith("_raises") and verdicts.is_refusal(error)):
            raise


@test(CUSTOM, "test_mixed_adapter_batches_length_mismatch_raises")
def wrong_length(case: Case, module: types.ModuleType) -> None:
    """An index of another length than the batch is refused."""
    first, second = _rows(case, module)
    try:
        pf.apply(first.model, pf.stack([first.adapter, second.adapter]), first.inputs, index=[-1] * 5)
    except ValueError:
        return
    raise WrongError("an index of 5 for a batch of 9 was taken")


@test(CUSTOM, "test_mixed_adapter_batches_training_mode_raises")
def rows_in_training(case: Case, module: types.ModuleType) -> None:
    """Mixed batches train here: each adapter's gradient is that of its own rows."""
    first, second = _rows(case, module)
    index = [row % 3 - 1 for row in range(9)]
    stacked = pf.stack([first.adapter, second.adapter])

    def loss(params: Any) -> torch.Tensor:
        return pf.apply(first.model, stacked.replace(params=params), first.inputs, index=index).square().sum()

    grads = pf.unstack(stacked.replace(params=torch.func.grad(loss)(stacked.params)))
    for number, single in enumerate((first, second)):
        own = {"X": first.inputs["X"][[row for row in range(9) if index[row] == number]]}
        alone = torch.func.grad(
            lambda params, one=single, own=own: (
                pf.apply(one.model, one.adapter.replace(params=params), own).square().sum()
            )
        )(single.adapter.params)
        compare.adapters("gradient of its rows", grads[number], single.adapter.replace(params=alone))


def _deltas(made: Made, adapter: pf.Adapter) -> torch.Tensor:
    plain = made.model.state_dict()
    return torch.cat([(t - plain[name]).flatten() for name, t in pf.merge(plain, adapter).items()])


@test(CUSTOM, "test_add_weighted_adapter_with_different_scaling")
def scalings(case: Case, module: types.ModuleType) -> None:
    """Unlike scalings, combined: peft's weights where nothing is random, else as near to the sum as peft asks for."""
    way, weights = case.params["combination_type"], case.params["weights"]
    config = {"r": 8, "target_modules": ["lin0"], "init_lora_weights": False}
    first = Made(seeded(module.MLP), peft.LoraConfig(lora_alpha=16, **config))
    second = first.beside(peft.LoraConfig(lora_alpha=32, **config))
    pruned = {"density": 0.5} if any(word in way for word in ("ties", "dare", "prune")) else {}
    ours = pf.combine([first.adapter, second.adapter], weights, way, **pruned)
    if way in (*EXACT, *OF_DELTAS, "cat"):
        model = cast(peft.PeftModel.from_pretrained(first.base(), str(first.folder), "one"), torch.float64)
        model.load_adapter(str(second.folder), "two")
        cast(model, torch.float64)
        model.add_weighted_adapter(["one", "two"], weights, "mixed", combination_type=way, **pruned)
        model.set_adapter("mixed")
        compare.close("output", first.apply(ours), first.run(model.eval()))
        return
    wanted = weights[0] * _deltas(first, first.adapter) + weights[1] * _deltas(first, second.adapter)
    got = _deltas(first, ours)
    correlation = float(torch.corrcoef(torch.stack([got, wanted]))[0, 1])
    if not correlation > case.params["min_corr"]:
        raise WrongError(f"correlation with the sum {correlation:.3f}, expected above {case.params['min_corr']}")


@test(CUSTOM, "test_add_weighted_adapter_cat_with_rank_pattern")
def rank_patterns(_: Case, module: types.ModuleType) -> None:
    """Ranks that patterns set apart are concatenated: the sum of what both add."""
    config = {"target_modules": ["lin0", "lin1"], "r": 8}
    first = Made(seeded(module.MLP), peft.LoraConfig(**config, rank_pattern={"lin0": 2}))
    second = first.beside(peft.LoraConfig(**config, rank_pattern={"lin0": 16}))
    mixed = pf.combine([first.adapter, second.adapter], [1.0, 1.0], "cat")
    wanted = _deltas(first, first.adapter) + _deltas(first, second.adapter)
    compare.close("weights added", _deltas(first, mixed), wanted.double())


@test(
    CUSTOM,
    "test_add_weighted_adapter_negative_weight_negates_adapter",
    "test_add_weighted_adapter_subtraction_with_negative_weights",
)
def negative(_: Case, module: types.ModuleType) -> None:
    """A weight of -1 negates what an adapter adds; an adapter less itself adds nothing."""
    one = Made(seeded(module.MLP), peft.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    delta = _deltas(one, one.adapter).double()
    compare.close("negated", _deltas(one, pf.combine([one.adapter], [-1.0], "linear")), -delta)
    less = _deltas(one, pf.combine([one.adapter, one.adapter.replace()], [1.0, -1.0], "linear"))
    if not float(less.abs().max()) <= 1e-5 * float(delta.abs().max()):
        raise WrongError(f"an adapter less itself adds {float(less.abs().max()):.2g}")


@test(
    CUSTOM,
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
)
def with_and_without_head(case: Case, module: types.ModuleType) -> None:
    """One adapter with a saved module, one without, on one base: each as in peft, whichever comes first."""
    kind = judge.method_of(case.params["config_cls"])
    if kind not in judge.OFFERED:
        raise NotOfferedError(f"method {kind}")
    cls = case.params["config_cls"]
    extra = {"feedforward_modules": ["lin0"]} if kind == "IA3" else {}
    configs = [cls(target_modules=["lin0"], modules_to_save=heads, **extra) for heads in (["lin1"], None)]
    if case.test.endswith("switched"):
        configs.reverse()
    first = Made(seeded(module.MLP), configs[0])
    second = first.beside(configs[1])
    for one in (first, second):
        compare.close("output", one.apply(), one.truth, one.rounded)


@test(
    CUSTOM,
    "test_multiple_adapters_mixed_modules_to_save_merging_adapters",
    "test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
    "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
)
def combined_heads(case: Case, module: types.ModuleType) -> None:
    """A saved module that one adapter has goes into the combination; two of them are refused."""
    both = case.test.endswith("_raises") or "seq_cls" in case.test
    first = Made(seeded(module.MLP), peft.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"]))
    second = first.beside(peft.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"] if both else None))
    try:
        mixed = pf.combine([first.adapter, second.adapter], [1.0, 1.0])
    except ValueError:
        if both:
            return
        raise
    if both:
        raise WrongError("two saved modules were combined without a word")
    compare.same("saved module", mixed.params["lin1"]["weight"], first.adapter.params["lin1"]["weight"])
    first.apply(mixed)


@test(CUSTOM, "test_adapter_name_makes_no_difference")
def own_name(case: Case, module: types.ModuleType) -> None:
    """What peft saved under a name of one's own is the adapter that it saves as `default`."""
    config = case.params["config0"]
    kind = judge.method_of(type(config))
    if kind not in judge.OFFERED:
        raise NotOfferedError(f"method {kind}")
    one = Made(seeded(module.MLP), config)
    torch.manual_seed(0)
    with quiet():
        named = peft.get_peft_model(one.base(), one.peft_config(), adapter_name="other-name")
        plain = peft.get_peft_model(one.base(), one.peft_config())
    named.load_state_dict(
        {k.replace(".default", ".other-name"): t for k, t in plain.state_dict().items()}, strict=False
    )
    loaded = pf.load(saved(named) / "other-name", one.model)
    compare.identical("loaded", loaded, pf.load(saved(plain), one.model))
