"""Tables of configs: peft's as ours and back, fields that are refused, and files of other versions."""

from __future__ import annotations

import copy
import json
import pickle
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft

import peftfn as pf
from peft_suite import compare, judge
from peft_suite.inventory import Case
from peft_suite.subject import converted, temporary
from peft_suite.table import test
from peft_suite.verdicts import NotOfferedError, WrongError, unsupported

CONFIG = "test_config"


def _folder() -> Path:
    folder = temporary() / f"config-{len(list(temporary().iterdir()))}"
    folder.mkdir()
    return folder


def _made(case: Case, **changes: Any) -> Any:
    """peft's config of a case, where its method is one of ours."""
    cls = case.params["config_class"]
    if judge.method_of(cls) not in judge.OFFERED:
        raise NotOfferedError(f"method {judge.method_of(cls)}")
    return cls(**{**case.params.get("mandatory_kwargs", {}), **changes})


def _ours(case: Case) -> type[pf.PeftConfig]:
    kind = judge.method_of(case.params["config_class"])
    return next(method.config for method in judge.TABLE if method.config.peft_type == kind)


@test(
    CONFIG,
    "test_methods",
    "test_save_pretrained",
    "test_to_dict",
    "test_from_json_file",
    "test_set_attributes",
    "test_config_copy",
    "test_config_deepcopy",
    "test_config_pickle_roundtrip",
    "test_save_pretrained_with_target_modules",
    "test_peft_version_is_stored",
)
def round_trips(case: Case, _: types.ModuleType) -> None:
    """A config of peft's comes through its file, and back through ours, with every field; copies are equal."""
    more = {"target_modules": ["a", "list"]} if case.test.endswith("target_modules") else {}
    theirs = _made(case, **more)
    if "version" in case.params:
        theirs.peft_version = case.params["version"]
    ours = converted(theirs)
    for one in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301
        compare.equal("a copy", one, ours)
    folder = _folder()
    ours.save_pretrained(folder)
    compare.equal("out of its file", pf.PeftConfig.from_pretrained(folder), ours)
    compare.equal("out of its dict", pf.PeftConfig.from_dict(ours.to_dict()), ours)
    back, given = type(theirs).from_pretrained(str(folder)).to_dict(), theirs.to_dict()
    for name, value in given.items():
        if name in ours.to_dict() and name != "inference_mode":
            compare.equal(f"{name} back in peft", _plain(back[name]), _plain(value))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset, list, tuple)) else getattr(value, "value", value)


@test(CONFIG, "test_valid_task_type")
def task_type(case: Case, _: types.ModuleType) -> None:
    """Every task type of peft's is one of ours."""
    kind = case.params["valid_task_type"]
    compare.equal("task_type", converted(_made(case, task_type=kind)).task_type, getattr(kind, "value", kind))


@test(CONFIG, "test_invalid_task_type")
def wrong_task_type(case: Case, _: types.ModuleType) -> None:
    """Another one is refused, with those that exist."""
    _made(case)
    refused(_ours(case), {"task_type": "invalid-task-type"}, mentions="CAUSAL_LM")


def refused(cls: type[pf.PeftConfig], fields: Mapping[str, Any], mentions: str = "") -> None:
    """Raise where a config is made of fields that peft refuses."""
    try:
        cls(**fields)
    except (ValueError, TypeError) as error:
        if mentions not in str(error):
            raise WrongError(f"the refusal does not name {mentions}: {error}") from error
        return
    raise WrongError(f"{cls.__name__}({dict(fields)}) was made without a word")


@test(
    CONFIG, "test_from_pretrained_forward_compatible", "test_from_pretrained_forward_compatible_load_from_peft_config"
)
def later_fields(case: Case, _: types.ModuleType) -> None:
    """A file with fields that nobody knows: peft ignores them with a warning."""
    folder = _folder()
    theirs = _made(case)
    theirs.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"foobar": "baz", "spam": 123}))
    compare.equal("config", pf.PeftConfig.from_pretrained(folder), converted(theirs))


@test(CONFIG, "test_from_pretrained_sanity_check")
def no_config(case: Case, _: types.ModuleType) -> None:
    """A file that is no config is refused, by the general class and by the method's own."""
    _made(case)
    folder = _folder()
    (folder / "adapter_config.json").write_text(json.dumps({"foo": "bar", "baz": 123}))
    for cls in (pf.PeftConfig, _ours(case)):
        try:
            cls.from_pretrained(folder)
        except (ValueError, TypeError):
            continue
        raise WrongError(f"{cls.__name__} read a file without a peft_type and with unknown fields")


@test(CONFIG, "test_from_peft_type")
def by_type(_: Case, __: types.ModuleType) -> None:
    """Each of our methods is found by peft's name of it."""
    for kind in sorted(judge.OFFERED):
        compare.equal("peft_type", pf.PeftConfig.from_dict({"peft_type": kind, **_needed(kind)}).peft_type, kind)


def _needed(kind: str) -> Mapping[str, Any]:
    return {"total_step": 1} if kind == "ADALORA" else {}


@test(CONFIG, "test_config_layers_to_transform_index_zero")
def layer_zero(case: Case, _: types.ModuleType) -> None:
    """Layer 0 alone is a choice of layers, and not none."""
    config: Any = converted(_made(case, layers_to_transform=0, layers_pattern="model.layers"))
    compare.equal("layers_to_transform", config.layers_to_transform, 0)
    compare.equal("layers_pattern", config.layers_pattern, "model.layers")


@test(CONFIG, "test_regex_with_layer_indexing_lora", "test_lora_config_layers_to_transform_validation")
def layers_of_a_regex(_: Case, __: types.ModuleType) -> None:
    """Layers cannot be chosen beside a regex, nor by a pattern alone."""
    for fields in (
        {"target_modules": ".*foo", "layers_to_transform": [0]},
        {"target_modules": ".*foo", "layers_pattern": ["bar"]},
        {"target_modules": ["query"], "layers_pattern": "model.layers"},
    ):
        refused(pf.LoraConfig, fields)
    pf.LoraConfig(target_modules=["foo"], layers_pattern=["bar"], layers_to_transform=[0])


@test(CONFIG, "test_ia3_is_feedforward_subset_invalid_config", "test_ia3_is_feedforward_subset_valid_config")
def feedforward(case: Case, _: types.ModuleType) -> None:
    """`feedforward_modules` are among the targets."""
    if "_invalid_" in case.test:
        return refused(pf.IA3Config, {"target_modules": ["k", "v"], "feedforward_modules": ["q"]}, "feedforward")
    pf.IA3Config(target_modules=".*.(SelfAttention|DenseReluDense).*(q|v|wo)$", feedforward_modules=".*.wo$")
    pf.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    return None


@test(CONFIG, "test_adalora_config_valid_timing_works", "test_adalora_config_timing_bounds_error")
def timing(case: Case, _: types.ModuleType) -> None:
    """A schedule that leaves steps to decide in is taken, another one refused."""
    if case.test.endswith("works"):
        pf.AdaLoraConfig(**case.params["timing_kwargs"])
    else:
        refused(pf.AdaLoraConfig, case.params["timing_kwargs"])


@test(CONFIG, "test_adalora_config_invalid_total_step_raises")
def no_steps(_: Case, __: types.ModuleType) -> None:
    """Without `total_step` there is no schedule: refused, here when a rank is to be allocated."""
    import torch

    adapter = pf.init(torch.nn.Sequential(torch.nn.Linear(4, 4)), pf.AdaLoraConfig(target_modules=["0"]))
    try:
        pf.adalora.budget(adapter, 1)
    except ValueError:
        return
    raise WrongError("ranks were scheduled without total_step")


@test(CONFIG, "test_nested_config_survives_save_load_roundtrip")
def nested(case: Case, _: types.ModuleType) -> None:
    """Configs within LoRA's: not offered where they ask for something."""
    config = peft.LoraConfig(r=4, target_modules=["lin0"])
    field = case.params["attribute_name"]
    setattr(config, field, case.params["nested_config_cls"](**{case.params["dummy_field"]: case.params["dummy_value"]}))
    try:
        ours: Any = converted(config)
    except ValueError as error:
        raise unsupported(error) or NotOfferedError(f"field {field}") from error
    compare.equal(field, ours.to_dict().get(field) is not None, True)
