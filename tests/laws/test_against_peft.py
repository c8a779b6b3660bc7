"""Each method here and in peft: from the same tensors the same outputs, gradients, training, merges and files."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import peft
import pytest
import torch
from bases import BASES, EXPERTS_ARE_PARAMETERS, Base
from exact import Float64, assert_close_to_truth, in_float64
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftfn as pf
from peftfn.checkpoints import keys

# Both libraries compute the same sums; ours scales the narrow side of the product and adds while it multiplies, so
# float32 results differ in their last bits: each is held to the truth, what peft computes in float64 (exact.py).
# In float64 rounding is out of the way: what is left would be another formula. What the number is relative to,
# `oracle.furthest` and `distance` say.
FORMULA = 1e-13
# Ten steps at a rate of 0.001 go 0.01 far; AdamW divides by the size of the gradient, and so grows its rounding.
TRAINING = 1e-5


class Case(NamedTuple):
    """A base and the options of a config.

    Attributes:
        tied: the adapter changes one end of a tied weight; peft's merge then changes the other end as well.
    """

    base: str
    options: dict[str, Any]
    tied: bool = False


def lora(*targets: str, **options: Any) -> dict[str, Any]:
    # s = 6 / 4 is no power of two: with one, products scaled before and after would agree in every bit.
    return {"r": 4, "lora_alpha": 6, **({"target_modules": list(targets)} if targets else {}), **options}


def ia3(*targets: str, feedforward: list[str] | str | None = None, **options: Any) -> dict[str, Any]:
    """Options of (IA)³; without targets those of the model type."""
    named = {"target_modules": list(targets), "feedforward_modules": feedforward or []} if targets else {}
    return {"kind": "IA3Config", **named, **options}


def adalora(*targets: str, **options: Any) -> dict[str, Any]:
    """Options of AdaLoRA; without targets those of the model type."""
    named = {"target_modules": list(targets)} if targets else {}
    # Three factors of noise make a small delta: a larger scaling than LoRA's here.
    sizes = {"init_r": 5, "target_r": 3, "lora_alpha": 33, "total_step": 99}
    return {"kind": "AdaLoraConfig", **sizes, **named, **options}


# The config line of peft's first example.
FIRST = {
    "r": 16,
    "lora_alpha": 16,
    "target_modules": ["query", "value"],
    "lora_dropout": 0.1,
    "bias": "none",
    "modules_to_save": ["classifier"],
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {"rank_pattern": {"0": 2, r"[3-4]": 5}, "alpha_pattern": {"5": 7, "0": 3}}

CASES = {
    "mlp": Case("mlp", lora("0", "3", "5")),
    "convnet": Case("convnet", lora("0", "4", "5", "8", "10")),
    "embedding and conv1d": Case("words", lora("0", "1", "3", "5")),
    "minilm": Case("minilm", lora("query", "value", task_type="SEQ_CLS")),
    "llama": Case("llama", lora(task_type="CAUSAL_LM")),
    "gpt2": Case("gpt2", lora(task_type="CAUSAL_LM")),
    "gpt2 all projections": Case("gpt2", lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "t5": Case("t5", lora(task_type="SEQ_2_SEQ_LM")),
    "vit": Case("vit", FIRST),
    "mixtral": Case("mixtral", lora("q_proj", "v_proj")),
    "mixtral experts": Case("mixtral", lora(target_parameters=EXPERTS)),
    "mixtral attention and experts": Case("mixtral", lora("q_proj", "v_proj", target_parameters=EXPERTS)),
    "rslora": Case("mlp", lora("0", "3", use_rslora=True)),
    "patterns": Case("mlp", lora("0", "3", "5", **PATTERNS)),
    "patterns on bert": Case("bert", lora("query", "value", rank_pattern={r"layer\.1\..*query": 2, "value": 3})),
    "pattern on experts": Case("mixtral", lora(target_parameters=EXPERTS, rank_pattern={"down_proj": 2})),
    "bias all": Case("mlp", lora("0", bias="all")),
    "bias lora_only": Case("mlp", lora("0", "5", bias="lora_only")),
    "bias all on bert": Case("bert", lora("query", bias="all", task_type="SEQ_CLS")),
    "bias on convolutions": Case("convnet", lora("0", "8", bias="all")),
    "modules_to_save": Case("mlp", lora("0", modules_to_save=["5"])),
    "a norm saved": Case("convnet", lora("4", modules_to_save=["2"])),
    "layers_to_transform": Case("bert", lora("query", "value", layers_to_transform=1)),
    "layers_pattern": Case("bert", lora("query", layers_to_transform=[0], layers_pattern="layer")),
    "exclude_modules": Case("bert", lora("query", "value", exclude_modules=r".*layer\.0\..*")),
    "exclude_modules by name": Case("mlp", lora("0", "3", "5", exclude_modules=["3"])),
    "all-linear": Case("bert", lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "all-linear llama": Case("llama", lora(target_modules="all-linear")),
    "regex": Case("bert", lora(target_modules=r".*\.1\.attention\.(self\.query|output\.dense)")),
    "dropout": Case("bert", lora("query", lora_dropout=0.5)),
    "word embeddings": Case("bert", lora("word_embeddings", "query")),
    "llama embedding": Case("llama", lora("embed_tokens", "q_proj")),
    "gemma embedding": Case("gemma", lora("embed_tokens")),
    "llama head": Case("llama", lora("lm_head")),
    "token classes": Case("bert tokens", lora("query", "value", task_type="TOKEN_CLS")),
    "questions": Case("bert questions", lora("query", "value", task_type="QUESTION_ANS")),
    "tied embedding": Case("tied", lora("emb", "body"), tied=True),
    "tied head": Case("tied", lora("head", "body"), tied=True),
    "llama tied": Case("llama tied", lora("embed_tokens"), tied=True),
    "ia3 mlp": Case("mlp", ia3("0", "3", "5", feedforward=["3"])),
    "ia3 convolutions": Case("convnet", ia3("0", "4", "5", "10", feedforward=["0", "5"])),
    "ia3 conv1d": Case("words", ia3("1", "3", "5", feedforward=["3"])),
    "ia3 bert": Case("bert", ia3(task_type="SEQ_CLS")),
    "ia3 llama": Case("llama", ia3()),
    "ia3 gpt2": Case("gpt2", ia3(task_type="CAUSAL_LM")),
    "ia3 t5": Case("t5", ia3(task_type="SEQ_2_SEQ_LM")),
    "ia3 regexes": Case("llama", ia3(target_modules=r".*_proj", feedforward_modules=r".*\.(down|o)_proj")),
    "ia3 by any ending": Case("llama", ia3("up_proj", "o_proj", "down_proj", feedforward=["o_proj"])),
    "ia3 with a saved module": Case("mlp", ia3("0", exclude_modules=["3"], modules_to_save=["5"])),
    "adalora mlp": Case("mlp", adalora("0", "3", "5")),
    "adalora convolutions": Case("convnet", adalora("4", "5", "10")),
    "adalora conv1d": Case("words", adalora("1", "3", "5")),
    "adalora bert": Case("bert", adalora(task_type="SEQ_CLS")),
    "adalora llama": Case("llama", adalora()),
    "adalora gpt2": Case("gpt2", adalora(task_type="CAUSAL_LM")),
    "adalora t5": Case("t5", adalora(task_type="SEQ_2_SEQ_LM")),
    "adalora bias": Case("mlp", adalora("0", "3", bias="lora_only")),
    "adalora bias all": Case("mlp", adalora("0", "3", bias="all")),
    "adalora layers": Case("bert", adalora("query", "value", layers_to_transform=1, lora_dropout=0.2)),
}


class Pair(NamedTuple):
    """One case in both libraries: our adapter, and the peft model that `peft` made of its folder."""

    case: Case
    base: nn.Module
    batch: Any
    adapter: pf.Adapter
    folder: Path
    theirs: Any

    def truth(self, of: Callable[[Any, Any], Any], theirs: Any = None) -> Any:
        """What the function makes of peft's model and the batch in float64."""
        model = in_float64(copy.deepcopy(self.theirs if theirs is None else theirs))
        with Float64():
            return of(model, in_float64(self.batch))


def output_of(model: Any, batch: Any) -> Tensor:
    """What a module returns, as one tensor."""
    return oracle.outputs(oracle.called(model, batch))


def pair_of(case: Case, folder: Path, cast: Callable[[Any], Any] = lambda one: one) -> Pair:
    if "target_parameters" in case.options and not EXPERTS_ARE_PARAMETERS:
        pytest.skip("this transformers has no experts as parameters")
    if case.options.get("bias") == "lora_only" and oracle.IS_OLD:
        pytest.skip("this peft does not save these biases")
    if case.base == "gemma" and oracle.IS_OLD:
        pytest.skip("this peft leaves the scale of the embedding out")
    if case.options.get("kind") == "AdaLoraConfig" and case.base == "convnet" and oracle.IS_OLD:
        pytest.skip("this peft has no AdaLoRA of convolutions")
    kind: Base = BASES[case.base]
    base, batch = cast(kind.make()), cast(kind.inputs())
    adapter = oracle.randomised(pf.init(base, oracle.config_of(pf, case.options)))
    pf.save(adapter, folder)
    return Pair(case, base, batch, adapter, folder, oracle.loaded(base, folder))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(CASES[request.param], tmp_path_factory.mktemp("adapter"))


def test_peft_finds_every_key_of_our_file_and_no_other(pair: Pair) -> None:
    weights = peft.load_peft_weights(str(pair.folder), device="cpu")
    with oracle.quiet_peft():
        result = peft.set_peft_model_state_dict(pair.theirs, dict(weights))
    assert result.unexpected_keys == []
    assert not set(result.missing_keys) & set(oracle.trained(pair.theirs))
    assert sorted(oracle.file_of(pair.theirs)) == sorted(weights)


def test_peft_holds_the_tensors_of_our_file_bit_for_bit(pair: Pair) -> None:
    ours, theirs = load_file(pair.folder / "adapter_model.safetensors"), oracle.file_of(pair.theirs)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_outputs_are_pefts(pair: Pair) -> None:
    ours = oracle.outputs(pf.apply(pair.base, pair.adapter, pair.batch))
    assert_close_to_truth(ours, output_of(pair.theirs, pair.batch), pair.truth(output_of))
    assert oracle.distance(ours, output_of(pair.base, pair.batch)) > 1e-3  # and not the base's


def test_every_gradient_is_pefts(pair: Pair) -> None:
    ours = oracle.gradients(pair.base, pair.adapter, pair.batch)
    theirs = oracle.gradients_of(pair.theirs, pair.batch)
    assert_close_to_truth(ours, theirs, pair.truth(oracle.gradients_of))


def test_ten_steps_of_adamw_give_pefts_leaves(pair: Pair) -> None:
    adapter = copy.deepcopy(pair.adapter)
    theirs = oracle.loaded(pair.base, pair.folder)
    before = {key: tensor.clone() for key, tensor in keys.to_keys(adapter).items()}
    oracle.steps(pf.leaves(adapter), lambda: oracle.loss(pf.apply(pair.base, adapter, pair.batch)), 10)
    oracle.steps(list(oracle.trained(theirs).values()), lambda: oracle.loss(oracle.called(theirs, pair.batch)), 10)
    ours, found = keys.to_keys(adapter), oracle.file_of(theirs)
    assert oracle.furthest(ours, {key: found[key] for key in ours}) < TRAINING
    assert oracle.furthest(ours, before) > 1e-3


def test_merged_weights_are_pefts(pair: Pair) -> None:
    state = pair.base.state_dict()
    # Beside a Conv1D, shapes do not tell how a square weight is stored; nor does a state dict what is tied.
    named = pair.case.tied or pair.case.base == "words"
    merged = pf.merge(state, pair.adapter, model=pair.base if named else None)
    assert oracle.furthest(merged, state) > 1e-3
    if pair.case.tied:
        output = torch.func.functional_call(pair.base, merged, *_call(pair.batch), tie_weights=False)
        theirs = output_of(pair.theirs, pair.batch)
        assert_close_to_truth(oracle.outputs(output), theirs, pair.truth(output_of))
    else:
        truth = pair.truth(lambda model, _: oracle.merged_of(model))
        assert_close_to_truth(merged, oracle.merged_of(pair.theirs), truth)


def _call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), batch) if isinstance(batch, dict) else ((batch,), {})


def peft_options(pair: Pair) -> dict[str, Any]:
    if pair.case.base == "vit":  # transformers 5 renamed ViT's layers; peft knows them by their present names only
        config: Any = pair.adapter.config
        return pair.case.options | {"target_modules": list(config.target_modules)}
    return pair.case.options


def test_a_folder_that_peft_wrote_gives_pefts_output_and_comes_back_bit_for_bit(pair: Pair, tmp_path: Path) -> None:
    theirs = oracle.made(pair.base, peft_options(pair))
    oracle.randomise(theirs, seed=1)
    with oracle.quiet_peft():
        theirs.save_pretrained(tmp_path / "theirs")
    adapter = pf.load(tmp_path / "theirs", model=pair.base)
    ours = oracle.outputs(pf.apply(pair.base, adapter, pair.batch))
    assert_close_to_truth(ours, output_of(theirs, pair.batch), pair.truth(output_of, theirs))
    pf.save(adapter, tmp_path / "ours")
    written, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert sorted(written) == sorted(oracle.without_copies(found))
    assert all(torch.equal(tensor, found[key]) for key, tensor in written.items())


@pytest.mark.parametrize("name", CASES)
def test_in_float64_nothing_but_rounding_is_left(name: str, tmp_path: Path) -> None:
    if name == "minilm":
        pytest.skip("22 million float64 numbers, for what the cases on bert show too")

    pair = pair_of(CASES[name], tmp_path, in_float64)
    with Float64():
        ours = oracle.gradients(pair.base, pair.adapter, pair.batch)
        theirs = oracle.gradients_of(pair.theirs, pair.batch)
    assert oracle.furthest(ours, theirs) < FORMULA


SQUARES = {
    "both square": lambda: nn.Sequential(Conv1D(6, 6), nn.Linear(6, 6)),
    "and a linear layer": lambda: nn.Sequential(Conv1D(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)),
    "and a Conv1D": lambda: nn.Sequential(Conv1D(12, 6), Conv1D(6, 12), nn.Linear(6, 6)),
}


@pytest.mark.parametrize("build", SQUARES.values(), ids=SQUARES)
def test_square_weights_stored_both_ways_are_merged_right_or_refused(build: Callable[[], nn.Module]) -> None:
    model, x = build().double(), torch.randn(3, 6).double()
    adapter = oracle.randomised(pf.init(model, pf.LoraConfig(r=2, target_modules="all-linear")))
    ours = pf.apply(model, adapter, x)
    merged = pf.merge(model.state_dict(), adapter, model=model)
    assert oracle.distance(torch.func.functional_call(model, merged, x), ours) < FORMULA
    try:
        merged = pf.merge(model.state_dict(), adapter)
    except ValueError as error:
        assert "model=" in str(error)  # noqa: PT017  # either is right
    else:
        assert oracle.distance(torch.func.functional_call(model, merged, x), ours) < FORMULA


TWO = {
    "other layers, rank and alpha": Case("mlp", lora("0", "3")),
    "embedding": Case("words", lora("0", "1", "5")),
    "convolutions": Case("convnet", lora("0", "8")),
    "bert": Case("bert", lora("query", "dense")),
}
SECOND = {"mlp": ["3", "5"], "words": ["0", "3"], "convnet": ["0", "5"], "bert": ["query", "value"]}


@pytest.mark.parametrize("case", TWO.values(), ids=TWO)
def test_two_active_adapters_are_pefts_two_active_adapters(case: Case, tmp_path: Path) -> None:
    pair = pair_of(case, tmp_path / "first")
    config = pf.LoraConfig(r=3, lora_alpha=5, target_modules=SECOND[case.base], use_rslora=True)
    second = oracle.randomised(pf.init(pair.base, config), seed=1)
    pf.save(second, tmp_path / "second")
    with oracle.quiet_peft():
        pair.theirs.load_adapter(str(tmp_path / "second"), "second", is_trainable=True)
        pair.theirs.base_model.set_adapter(["default", "second"])
    ours = oracle.outputs(pf.apply(pair.base, (pair.adapter, second), pair.batch))
    assert_close_to_truth(ours, output_of(pair.theirs, pair.batch), pair.truth(output_of))
    for one, other, name in ((pair.adapter, second, "default"), (second, pair.adapter, "second")):
        found = oracle.gradients(pair.base, one, pair.batch, other)
        of = functools.partial(oracle.gradients_of, name=name)
        assert_close_to_truth(found, of(pair.theirs, pair.batch), pair.truth(of))


def test_attention_is_that_of_the_sum_of_weights_and_deltas() -> None:
    # peft 0.21.2 adds the delta of out_proj twice: here the reference is the formula itself.
    base, batch = BASES["attention"].make().double(), BASES["attention"].inputs().double()
    adapter = oracle.randomised(pf.init(base, oracle.config_of(pf, lora("attention"))))
    params = {path: {name: t.requires_grad_() for name, t in leaf.items()} for path, leaf in adapter.params.items()}
    names = {"attention": "attention.in_proj_weight", "attention.out_proj": "attention.out_proj.weight"}
    assert sorted(params) == sorted(names)
    state = base.state_dict()
    for path, name in names.items():
        state[name] = state[name] + 1.5 * params[path]["lora_B"] @ params[path]["lora_A"]
    expected = torch.func.functional_call(base, state, batch)
    ours = pf.apply(base, adapter.replace(params=params), batch)
    assert oracle.distance(ours, expected) < FORMULA
    flat = {f"{path}.{name}": tensor for path, leaf in params.items() for name, tensor in leaf.items()}
    found, wanted = (torch.autograd.grad(oracle.loss(one), list(flat.values())) for one in (ours, expected))
    assert oracle.furthest(dict(zip(flat, found, strict=True)), dict(zip(flat, wanted, strict=True))) < FORMULA


def test_attention_without_out_proj_is_pefts(tmp_path: Path) -> None:
    base, batch = BASES["attention"].make().double(), BASES["attention"].inputs().double()
    adapter = oracle.randomised(pf.init(base, oracle.config_of(pf, lora("attention", "head"))))
    adapter.params["attention.out_proj"]["lora_B"].zero_()
    pf.save(adapter, tmp_path)
    theirs = oracle.loaded(base, tmp_path)
    ours = pf.apply(base, adapter, batch)
    assert oracle.distance(ours, theirs(batch)) < FORMULA
    assert oracle.distance(ours, base(batch)) > 1e-3
    found, wanted = oracle.gradients(base, adapter, batch), oracle.gradients_of(theirs, batch)
    assert sorted(found) == sorted(wanted)
    kept = [key for key in found if ".out_proj." not in key]
    assert oracle.furthest({key: found[key] for key in kept}, {key: wanted[key] for key in kept}) < FORMULA


def test_a_folder_of_pefts_with_attention_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = BASES["attention"].make()
    theirs = oracle.made(base, lora("attention"))
    oracle.randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    pf.save(pf.load(tmp_path / "theirs", model=base), tmp_path / "ours")
    ours, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert sorted(ours) == sorted(found)
    assert all(torch.equal(ours[key], found[key]) for key in found)


def test_pefts_first_example_trains() -> None:
    model = BASES["vit"].make().train()
    config = pf.LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["query", "value"],
        lora_dropout=0.1,
        bias="none",
        modules_to_save=["classifier"],
    )
    adapter = pf.init(model, config)
    labels = torch.arange(16) % 4
    batch = {"pixel_values": torch.randn(16, 3, 8, 8) + labels[:, None, None, None], "labels": labels}
    losses: list[float] = []

    def value() -> Tensor:
        found = pf.apply(model, adapter, batch).loss
        losses.append(float(found.detach()))
        return found

    oracle.steps(pf.leaves(adapter), value, 20, rate=1e-2)
    assert losses[-1] < losses[0] / 2
    assert all(parameter.grad is None for parameter in model.parameters())


def tensors_of(library: Any, base: nn.Module, options: dict[str, Any]) -> dict[str, Tensor]:
    """Fresh tensors of either library, by key."""
    if library is pf:
        return keys.to_keys(pf.init(base, oracle.config_of(pf, options)))
    return oracle.file_of(oracle.made(base, options))


def wide() -> nn.Module:
    """Layers of each kind with enough numbers to see how they are drawn."""
    return nn.ModuleDict(
        {
            "linear": nn.Linear(300, 200),
            "embedding": nn.Embedding(300, 200),
            "conv": nn.Conv2d(40, 200, 3),
            "transposed": Conv1D(200, 300),
        }
    )


SPREAD = {
    # The standard deviation of A and B for r = 16: uniform numbers within 1/sqrt(fan in) have 1/sqrt(3 fan in).
    True: {"linear": (900**-0.5, 0), "embedding": (0, 1), "conv": (1080**-0.5, 0), "transposed": (900**-0.5, 0)},
    "gaussian": {"linear": (1 / 16, 0), "embedding": (0, 1), "conv": (1 / 16, 0), "transposed": (1 / 16, 0)},
    False: {
        "linear": (900**-0.5, 48**-0.5),
        "embedding": (1, 1),
        "conv": (1080**-0.5, 48**-0.5),
        "transposed": (900**-0.5, 48**-0.5),
    },
}


@pytest.mark.parametrize("how", SPREAD)
@pytest.mark.parametrize("library", [pf, peft], ids=["peftfn", "peft"])
def test_both_libraries_draw_fresh_tensors_alike(library: Any, how: bool | str) -> None:
    names = ["linear", "embedding", "conv", "transposed"]
    found = tensors_of(library, wide(), {"r": 16, "target_modules": names, "init_lora_weights": how})
    for key, tensor in found.items():
        name = next(one for one in names if f".{one}." in key)
        expected = SPREAD[how][name]["_B" in key]
        assert float(tensor.std()) == pytest.approx(expected, rel=0.05), key  # of at least 3,200 numbers
        assert abs(float(tensor.mean())) <= 0.1 * expected, key
        if not isinstance(how, str) and name != "embedding":
            assert float(tensor.abs().max()) <= expected * 3**0.5, key  # uniform, not normal


def test_a_convolution_with_groups_starts_as_large_as_one_without() -> None:
    def spread(groups: int) -> float:
        model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=groups))
        adapter = pf.init(model, pf.LoraConfig(r=32, target_modules=["0"]))
        return float(adapter.params["0"]["lora_A"].std()) * (64 / groups) ** 0.5

    assert spread(4) == pytest.approx(spread(1), rel=0.05)
