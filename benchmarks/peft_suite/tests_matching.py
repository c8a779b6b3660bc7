"""Tables of names: which modules a config targets, by what `init` makes of it on a module with these paths."""

from __future__ import annotations

import types
from typing import Any

import peft
import transformers as hf
from torch import nn

import peftfn as pf
from peft_suite import compare, models, verdicts
from peft_suite.inventory import Case
from peft_suite.made import Made, seeded
from peft_suite.subject import converted, quiet
from peft_suite.table import test
from peft_suite.verdicts import UnfitError, WrongError

UTILS = "test_tuners_utils"
KINDS: dict[str, Any] = {
    "causal": hf.AutoModelForCausalLM,
    "seq2seq": hf.AutoModelForSeq2SeqLM,
    "base": hf.AutoModel,
    "classes": hf.AutoModelForSequenceClassification,
}


def with_path(path: str, leaf: nn.Module | None = None) -> nn.Module:
    """A module that has one linear layer, at this path."""
    root = nn.Module()
    *above, last = path.split(".")
    module = root
    for name in above:
        module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.add_module(last, leaf or nn.Linear(4, 4))
    return root


@test(UTILS, "test_regex_matching_valid")
def names(case: Case, _: types.ModuleType) -> None:
    """A path is a site where peft's rules match it, and is none where they do not."""
    key, targets, layers, pattern, expected = case.params["values"]
    if not key:
        raise UnfitError("a module cannot have an empty path")
    fields = {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": pattern}
    config = converted(peft.LoraConfig(**fields))
    model = with_path(key)
    above = model.get_submodule(key.rpartition(".")[0])
    for name in targets if isinstance(targets, list) else ():
        if not hasattr(above, name):
            above.add_module(name, nn.Linear(4, 4))  # a name that no module has is refused
    try:
        found = key in pf.init(model, config).params
    except ValueError as error:
        if not verdicts.is_refusal(error):
            raise
        found = False
    compare.equal(f"{key} is a site of {fields}", found, expected)


@test(UTILS, "test_maybe_include_all_linear_layers_lora", "test_all_linear_nested_targets_correct_layers")
def all_linear(case: Case, _: types.ModuleType) -> None:
    """`all-linear` has the sites of the names that peft expects for it."""
    model_id, kind, given, expected = case.params["values"]
    model = _model(model_id, KINDS[kind])
    found, wanted = (sorted(pf.init(model, pf.LoraConfig(target_modules=names)).params) for names in (given, expected))
    compare.equal("sites", found, wanted)
    with quiet():
        theirs = peft.get_peft_model(_model(model_id, KINDS[kind]), peft.LoraConfig(target_modules=given))
    compare.equal("sites of peft", found, sorted(theirs.targeted_module_names))


def _model(model_id: str, kind: Any) -> nn.Module:
    if not models.is_known(model_id):
        raise UnfitError(f"no base is built here for {model_id}")
    return models.build(model_id, kind)


@test(UTILS, "test_maybe_include_all_linear_layers_ia3_loha")
def all_linear_ia3(_: Case, __: types.ModuleType) -> None:
    """The same for IA3."""
    model = _model("peft-internal-testing/tiny-random-LlamaForCausalLM", KINDS["causal"])
    expected = ["k_proj", "v_proj", "q_proj", "o_proj", "down_proj", "up_proj", "gate_proj"]
    configs = [pf.IA3Config(target_modules=names, feedforward_modules=[]) for names in ("all-linear", expected)]
    compare.equal("sites", *(sorted(pf.init(model, config).params) for config in configs))


@test(UTILS, "test_maybe_include_all_linear_does_not_target_classifier_head")
def all_linear_head(_: Case, __: types.ModuleType) -> None:
    """The head of a classifier is trained whole, and no target."""
    model = _model("peft-internal-testing/tiny-random-LlamaForCausalLM", KINDS["classes"])
    adapter = pf.init(model, pf.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    compare.equal("names at the head", sorted(adapter.params["score"]), ["weight"])
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    compare.equal("sites", sorted(adapter.params), sorted(linear))


def _same_sites(model: nn.Module, config: Any) -> pf.Adapter:
    """Ours for peft's config, whose sites have to be peft's, ranks and scalings included."""
    made = Made(model, config, {})
    fresh = pf.init(model, made.config)
    compare.equal("sites", compare.names(fresh), compare.names(made.adapter))
    for (site, name), tensor in compare.items(fresh):
        compare.equal(f"shape of {site}.{name}", tensor.shape, made.adapter.params[site][name].shape)
    for site, leaf in fresh.buffers.items():
        if "scaling" in leaf:
            compare.same(f"scaling of {site}", leaf["scaling"], made.adapter.buffers[site]["scaling"])
    return fresh


@test(
    UTILS,
    "test_one_targeted_module_regex",
    "test_two_targeted_module_regex",
    "test_one_targeted_module_list",
    "test_two_targeted_module_list",
    "test_ia3_targeted_module_regex",
    "test_ia3_targeted_module_list",
)
def targeted(case: Case, module: types.ModuleType) -> None:
    """Names and regexes of toy modules give peft's sites."""
    several = "two" in case.test or "ia3" in case.test
    listed: Any = ["lin0", "lin1"] if several else ["lin0"]
    names: Any = listed if case.test.endswith("list") else (".*lin.*" if several else "lin0")
    if "ia3" in case.test:
        config: Any = peft.IA3Config(target_modules=names, feedforward_modules=names)
    else:
        config = peft.LoraConfig(target_modules=names)
    compare.equal("sites", sorted(_same_sites(seeded(module.MLP), config).params), listed)


def same_sites(model: nn.Module, config: Any) -> None:
    """Raise where the sites, shapes or scalings of a fresh adapter are not peft's."""
    _same_sites(model, config)


@test("test_custom_models", "test_multirank", "test_multirank_2")
def ranks(case: Case, module: types.ModuleType) -> None:
    """Ranks and alphas by pattern are peft's, layer by layer."""
    patterns: dict[str, int] = {"lin0": 4}
    if case.test.endswith("2"):
        patterns = {f"layers.{i}.lin{j}": 64 // (i + 1) for i in range(10) for j in range(2)}
    config = peft.LoraConfig(
        target_modules=["lin0", "lin1"], rank_pattern=patterns, alpha_pattern={k: 2 * v for k, v in patterns.items()}
    )
    fresh = _same_sites(seeded(module.DeepMLP if case.test.endswith("2") else module.MLP), config)
    for site, rank in patterns.items():
        compare.equal(f"rank of {site}", fresh.params[site]["lora_A"].shape[0], rank)


@test(
    "test_custom_models",
    "test_default_target_modules_not_set_raises",
    "test_default_target_modules_not_set_model_type_set_raises",
    "test_default_target_modules_list_of_str",
    "test_default_target_modules_str",
)
def defaults(_: Case, module: types.ModuleType) -> None:
    """A toy module has no default targets: refused, with what to do."""
    model = seeded(module.MLP)
    try:
        pf.init(model, pf.LoraConfig())
    except ValueError as error:
        if "target_modules" not in str(error):
            raise WrongError(f"the refusal does not name target_modules: {error}") from error
        return
    raise WrongError("targets were found for a module that no table knows")
