"""Configs: peft's fields and defaults, `adapter_config.json` both ways, and values that a transform can hold."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import optree
import peft
import pytest
import torch
from oracle import IS_OLD, by_new_peft, quiet_peft
from same import adapter_of, mlp
from torch.utils import _pytree

import peftfn as pf

THEIRS = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
OURS = {field.name: field for field in dataclasses.fields(pf.LoraConfig)}

# Every field that both have, away from its default; several rows where a field takes values of several types.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"r": 3, "lora_alpha": 7, "lora_dropout": 0.25},
    {"target_modules": ["query", "value"], "exclude_modules": ["layer.0.query"]},
    {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.3\..*"},
    {"target_modules": {"b", "a"}, "exclude_modules": {"c"}},
    {"target_modules": "all-linear", "use_rslora": True},
    {"target_modules": ["q"], "layers_to_transform": [1, 3], "layers_pattern": "h"},
    {"target_modules": ["q"], "layers_to_transform": 2, "layers_pattern": ["h", "blocks"]},
    {"target_modules": ["q"], "rank_pattern": {"z.q": 4, "q": 2}, "alpha_pattern": {"z.q": 5, "q": 1.5}},
    {"target_parameters": ["mlp.experts.gate_up_proj"], "init_lora_weights": "gaussian"},
    {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False, "bias": "all"},
    {"target_modules": ["q"], "modules_to_save": ["score"], "task_type": "SEQ_CLS", "bias": "lora_only"},
    {"target_modules": ["q"], "task_type": peft.TaskType.CAUSAL_LM, "base_model_name_or_path": "org/name"},
    {"target_modules": ["q"], "revision": "v1", "inference_mode": True, "auto_mapping": {"parent_library": "here"}},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "none")


def hashes(tree: Any) -> bool:
    """Whether torch can hash a tree of this kind; 2.6 cannot where there is a dict in it."""
    try:
        hash(_pytree.tree_flatten(tree)[1])
    except TypeError:
        return False
    return True


def default_of(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def plain(config: Any) -> dict[str, Any]:
    """What the fields that both have say, as JSON has it; peft keeps lists of names as sets."""
    return shared_fields(json.dumps(config.to_dict(), default=sorted))


LATER = {"peft_version", "alora_invocation_tokens"} if IS_OLD else {"peft_version"}
"""Fields that older versions of peft do not have."""


def shared_fields(text: str) -> dict[str, Any]:
    """The fields that both have, out of JSON, with lists in one order."""
    given = {name: value for name, value in json.loads(text).items() if name in OURS and name not in LATER}
    return {name: sorted(value) if isinstance(value, list) else value for name, value in given.items()}


def test_each_field_has_the_name_and_the_default_that_it_has_in_peft() -> None:
    shared = OURS.keys() & THEIRS.keys()
    assert OURS.keys() - shared <= LATER
    assert {name: default_of(OURS[name]) for name in shared} == {name: default_of(THEIRS[name]) for name in shared}


def test_each_field_of_peft_is_ours_or_one_that_we_name_when_it_is_used() -> None:
    for name in THEIRS.keys() - OURS.keys() - {"peft_type"}:
        assert pf.LoraConfig.is_inactive(name, default_of(THEIRS[name])), name
        with pytest.raises(ValueError, match=rf"LoraConfig\({name}=True\): peft has this field, peftfn does not"):
            pf.LoraConfig(**dict[str, Any]({name: True}))


def test_each_task_type_of_peft_is_one_of_ours() -> None:
    for task in peft.TaskType:
        assert pf.LoraConfig(task_type=task).task_type == task.value


@every_setting
def test_peft_reads_the_config_that_we_write(settings: dict[str, Any], tmp_path: Path) -> None:
    ours = pf.LoraConfig(**settings)
    assert ours.save_pretrained(tmp_path) == tmp_path / "adapter_config.json"
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(theirs) is peft.LoraConfig
    assert plain(theirs) == plain(ours) == plain(peft.LoraConfig(**settings))
    assert list(dict(theirs.rank_pattern or {}).items()) == list(dict(ours.rank_pattern or {}).items())


@every_setting
def test_we_read_the_config_that_peft_writes(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.LoraConfig(**settings)
    theirs.save_pretrained(str(tmp_path))
    ours = pf.PeftConfig.from_pretrained(tmp_path)
    assert type(ours) is pf.LoraConfig
    assert plain(ours) == shared_fields((tmp_path / "adapter_config.json").read_text())


@every_setting
def test_a_config_is_the_same_after_its_own_file(settings: dict[str, Any], tmp_path: Path) -> None:
    config = pf.LoraConfig(**settings)
    config.save_pretrained(tmp_path)
    read = pf.LoraConfig.from_pretrained(tmp_path)
    assert read == config
    assert read.to_json() == config.to_json() == (tmp_path / "adapter_config.json").read_text()


@every_setting
def test_a_config_can_be_hashed_pickled_and_copied(settings: dict[str, Any]) -> None:
    config = pf.LoraConfig(**settings)
    for other in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        copy.copy(config),
        pf.LoraConfig(**settings),
    ):
        assert other == config
        assert hash(other) == hash(config)
    assert len({config, pf.LoraConfig(**settings), dataclasses.replace(config, r=99)}) == 2


def test_a_config_cannot_be_changed_nor_can_what_it_was_made_from_change_it() -> None:
    names, pattern = ["q"], {"q": 2}
    config = pf.LoraConfig(target_modules=names, rank_pattern=pattern)
    names.append("v")
    pattern["q"] = 5
    assert config == pf.LoraConfig(target_modules=["q"], rank_pattern={"q": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 9  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="part of a frozen value"):
        config.rank_pattern["q"] = 9  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    assert dataclasses.replace(config, r=9).r == 9


@pytest.mark.parametrize("library", [_pytree, optree], ids=["torch", "optree"])
def test_an_adapters_config_is_part_of_its_tree_and_not_one_of_its_leaves(library: Any) -> None:
    adapter = adapter_of(mlp(), rank_pattern={"0": 3}, alpha_pattern={"0": 2})
    leaves, tree = library.tree_flatten(adapter)
    assert len(leaves) == 3
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    doubled = library.tree_map(lambda tensor: tensor * 2, adapter)
    assert doubled.config is adapter.config
    assert torch.equal(doubled.params["0"]["lora_A"], adapter.params["0"]["lora_A"] * 2)
    same = library.tree_flatten(adapter.replace(config=copy.deepcopy(adapter.config)))[1]
    other = library.tree_flatten(adapter.replace(config=dataclasses.replace(adapter.config, lora_alpha=9)))[1]
    assert same == tree
    if library is optree or hashes({"a": 0}):
        assert hash(same) == hash(tree)
    assert other != tree


def test_a_file_with_an_unknown_field_is_an_error_that_names_it_and_near_ones(tmp_path: Path) -> None:
    path = pf.LoraConfig(target_modules=["q"]).save_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alfa": 3}))
    with pytest.raises(
        ValueError, match=r"adapter_config.json: LoraConfig has no field 'lora_alfa'. Did you mean lora_alp"
    ):
        pf.LoraConfig.from_pretrained(tmp_path)


@by_new_peft
@pytest.mark.parametrize(
    ("field", "value"), [("monteclora_config", {"num_samples": 4}), ("arrow_config", {"top_k": 2})]
)
def test_a_file_that_uses_what_we_do_not_support_is_an_error_that_names_it(
    field: str, value: Any, tmp_path: Path
) -> None:
    peft.LoraConfig(target_modules=["q"], **{field: value}).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=rf"adapter_config.json: LoraConfig\({field}=.*peftfn does not support it yet"):
        pf.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_a_file_whose_base_was_changed_by_its_init_is_an_error(init: str, tmp_path: Path) -> None:
    data = {"peft_type": "LORA", "target_modules": ["q"], "init_lora_weights": init}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' goes with a base whose weights it changed"):
        pf.PeftConfig.from_pretrained(tmp_path)


def test_the_least_that_a_file_can_say_is_enough(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q"]}')
    assert pf.PeftConfig.from_pretrained(tmp_path) == pf.LoraConfig(target_modules=["q"])


def test_fields_that_older_versions_of_peft_lack_are_in_a_file_only_where_they_are_used(tmp_path: Path) -> None:
    later = {"target_parameters": ["w"], "exclude_modules": ["v"], "peft_version": "0.21.2"}
    least = json.loads(pf.LoraConfig(target_modules=["q"]).save_pretrained(tmp_path).read_text())
    assert not later.keys() & least.keys()
    used = pf.LoraConfig(target_modules=["q"], **later)
    assert json.loads(used.save_pretrained(tmp_path).read_text()).items() >= later.items()


def test_a_config_of_another_method_is_not_read_as_lora() -> None:
    with pytest.raises(ValueError, match=r"holds a IA3Config \(peft_type='IA3'\), not a LoraConfig"):
        pf.LoraConfig.from_dict({"peft_type": "IA3"})
    with pytest.raises(ValueError, match=r"holds a AdaLoraConfig \(peft_type='ADALORA'\), not a LoraConfig"):
        pf.LoraConfig.from_dict({"peft_type": "ADALORA"})


def test_peft_and_we_make_the_same_sites_of_the_same_config(tmp_path: Path) -> None:
    ours = adapter_of(mlp(), target_modules="all-linear", rank_pattern={"2": 3}, use_rslora=True)
    ours.config.save_pretrained(tmp_path)
    with quiet_peft():
        theirs: Any = peft.get_peft_model(mlp(), peft.PeftConfig.from_pretrained(str(tmp_path)))
    modules = {path: module for path, module in theirs.base_model.model.named_children() if hasattr(module, "scaling")}
    scalings = {path: module.scaling["default"] for path, module in modules.items()}
    assert {path: float(leaf["scaling"]) for path, leaf in ours.buffers.items()} == pytest.approx(scalings)
