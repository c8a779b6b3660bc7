"""What is (IA)³'s own: which side of a layer is scaled, biases in merges, stacks, and what it cannot act on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from bases import BASES
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers.pytorch_utils import Conv1D

import peftfn as pf
from peftfn.checkpoints import keys
from peftfn.methods import ia3 as ia3_method

ROUNDING = 1e-6  # as in test_against_peft.py


def ia3(model: nn.Module, *targets: str, feedforward: Any = (), seed: int = 0, **options: Any) -> pf.Adapter:
    config = pf.IA3Config(target_modules=list(targets), feedforward_modules=feedforward, **options)
    return oracle.randomised(pf.init(model, config), seed)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), Conv1D(3, 4), nn.Conv2d(4, 3, 1)], ids=lambda one: type(one).__name__
)
def test_merge_scales_the_bias_with_the_output_and_not_with_the_input(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    params = dict(model.named_parameters())
    params["0.bias"].data.normal_()
    output, of_input = ia3(model, "0"), ia3(model, "0", feedforward=["0"])
    scaled = params["0.bias"] * output.params["0"]["ia3_l"].flatten()
    assert torch.equal(pf.merge(params, output)["0.bias"], scaled)
    assert pf.merge(params, of_input)["0.bias"] is params["0.bias"]


def test_a_bias_that_an_adapter_replaces_is_scaled_by_the_next() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    lora = oracle.randomised(pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], bias="all")))
    both = (lora, ia3(model, "0"))
    merged = pf.merge(dict(model.named_parameters()), both)
    torch.testing.assert_close(functional_call(model, merged, (x,)), pf.apply(model, both, x))


def test_an_adapter_without_a_site_is_the_identity_there() -> None:
    model, x = BASES["mlp"].make(), torch.randn(4, 10)
    adapters = [ia3(model, "0"), ia3(model, "3", feedforward=["3"], seed=1), ia3(model, "0", "3", feedforward=["3"])]
    stacked = pf.stack(adapters)
    together = vmap(lambda one: pf.apply(model, one, x))(stacked)
    routed = pf.apply(model, stacked, x, index=[1, -1, 0, 2])
    for number, adapter in enumerate(adapters):
        torch.testing.assert_close(together[number], pf.apply(model, adapter, x))
    for row, number in enumerate([1, -1, 0, 2]):
        alone = pf.apply(model, adapters[number] if number >= 0 else (), x)
        torch.testing.assert_close(routed[row], alone[row])
    assert [list(one.params) for one in pf.unstack(stacked)] == [["0"], ["3"], ["0", "3"]]


def test_adapters_that_scale_other_sides_do_not_stack() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="stack: some of the adapters act on what goes into '0'"):
        pf.stack([ia3(model, "0"), ia3(model, "0", feedforward=["0"])])


def test_two_active_adapters_are_pefts_two_active_adapters(tmp_path: Path) -> None:
    base, batch = BASES["mlp"].make(), BASES["mlp"].inputs()
    one, other = ia3(base, "0", "3", feedforward=["3"]), ia3(base, "3", "5", feedforward=["3"], seed=1)
    theirs = oracle.loaded(base, pf.save(one, tmp_path / "one"))
    pf.save(other, tmp_path / "other")
    with oracle.quiet_peft():
        theirs.load_adapter(str(tmp_path / "other"), "other", is_trainable=True)
        theirs.base_model.set_adapter(["default", "other"])
    ours = pf.apply(base, (one, other), batch)
    assert oracle.distance(ours, theirs(batch)) < ROUNDING
    for mine, beside, name in ((one, other, "default"), (other, one, "other")):
        found = oracle.gradients(base, mine, batch, beside)
        expected = oracle.gradients_of(theirs, batch, name)
        if oracle.IS_OLD:  # it counts the other adapter's tensors in
            expected = {key: expected[key] for key in found}
        assert oracle.furthest(found, expected) < ROUNDING


SIDES: list[dict[str, Any]] = [
    {"target_modules": "all-linear", "feedforward_modules": ["output.dense"]},
    {"target_modules": ["dense"], "feedforward_modules": ["attention.output.dense"]},
    {"target_modules": ["query", "key"]},
    {"target_modules": ["dense", "query"]},
    {"target_modules": r".*(query|dense)", "feedforward_modules": ["dense"]},
]


@pytest.mark.parametrize("options", SIDES, ids=str)
def test_the_same_layers_have_their_input_scaled_as_in_peft_and_peft_reads_the_file(
    options: dict[str, Any], tmp_path: Path
) -> None:
    # Of its own adapters from these configs, peft 0.21.2 reads only the last one again: it wants the feedforward
    # modules among the targets by name, in a file.
    base = BASES["bert"].make()
    adapter = oracle.randomised(pf.init(base, pf.IA3Config(**options)))
    wanted = {k: tuple(t.shape) for k, t in keys.to_keys(adapter).items()}
    try:
        made = oracle.made(base, {"kind": "IA3Config", **options})
    except ValueError as error:
        assert "subset" in str(error)  # noqa: PT017  # then there is nothing to compare it with
    else:
        assert wanted == {key: tuple(tensor.shape) for key, tensor in oracle.file_of(made).items()}
    theirs, batch = oracle.loaded(base, pf.save(adapter, tmp_path)), BASES["bert"].inputs()
    ours = oracle.outputs(pf.apply(base, adapter, batch))
    assert oracle.distance(ours, oracle.outputs(theirs(**batch))) < ROUNDING
    again = pf.load(tmp_path, model=base)
    assert oracle.distance(ours, oracle.outputs(pf.apply(base, again, batch))) == 0


def test_on_random_names_the_side_is_pefts() -> None:
    draw, seen = random.Random(0), {True: 0, False: 0}
    names = ["q", "v", "qq", "a_q", "0", "layer"]

    def some_path(longest: int) -> str:
        return ".".join(draw.choices(names, k=draw.randint(1, longest)))

    for _ in range(200):
        side = draw.choice([r".*\.q", r"layer.*(q|v)", r"q", [some_path(2) for _ in range(draw.randint(0, 3))]])
        ours = pf.IA3Config(target_modules=".*", feedforward_modules=side)
        theirs = peft.IA3Config(target_modules=".*", feedforward_modules=side)
        for path in {some_path(4) for _ in range(20)}:
            expected = peft.IA3Model._check_target_module_feedforward(theirs, path)
            assert ia3_method.is_feedforward(ours, path) == expected, (side, path)
            seen[expected] += 1
    assert min(seen.values()) > 300  # both answers came up


class Bare(nn.Module):
    """Every kind of layer that is not (IA)³'s."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.c_attn = nn.Linear(8, 24)

    def forward(self, ids: Tensor) -> Tensor:
        """Not called."""
        return ids


REFUSED = {
    "embedding": r"embedding: {} cannot act on this embedding; expected linear or .*exclude_modules=\['embedding'\]",
    "attention": r"attention: {} cannot act on a weight that the base reads itself \(MultiheadAttention\)",
    "attention.out_proj": r"attention.out_proj: {} cannot act on a weight that the base reads itself",
    "c_attn.q": r"c_attn: {} cannot act on a part of a fused projection",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", [pf.IA3Config, pf.AdaLoraConfig])
def test_what_peft_cannot_act_on_is_refused(kind: Any, name: str) -> None:
    options = {"feedforward_modules": []} if kind is pf.IA3Config else {}
    said = REFUSED[name].format(kind.__name__.removesuffix("Config"))
    with pytest.raises(ValueError, match=said):
        pf.init(Bare(), kind(target_modules=[name], **options))


def test_a_convolution_with_groups_is_refused_by_adalora_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="0: AdaLoRA has no convolutions with groups, in peft neither"):
        pf.init(model, pf.AdaLoraConfig(target_modules=["0"]))
    assert ia3(model, "0").params["0"]["ia3_l"].shape == (1, 4, 1, 1)


def test_feedforward_modules_that_cannot_be_known_are_errors() -> None:
    model = BASES["mlp"].make()
    with pytest.raises(ValueError, match=r"no default for a Sequential; pass those of target_modules .* or \[\] for"):
        pf.init(model, pf.IA3Config(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"feedforward_modules=\['3'\]: \['3'\] are none of the 1 sites"):
        ia3(model, "0", feedforward=["3"])
    with pytest.raises(ValueError, match=r"IA3Config\(feedforward_modules='\*'\): '\*' is no regex"):
        pf.IA3Config(target_modules="0", feedforward_modules="*")


@pytest.mark.parametrize("named", [None, [], ["0"]], ids=str)
def test_a_file_whose_config_says_another_side_is_refused(named: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    adapter = ia3(model, "0", feedforward=[] if named else ["0"])
    folder = pf.save(adapter, tmp_path)
    pf.IA3Config(target_modules=["0"], feedforward_modules=named).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"feedforward_modules|the config says that it is (not )?a feedforward module"):
        pf.load(folder)


def test_an_adapter_for_another_kind_or_size_of_layer_is_refused() -> None:
    adapter = ia3(nn.Sequential(nn.Linear(4, 3)), "0")
    with pytest.raises(
        ValueError, match=r"0: the adapter has ia3_l \(3, 1\), expected ia3_l \(5, 1\). It was made for a model of"
    ):
        pf.apply(nn.Sequential(nn.Linear(4, 5)), adapter, torch.randn(1, 4))
    with pytest.raises(ValueError, match="0: the adapter cannot act on this embedding, expected one of linear"):
        pf.apply(nn.Sequential(nn.Embedding(4, 3)), adapter, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="fits no layer with a weight of shape"):
        pf.merge({"0.weight": torch.zeros(5, 5)}, adapter)


def test_a_combination_is_pefts(tmp_path: Path) -> None:
    base, batch = BASES["bert"].make(), BASES["bert"].inputs()
    options = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    adapters = [oracle.randomised(pf.init(base, pf.IA3Config(**options)), seed) for seed in (1, 2)]
    folders = [pf.save(adapter, tmp_path / str(number)) for number, adapter in enumerate(adapters)]
    theirs = oracle.loaded(base, folders[0], adapter_name="one")
    theirs.load_adapter(str(folders[1]), "other")
    theirs.add_weighted_adapter(["one", "other"], [0.7, 0.4], "both")
    theirs.set_adapter("both")
    mixed = pf.combine(adapters, [0.7, 0.4], method="linear")
    found = oracle.outputs(pf.apply(base, mixed, batch))
    assert oracle.distance(found, oracle.outputs(theirs.eval()(**batch))) < 1e-6
    assert pf.load(pf.save(mixed, tmp_path / "mixed"), base).config == mixed.config


def test_a_combination_that_cannot_be_is_one_clear_error() -> None:
    base = BASES["mlp"].make()
    one, other = (pf.init(base, pf.IA3Config(target_modules=[n, "5"], feedforward_modules=[])) for n in ("0", "3"))
    with pytest.raises(ValueError, match=r"only some of the adapters have the site '0'"):
        pf.combine([one, other], [1, 1], method="linear")
    with pytest.raises(ValueError, match=r"have no rank; use 'linear'"):
        pf.combine([one, one], [1, 1])
