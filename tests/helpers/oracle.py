"""peft as the oracle: the same adapter in both libraries, and what each of them makes of it."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftfn as pf
from peftfn.checkpoints import keys

Tensors = dict[str, Tensor]

torch.sparse.check_sparse_tensor_invariants.disable()  # SHiRA's peft makes some, and torch warns while nobody has said

# Before that, peft lays out the factors of experts the other way round, does not save the biases of
# bias="lora_only", and takes the last index of a path for that of the layer.
IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")
IS_OLD = tuple(int(part) for part in peft.__version__.split(".")[:2]) < (0, 21)
by_new_peft = pytest.mark.skipif(IS_OLD, reason="this peft does not have it yet")


@contextlib.contextmanager
def quiet_peft() -> Generator[None]:
    """Let peft and transformers warn: their advice about their own use says nothing about ours."""
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(peft|transformers)(\.|$)")
        # peft 0.21.2 gives transformers 5.24 a cache by its old name, through torch.
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"`past_key_values` is deprecated")
        yield


class Butterflies:
    """What peft's CUDA extension computes, without which its BOFT has one factor whatever is asked."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        """Blocks (m, n, b, b) on the diagonals of m matrices."""
        return [torch.stack([torch.block_diag(*one) for one in blocks])]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        """The gradient of those blocks."""
        _, n, b, _ = blocks.shape
        return [torch.stack([gradient[:, i * b : (i + 1) * b, i * b : (i + 1) * b] for i in range(n)], 1)]


def give_butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let peft's BOFT have as many factors as are asked, as on a machine where its extension is built."""
    if not IS_OLD:
        monkeypatch.setattr(f"{peft.__name__}.tuners.boft.layer._FBD_CUDA", Butterflies)


def config_of(library: Any, options: Mapping[str, Any]) -> Any:
    """The config of either library, `peft` or `peftfn`, from the same options; LoRA's, unless they have a `kind`."""
    given = copy.deepcopy(dict(options))
    return getattr(library, given.pop("kind", "LoraConfig"))(**given)


def randomised(adapter: pf.Adapter, seed: int = 0, size: float = 0.1) -> pf.Adapter:
    """The adapter with noise in every tensor, so that none is left at a start where it does nothing."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor + (size * noise).to(tensor)

    params = {path: {name: noisy(t) for name, t in leaf.items()} for path, leaf in adapter.params.items()}
    return adapter.replace(params=params)


def randomise(model: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """The same for a peft model, in place: noise in everything that it trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += (size * noise).to(parameter)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a peft model trains.

    On a base that is not float32, peft 0.21 makes AdaLoRA's `ranknum` another parameter, and forgets that it is fixed.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter for name, parameter in found.items() if ".ranknum." not in name}


def loaded(base: nn.Module, folder: Path, **options: Any) -> Any:
    """The peft model that `peft` makes of a copy of the base and a folder, trainable."""
    with quiet_peft():
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True, **options).eval()


def made(base: nn.Module, options: Mapping[str, Any], **more: Any) -> Any:
    """A fresh peft model on a copy of the base."""
    with quiet_peft():
        return peft.get_peft_model(copy.deepcopy(base), config_of(peft, options), **more).eval()


def called(model: nn.Module, batch: Any) -> Any:
    """`model(batch)`, by the rules of `peftfn.apply`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def outputs(result: Any) -> Tensor:
    """What a model returned, as one tensor."""
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "start_logits"):
        return torch.cat([result.start_logits, result.end_logits])
    return result.logits


def loss(result: Any) -> Tensor:
    """A number that every output changes."""
    return outputs(result).double().square().mean()


def file_of(model: Any, tensors: Mapping[str, Tensor] | None = None, name: str = "default") -> Tensors:
    """What peft would save of its model; with `tensors`, these in place of those of the same names in the model."""
    state = model.state_dict() | dict(tensors or {})
    found = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)
    return without_copies(found)


def without_copies(tensors: Mapping[str, Tensor]) -> Tensors:
    """A file of peft's without what it does not read again.

    With bias="all" it saves the bias of a saved module three times: as `<path>.bias`, and under the two names that
    its wrapper has for it.
    """
    return {key: t for key, t in tensors.items() if ".modules_to_save." not in key and ".original_module." not in key}


def gradients_of(model: Any, batch: Any, name: str = "default") -> Tensors:
    """The gradient of each tensor that a peft model trains, by its key in peft's file."""
    names = trained(model)
    grads = torch.autograd.grad(loss(called(model, batch)), list(names.values()), materialize_grads=True)
    found = file_of(model, dict(zip(names, grads, strict=True)), name)
    return {key: found[key] for key in trained_keys(model, name)}


def trained_keys(model: Any, name: str = "default") -> list[str]:
    """The keys in peft's file of what the model trains; the statistics of a saved norm are in the file only."""
    marks = {name: torch.full_like(parameter, torch.nan) for name, parameter in trained(model).items()}
    return [key for key, tensor in file_of(model, marks, name).items() if bool(tensor.isnan().any())]


def gradients(model: nn.Module, adapter: pf.Adapter, batch: Any, *active: pf.Adapter) -> Tensors:
    """The gradient of each tensor of our adapter, by its key in peft's file; others may be active with it."""
    params = {
        path: {name: t.clone().requires_grad_() for name, t in leaf.items()} for path, leaf in adapter.params.items()
    }
    flat = [tensor for leaf in params.values() for tensor in leaf.values()]
    value = loss(pf.apply(model, (adapter.replace(params=params), *active), batch))
    grads = iter(torch.autograd.grad(value, flat, materialize_grads=True))
    tree = {path: {name: next(grads) for name in leaf} for path, leaf in params.items()}
    return keys.to_keys(pf.Adapter(tree, {}, adapter.config))


def merged_of(model: Any) -> Tensors:
    """The state dict of a copy of a peft model after `merge_and_unload`."""
    with quiet_peft():
        return copy.deepcopy(model).merge_and_unload().state_dict()


def steps(parameters: list[Tensor], value: Callable[[], Tensor], count: int, rate: float = 1e-3) -> None:
    """Train in place with AdamW.

    Its eps is far above rounding: where a gradient is zero but for rounding (the bias of attention's keys), AdamW's
    own 1e-8 would make steps of full size out of noise.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, eps=1e-4)
    for _ in range(count):
        optimizer.zero_grad()
        value().backward()
        optimizer.step()


def furthest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """How far two sets of tensors of the same names are apart: the largest difference over the largest value."""
    assert sorted(ours) == sorted(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in theirs)
    there = [key for key in theirs if theirs[key].numel()]
    differences = [(ours[key].detach().double() - theirs[key].detach().double()).abs().max() for key in there]
    return float(torch.stack(differences).max() / max(float(theirs[key].detach().abs().max()) for key in there))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two outputs, over the largest value, or over 1 where all are smaller."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
