"""`prepare_for_kbit_training`: a view of a model whose half-precision parameters are float32."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.models import copies, surgery, write_protection
from peftfn.weights import codecs

# Formats whose kernels read half-precision parameters (scales, zeros): PEFT leaves these as they are, too.
_AS_THEY_ARE = frozenset(("gptq", "aqlm", "eetq", "hqq", "torchao"))
_SMALL = 4096


def prepare_for_kbit_training(model: nn.Module) -> Any:
    """A module of the model's class whose float16 and bfloat16 parameters are float32: norms, embeddings, heads.

    What PEFT's `prepare_model_for_kbit_training` does to a model, as a value: training on a quantized base is stabler
    with these in float32 (QLoRA, https://arxiv.org/abs/2305.14314). The model itself is not written to; the view has
    copies of what it widens and shares the storage of everything else: packed weights (integers, `Params4bit`, any
    other class of parameter), and for GPTQ, AQLM, EETQ, HQQ and torchao all of them. No parameter requires grad.

    Use it in place of the model, in `init`, `apply`, `bind` and the rest. Make it once and keep it. The parameters of
    a model that is not quantized are all widened, which takes twice their memory.

    PEFT also turns on activation checkpointing. Here that is a line of its own, `view.gradient_checkpointing_enable()`,
    which reaches the view alone and needs no hook on the inputs: `apply` and `bind` see to that. It goes with
    `loss.backward()`; `torch.func.grad` cannot pass through it.

    Args:
        model: the base, quantized or not.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).half()
        >>> view = pf.prepare_for_kbit_training(model)
        >>> view[1].weight.dtype, model[1].weight.dtype
        (torch.float32, torch.float16)
    """
    if not isinstance(cast("object", model), nn.Module):
        raise TypeError(f"prepare_for_kbit_training was given a {type(model).__name__}; expected the base, a module.")
    view = copies.shared(model, [*codecs.shared(model), *(buffer for buffer in model.buffers() if _is_packed(buffer))])
    surgery.run_packed(view.modules())
    wide: dict[int, nn.Parameter] = {}
    if _format(model) not in _AS_THEY_ARE:
        narrow = {id(p): p for p in view.parameters() if _is_narrow(p)}  # kept, so that no id is used again
        wide = {number: _widened(parameter) for number, parameter in narrow.items()}
        for module in view.modules():
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in wide:
                    surgery.put(module, name, wide[id(parameter)])
    write_protection.protect(view, {id(parameter) for parameter in wide.values()})
    return view


def _format(model: Any) -> str | None:
    """How a transformers model is quantized, as it says so itself."""
    if getattr(model, "hqq_quantized", False):
        return "hqq"
    found = getattr(model, "quantization_method", None)
    return str(getattr(found, "value", found))


def _is_packed(buffer: Tensor) -> bool:
    # GPTQ, AWQ and others hold weights so. A small one may be a counter, which a forward writes to.
    return not buffer.is_floating_point() and buffer.numel() > _SMALL


def _is_narrow(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and parameter.dtype in (torch.float16, torch.bfloat16)


def _widened(parameter: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(parameter.detach().float(), requires_grad=False)
    cast("Any", made).__dict__.update(parameter.__dict__)  # transformers' mark that it has been initialised
    return made
