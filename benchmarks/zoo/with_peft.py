"""The same adapters in peft: made there, read there, and as it wrote them."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch

import peftfn as pf
from zoo.case import Case
from zoo.verdicts import NotApplicable


@functools.lru_cache(maxsize=1)
def all_linear(case: Case) -> Any:
    """A peft model with a LoRA on every linear layer: made once, for its sites and for its file."""
    return made(case, case.peft_config)


def made(case: Case, config: peft.PeftConfig, seed: int = 3) -> Any:
    """A peft model with random adapter tensors.

    Raises:
        NotApplicable: peft refuses the model or the config.
    """
    torch.manual_seed(seed)
    with peft_at_work():
        model = peft.get_peft_model(copy.deepcopy(case.model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                if "lora_A" in name or "lora_embedding_A" in name:
                    tensor.copy_(noise * tensor[0].numel() ** -0.5)
                elif "prompt_encoder" in name:
                    tensor.copy_(noise)
                else:
                    tensor.copy_(noise * 0.3 if "lora_" in name else tensor + 0.05 * noise)
    return model


@contextlib.contextmanager
def peft_at_work() -> Any:
    """Where what is raised is peft's own, and says nothing of peftfn."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
        raise NotApplicable(f"peft: {said}") from error


def files_of(model: Any) -> str:
    """The folder that peft writes."""
    folder = tempfile.mkdtemp(prefix="zoo-")
    with peft_at_work(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def reads(case: Case, adapter: pf.Adapter) -> tuple[Any, list[str]]:
    """A peft model that has read what peftfn wrote, and the keys that were missing or not expected."""
    folder = tempfile.mkdtemp(prefix="zoo-")
    pf.save(adapter, folder)
    with peft_at_work(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(case.model), folder).eval()
    clear(folder)
    complaints = [str(one.message) for one in said if re.search("missing|unexpected", str(one.message))]
    return model, complaints


def lora_sites(model: Any) -> set[str]:
    """The paths of peft's LoRA layers in the base, as peftfn writes them."""
    found = set()
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            path = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            found.add(f"{path}.{parameter}" if parameter else path)
    return found


def clear(folder: str) -> None:
    for path in Path(folder).glob("*"):
        path.unlink()
    Path(folder).rmdir()
