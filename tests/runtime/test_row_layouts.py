"""Rows that are not where their number says: each is what its own adapter makes of it, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import grad
from transformers import BartConfig, BartForConditionalGeneration

import peftfn as pf

INDEX = [1, -1, 0]


class Site(nn.Module):
    """A model with one layer, which is not given the batch as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


class TokensFirst(Site):
    """(rows, tokens, 4) -> the same; the layer is given (tokens, rows, 4)."""

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1)


class Windows(Site):
    """The layer is given two windows of each row, all rows' first ones before all second ones."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 4) -> the same."""
        return torch.cat(self.layer(torch.cat(x.chunk(2, 1))).tanh().chunk(2), 1)


class TwoViews(Site):
    """The layer is given the batch, and the batch turned around after it."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 4) -> the same."""
        one, other = self.layer(torch.cat([x, x.flip(1)])).tanh().chunk(2)
        return one * other


class Flat(Site):
    """The layer is given tokens of all rows, in order: nothing has to run twice."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 4) -> the same."""
        return self.layer(x.flatten(0, 1)).tanh().view(x.shape)


class Experts(nn.Module):
    """Two layers, each given the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 4) -> the same."""
        flat, made = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        chosen = (flat.sum(-1) > 0).long()
        for number, layer in enumerate(self.layer):
            mine = (chosen == number).nonzero().flatten()
            if len(mine):
                made = made.index_add(0, mine, layer(flat[mine]))
        return made.view(x.shape)


class Mixing(Site):
    """The layer is given the rows, and each with the mean of all."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 4) -> the same."""
        return self.layer(x + x.mean(0)).tanh()


class Gru(nn.Module):
    """A layer that torch.vmap does not know, to be replaced by row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 4) -> the same."""
        return self.gru(self.layer(x))[0]


def pair(model: nn.Module, **options: Any) -> list[pf.Adapter]:
    config = pf.LoraConfig(r=2, target_modules=r"layer\.\d" if isinstance(model, Experts) else "layer", **options)
    return [oracle.randomised(pf.init(model, config, dtype=torch.float64), seed) for seed in (1, 2)]


def alone(model: nn.Module, adapters: Sequence[pf.Adapter], x: Tensor) -> Tensor:
    return torch.stack([pf.apply(model, adapters[n] if n >= 0 else (), x)[row] for row, n in enumerate(INDEX)])


@pytest.mark.parametrize("kind", [TokensFirst, Windows, TwoViews, Flat, Experts])
@pytest.mark.parametrize("tokens", [6, 4, 8])
def test_rows_are_found_wherever_they_are(kind: Callable[[], nn.Module], tokens: int) -> None:
    torch.manual_seed(tokens)
    model, x = kind().double(), torch.randn(3, tokens, 4, dtype=torch.float64)
    x = x[:, :3] if kind is TokensFirst and tokens == 4 else x  # as many tokens as rows
    adapters = pair(model)
    before = torch.get_rng_state()
    for batch in (x, x.flip(1)):  # the second time it is known
        assert off(pf.apply(model, pf.stack(adapters), batch, index=INDEX), alone(model, adapters, batch)) < EXACT
    assert torch.equal(before, torch.get_rng_state())


def test_an_expert_that_no_token_chose_while_rows_were_looked_for_is_right_too() -> None:
    model, adapters = (made := Experts().double()), pair(made)
    some = torch.rand(3, 4, 4, dtype=torch.float64) + 3  # so that also other numbers of their size choose the second
    for batch in (some, some - 6):
        assert off(pf.apply(model, pf.stack(adapters), batch, index=INDEX), alone(model, adapters, batch)) < EXACT


@pytest.mark.parametrize("kind", [TokensFirst, Experts])
def test_gradients_of_rows_that_ran_apart_are_each_adapters_own(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(3, 6, 4, dtype=torch.float64)
    adapters = pair(model)
    stacked = pf.stack(adapters)
    found = grad(lambda p: pf.apply(model, stacked.replace(params=p), x, index=INDEX).sin().sum())(stacked.params)
    for number, row in ((1, 0), (0, 2)):
        one = adapters[number]
        expected = grad(lambda p: pf.apply(model, one.replace(params=p), x)[row].sin().sum())(one.params)  # noqa: B023  # called at once
        for path, leaf in expected.items():
            for name, tensor in leaf.items():
                assert off(found[path][name][number], tensor) < EXACT


def test_a_module_that_cannot_be_mapped_is_replaced_by_row() -> None:
    model, x = Gru().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    adapters = pair(model, modules_to_save=["gru"])
    assert off(pf.apply(model, pf.stack(adapters), x, index=INDEX), alone(model, adapters, x)) < EXACT


def test_rows_of_a_batchnorm_in_training_are_those_of_the_whole_batch_with_their_adapter() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    model = nn.Sequential(*model.values()).double().train()
    x, config = torch.randn(3, 4, dtype=torch.float64), pf.LoraConfig(r=2, target_modules=["0"])
    adapters = [oracle.randomised(pf.init(model, config, dtype=torch.float64), seed) for seed in (1, 2)]
    assert off(pf.apply(model, pf.stack(adapters), x, index=INDEX), alone(model, adapters, x)) < EXACT


class Loss(TokensFirst):
    """It returns one number for all rows too."""

    def forward(self, x: Tensor) -> Any:
        """(rows, tokens, 4) -> the same, and their mean."""
        made = super().forward(x)
        return made, made.mean()


def test_a_loss_of_rows_that_ran_apart_is_refused() -> None:
    model = Loss().double()
    with pytest.raises(ValueError, match=r"part 1 of its output \(shape \(\)\) is not made of rows, as a loss of all"):
        pf.apply(model, pf.stack(pair(model)), torch.randn(3, 6, 4, dtype=torch.float64), index=INDEX)


def test_rows_that_the_model_itself_mixes_are_refused() -> None:
    model = Mixing().double()
    with pytest.raises(ValueError, match=r"part 0 of its output .* is not made of rows"):
        pf.apply(model, pf.stack(pair(model)), torch.randn(3, 6, 4, dtype=torch.float64), index=INDEX)


def test_a_row_without_a_prefix_is_the_bases_where_positions_are_counted_inside() -> None:
    torch.manual_seed(0)
    halves = {f"{half}_{what}": 1 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    model = BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **halves)).double().eval()
    config = pf.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")
    adapters = [oracle.randomised(pf.init(model, config, dtype=torch.float64), seed) for seed in (1, 2)]
    ids = torch.arange(5, 23).view(3, 6)
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    found = pf.apply(model, pf.stack(adapters), batch, index=INDEX).logits
    for row, number in enumerate(INDEX):
        expected = pf.apply(model, adapters[number] if number >= 0 else (), batch).logits[row]
        assert off(found[row], expected) < EXACT
