"""What a config names in a model is what peft adapts there; what it cannot name is an error that helps."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import oracle
import peft
import pytest
import torch
import transformers
from bases import BASES, EXPERTS_ARE_PARAMETERS
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import constants
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn

import peftfn as pf
from peftfn.checkpoints import keys
from peftfn.methods import adalora_targets, ia3_targets, lora_targets, shira
from peftfn.methods.lora_targets import TARGETS
from peftfn.models import matching, renamed_modules


def nested() -> nn.Module:
    """Paths of a mixture of experts as transformers 4 had them, with indices inside indices, and names in names."""

    def block() -> nn.Module:
        experts = [nn.ModuleDict({"up_proj": nn.Linear(4, 6), "w": nn.Linear(6, 4)}) for _ in range(3)]
        return nn.ModuleDict(
            {"q_proj": nn.Linear(4, 4), "pre_q_proj": nn.Linear(4, 4), "experts": nn.ModuleList(experts)}
        )

    model = nn.Module()
    model.body = nn.Module()
    model.body.layers = nn.ModuleList(block() for _ in range(3))
    model.body.h = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)})])
    model.q_proj = nn.Linear(4, 4)
    model.head = nn.Linear(4, 2)
    return model


MODELS = {
    "nested": nested,
    "bert": BASES["bert"].make,
    "bert tokens": BASES["bert tokens"].make,
    "bert questions": BASES["bert questions"].make,
    "llama": BASES["llama"].make,
    "mlp": BASES["mlp"].make,
    "words": BASES["words"].make,
    "attention": BASES["attention"].make,
    "gpt2": BASES["gpt2"].make,
    "t5": BASES["t5"].make,
    "vit": BASES["vit"].make,
    "mixtral": BASES["mixtral"].make,
    "albert": lambda: transformers.AlbertModel(
        transformers.AlbertConfig(
            vocab_size=40, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=24
        )
    ),
}
QUERY = "bert.encoder.layer.1.attention.self.query"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

ADALORA = {"kind": "AdaLoraConfig", "total_step": 9}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("nested", {"target_modules": ["q_proj"]}),
    ("nested", {"target_modules": ["q_proj", "head"]}),
    ("nested", {"target_modules": ["0.up_proj"]}),
    ("nested", {"target_modules": ["layers.1.q_proj", "experts.0.w"]}),
    ("nested", {"target_modules": ["body.layers.1.q_proj"]}),
    ("nested", {"target_modules": r"body\.layers\.\d+\.(q_proj|experts\.[01]\.w)"}),
    ("nested", {"target_modules": r".*proj"}),
    ("nested", {"target_modules": "all-linear"}),
    ("nested", {"target_modules": "All-Linear"}),
    ("nested", {"target_modules": ["q_proj", "w"], "layers_to_transform": 1}),
    ("nested", {"target_modules": ["q_proj", "w"], "layers_to_transform": [0, 2]}),
    ("nested", {"target_modules": ["q_proj", "w"], "layers_to_transform": []}),
    ("nested", {"target_modules": ["w"], "layers_to_transform": 2, "layers_pattern": "experts"}),
    ("nested", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "layers"]}),
    ("nested", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"}),
    ("nested", {"target_modules": ["q_proj", "head"], "layers_to_transform": 0}),
    ("nested", {"target_modules": ["body.layers.2.q_proj", "w"], "layers_to_transform": 0}),
    ("nested", {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj", "body.h.0.q_proj"]}),
    ("nested", {"target_modules": ["q_proj"], "exclude_modules": r"body\..*\.[02]\..*"}),
    ("nested", {"target_modules": ["q_proj", "head"], "modules_to_save": ["head"]}),
    ("nested", {"target_modules": ["pre_q_proj"], "bias": "all"}),
    ("nested", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    ("nested", {"kind": "IA3Config", "target_modules": ["q_proj", "w"], "feedforward_modules": ["w"]}),
    ("nested", {"kind": "IA3Config", "target_modules": r".*proj", "feedforward_modules": r".*\.h\..*"}),
    ("nested", {"kind": "IA3Config", "target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}),
    ("bert", {"kind": "IA3Config"}),
    ("albert", {"kind": "IA3Config", "target_modules": ["query", "ffn"], "feedforward_modules": ["ffn"]}),
    ("nested", ADALORA | {"target_modules": ["q_proj", "w"], "layers_to_transform": 1}),
    ("nested", ADALORA | {"target_modules": "all-linear", "exclude_modules": ["w"]}),
    ("albert", ADALORA | {"target_modules": ["query", "value"]}),
    ("bert", {}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": [QUERY, "value"], "layers_to_transform": [0]}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["pooler.dense", "output.dense"]}),
    ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["pooler", "classifier"]}),
    ("bert", {"target_modules": ["query"], "modules_to_save": ["ooler"]}),
    ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["layer.0.attention"]}),
    ("bert", {"target_modules": ["query"], "bias": "all"}),
    ("bert", {"target_modules": ["word_embeddings", "position_embeddings"]}),
    ("bert", {"target_modules": ["query", "key"], "rank_pattern": {"key": 2, r"layer\.0\..*": 5}}),
    ("bert tokens", {"task_type": "TOKEN_CLS"}),
    ("bert questions", {"task_type": "QUESTION_ANS"}),
    ("llama", {"task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("mlp", {"target_modules": "all-linear"}),
    ("words", {"target_modules": "all-linear"}),
    ("attention", {"target_modules": ["attention"]}),
    ("attention", {"target_modules": ["attention", "head"], "rank_pattern": {"attention": 2}}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["wte", "c_proj"]}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": ["q", "wi"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("vit", {"target_modules": ["projection", "classifier"]}),
    ("albert", {"target_modules": ["query", "value"]}),
    ("mixtral", {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    ("mixtral", {"target_modules": ["o_proj"], "target_parameters": ["down_proj"]}),
    ("mixtral", {"target_modules": ["o_proj"], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}),
    (
        "mixtral",
        {"target_modules": [], "target_parameters": [EXPERTS[1], "gate.weight"], "rank_pattern": {"down_proj": 2}},
    ),
]


def skip_without_experts(options: dict[str, Any]) -> None:
    if "target_parameters" in options and not EXPERTS_ARE_PARAMETERS:
        pytest.skip("this transformers has no experts as parameters")


def skip_where_peft_differs(options: dict[str, Any]) -> None:
    skip_without_experts(options)
    if not oracle.IS_OLD:
        return
    if options.get("bias") == "lora_only":
        pytest.skip("this peft does not save these biases")
    if "layers_pattern" in options and options["layers_to_transform"] == 0:
        pytest.skip("this peft takes layer 0 for none where there is a pattern")
    chosen = options.get("layers_to_transform", []) != [] and "layers_pattern" not in options
    if chosen and "w" in options["target_modules"]:
        pytest.skip("this peft takes an expert's index for that of its layer")


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize(("model", "options"), CONFIGS, ids=[f"{model}: {options}" for model, options in CONFIGS])
def test_the_same_config_adapts_and_trains_what_peft_does(model: str, options: dict[str, Any]) -> None:
    skip_where_peft_differs(options)
    base = MODELS[model]()
    options = options if "kind" in options else {"r": 4, **options}
    ours = pf.init(base, oracle.config_of(pf, options))
    theirs = oracle.made(base, options)
    assert shapes(keys.to_keys(ours)) == shapes(oracle.file_of(theirs))
    # With bias="all" peft also marks the bias of a module that a trained copy has taken the place of.
    trained = [p for name, p in oracle.trained(theirs).items() if ".original_module." not in name]
    assert pf.count(ours).trained == sum(parameter.numel() for parameter in trained)


def tiny(model_type: str) -> nn.Module:
    """A model of two layers of that type, without weights."""
    config = transformers.AutoConfig.for_model(model_type)
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
        for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers"):
            if hasattr(part, name):
                setattr(part, name, 2)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[-2:]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers about its own models
        return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("model_type", sorted(set(DEFAULTS) & set(transformers.CONFIG_MAPPING)))
def test_default_targets_are_pefts(model_type: str) -> None:
    model = tiny(model_type)
    ours = pf.init(model, pf.LoraConfig(r=1))
    # peft's rewriting of mixture-of-experts configs hides from it that none was given; its table says what it would do.
    options = {"target_modules": DEFAULTS[model_type]} if model_type == "mixtral" else {}
    assert shapes(keys.to_keys(ours)) == shapes(oracle.file_of(oracle.made(model, {"r": 1, **options})))


@pytest.mark.parametrize("model_type", ["t5", "mt5", "gpt2", "bloom", "opt", "bart", "llama", "roberta", "gpt_neox"])
@pytest.mark.parametrize("options", [{"kind": "IA3Config"}, ADALORA], ids=["ia3", "adalora"])
def test_default_targets_of_other_methods_are_pefts(options: dict[str, Any], model_type: str) -> None:
    model = tiny(model_type)
    ours = pf.init(model, oracle.config_of(pf, options))
    assert shapes(keys.to_keys(ours)) == shapes(oracle.file_of(oracle.made(model, options)))


TABLES: dict[str, Mapping[str, Sequence[str] | str]] = {
    "LORA_TARGET": TARGETS,
    "ADALORA_TARGET": adalora_targets.TARGETS,
    "IA3_TARGET": ia3_targets.TARGETS,
    "IA3_FEEDFORWARD": ia3_targets.FEEDFORWARD,
}
if not oracle.IS_OLD:
    TABLES |= {f"{name}_TARGET": TARGETS for name in ("LOHA", "GRALORA", "SUPERTUNING")}
    TABLES |= {f"{name}_TARGET": lora_targets.DENSE_TARGETS for name in ("C3A", "FOURIERFT")}
    TABLES |= {"SHIRA_TARGET": shira.DEFAULTS}


@pytest.mark.parametrize("name", TABLES)
def test_the_table_of_default_targets_has_all_of_pefts(name: str) -> None:
    theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_MODULES_MAPPING")
    ours = {kind: found if isinstance(found, str) else list(found) for kind, found in TABLES[name].items()}
    assert {kind: ours.get(kind) for kind in theirs} == theirs
    assert oracle.IS_OLD or name == "LORA_TARGET" or ours.keys() == theirs.keys()


NAMES = ["q", "v", "qq", "a_q", "layer", "layers", "h", "0", "1", "2", "10", "head"]


REGEXES = [r".*\.q", r"layers?\..*(q|v)", r".*\.\d+\.(q|h)", r"q|.*\.head"]


def some_path(draw: random.Random, longest: int = 6) -> str:
    return ".".join(draw.choices(NAMES, k=draw.randint(1, longest)))


def some_options(draw: random.Random) -> dict[str, Any]:
    """Options that choose modules, in every combination that peft allows; an old one reads layers otherwise."""

    def several(most: int) -> list[str]:
        return [some_path(draw, 2) for _ in range(draw.randint(1, most))]

    found: dict[str, Any] = {"target_modules": several(4)}
    if draw.random() < 0.2:
        found = {"target_modules": draw.choice(REGEXES)}
    elif draw.random() < 0.5 and not oracle.IS_OLD:
        found["layers_to_transform"] = draw.choice([0, 1, [0], [1, 2], [10], []])
        if draw.random() < 0.5:
            found["layers_pattern"] = draw.choice(["layer", "h", ["layers", "h"], "qq.layer", []])
    if draw.random() < 0.3:
        found["exclude_modules"] = draw.choice([several(3), r".*\.1\..*", r".*\.h", r"h"])
    if draw.random() < 0.3:
        found["modules_to_save"] = several(2)
    return found


def test_on_random_names_the_rules_are_pefts() -> None:
    draw = random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(300):
        options = some_options(draw)
        ours, theirs = oracle.config_of(pf, options), oracle.config_of(peft, options)
        for path in {some_path(draw) for _ in range(40)}:
            expected = bool(check_target_module_exists(theirs, path))
            assert matching.is_target(ours, path) == expected, (options, path)
            seen[expected] += 1
    assert min(seen.values()) > 500  # both answers came up


def init(model: nn.Module, names: Any, **options: Any) -> pf.Adapter:
    return pf.init(model, pf.LoraConfig(r=2, target_modules=names, **options))


@pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="this transformers has no experts as parameters")
def test_names_of_parameters_are_pefts_sites_whatever_their_order() -> None:
    model = MODELS["mixtral"]()
    one, other = (init(model, [], target_parameters=names) for names in (EXPERTS, EXPERTS[::-1]))
    assert list(keys.to_keys(one)) == list(keys.to_keys(other))
    assert all(torch.equal(a, b) for a, b in zip(pf.leaves(one), pf.leaves(other), strict=True))


OLD_NAMES = {
    "by the last name": (["query", "value"], {"q_proj", "v_proj"}),
    "by more of the path": (["attention.attention.query"], {"q_proj"}),
    "beside a present name": (["query", "fc1"], {"q_proj", "fc1"}),
    "one layer's": (["layer.1.attention.output.dense"], {"1.attention.o_proj"}),
    "several at once": (["dense"], {"o_proj", "fc1", "fc2"}),
    "by a regex": (r".*layer\.0\..*\.(query|key)", {"0.attention.q_proj", "0.attention.k_proj"}),
}


@pytest.mark.skipif(
    not renamed_modules.old_paths(MODELS["vit"]()), reason="this transformers has not renamed ViT's layers"
)
@pytest.mark.parametrize(("names", "expected"), OLD_NAMES.values(), ids=OLD_NAMES)
def test_a_layer_that_transformers_renamed_is_found_by_its_old_name(names: Any, expected: set[str]) -> None:
    found = init(MODELS["vit"](), names)
    assert isinstance(found.config, pf.LoraConfig)
    assert set(found.config.target_modules or ()) == expected
    assert found.params.keys() == init(MODELS["vit"](), list(expected)).params.keys()


@pytest.mark.skipif(
    not renamed_modules.old_paths(MODELS["vit"]()), reason="this transformers has not renamed ViT's layers"
)
def test_a_layer_that_transformers_renamed_is_left_out_by_its_old_name() -> None:
    found = init(MODELS["vit"](), ["query", "value"], exclude_modules=["layer.0.attention.attention.query"])
    assert [path.split("vit.layers.")[1] for path in found.params] == [
        "0.attention.v_proj",
        "1.attention.q_proj",
        "1.attention.v_proj",
    ]


# What is asked for, and what the error has to say.
ERRORS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a misspelt name": ("bert", {"target_modules": ["qurey"]}, ["['qurey']", "'query' (2)"]),
    "one of several names": ("bert", {"target_modules": ["query", "valeu"]}, ["['valeu']", "'value' (2)"]),
    "a regex": ("llama", {"target_modules": r".*\.q_prj"}, [r"q_prj", "'q_proj' (2)"]),
    "nothing like it": ("mlp", {"target_modules": ["zzz"]}, ["['zzz']", "Sequential"]),
    "a layer that is not there": (
        "bert",
        {"target_modules": ["query"], "layers_to_transform": 7},
        ["layers_to_transform=7"],
    ),
    "a pattern that is not there": (
        "bert",
        {"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "blocks"},
        ["layers_pattern='blocks'"],
    ),
    "a norm": (
        "bert",
        {"target_modules": ["LayerNorm"]},
        ["LayerNorm", "bert.embeddings.LayerNorm", "exclude_modules"],
    ),
    "all excluded": (
        "bert",
        {"target_modules": ["query"], "exclude_modules": ["query"]},
        ["exclude_modules", "takes away"],
    ),
    "all saved": ("mlp", {"target_modules": ["5"], "modules_to_save": ["5"]}, ["modules_to_save", "takes away"]),
    "no module to save": (
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["clasifier"]},
        ["['clasifier']", "'classifier'"],
    ),
    "an unknown model type": ("albert", {}, ["'albert'", "target_modules", "query"]),
    "no model type": ("nested", {}, ["Module", "target_modules", "q_proj"]),
    "a parameter": ("mixtral", {"target_parameters": ["experts.down_prj"]}, ["'experts.down_prj'", "'down_proj'"]),
    "a rank pattern": ("mlp", {"target_modules": ["0"], "rank_pattern": {"3": 2}}, ["rank_pattern", "'3'"]),
    "an alpha pattern": ("mlp", {"target_modules": ["0"], "alpha_pattern": {"3": 2}}, ["alpha_pattern", "'3'"]),
    "a regex and layers": ("bert", {"target_modules": ".*query", "layers_to_transform": 0}, ["layers_to_transform"]),
    "a pattern without layers": (
        "bert",
        {"target_modules": ["query"], "layers_pattern": "layer"},
        ["layers_to_transform"],
    ),
}


@pytest.mark.parametrize(("model", "options", "said"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_found_is_an_error_that_names_it(model: str, options: dict[str, Any], said: list[str]) -> None:
    skip_without_experts(options)
    with pytest.raises(ValueError, match=re.escape(said[0])) as caught:
        pf.init(MODELS[model](), oracle.config_of(pf, options))
    assert [part for part in said if part not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
