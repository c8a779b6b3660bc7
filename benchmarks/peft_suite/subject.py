"""One base and one config, peft's way and ours, each made once for all the procedures that ask for it.

peft is the reference: its model holds the tensors, of which all that are trained are moved a little, so that no
procedure looks at an adapter that does nothing. What it computes in float64 is the truth that float32 is held against.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn

import peftfn as pf
from peft_suite import by_hand, models, verdicts

MOVED = 0.05
"""By how much of a normal number each trained tensor is moved."""


class Subject:
    """A base and a config; `kwargs` make peft's config, `tester` makes the inputs.

    Attributes:
        seed: another one gives another adapter of the same config.
    """

    def __init__(self, model_id: str, config_cls: Any, kwargs: Mapping[str, Any], tester: Any, seed: int = 0) -> None:
        self.model_id, self.config_cls, self.kwargs = model_id, config_cls, dict(kwargs)
        self.tester, self.seed = tester, seed

    def with_(self, *, seed: int | None = None, **changes: Any) -> Subject:
        """The same with another seed, or other fields of the config."""
        seed = self.seed if seed is None else seed
        return Subject(self.model_id, self.config_cls, self.kwargs | changes, self.tester, seed)

    def without(self, ending: str) -> Subject:
        """The same without the fields whose names end so."""
        kept = {name: value for name, value in self.kwargs.items() if not name.endswith(ending)}
        return Subject(self.model_id, self.config_cls, kept, self.tester, self.seed)

    def peft_config(self) -> Any:
        """peft's config, a new one: peft writes into it."""
        return self.config_cls(base_model_name_or_path=self.model_id, **copy.deepcopy(self.kwargs))

    @functools.cached_property
    def config(self) -> pf.PeftConfig:
        """Ours, read from the file that peft's config writes."""
        return converted(self.peft_config())

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The base, a new one, always the same."""
        kind = self.tester.transformers_class
        if models.is_known(self.model_id):
            return models.build(self.model_id, kind, dtype)
        try:
            model = kind.from_pretrained(self.model_id).eval()
        except (OSError, ValueError) as error:
            raise verdicts.UnfitError(f"no base is built here for {self.model_id}") from error
        return cast(model, dtype)

    @functools.cached_property
    def model(self) -> nn.Module:
        """One base for all procedures, which none may change."""
        return self.base()

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the class's own tests."""
        return self.tester.prepare_inputs_for_testing()

    def peft_model(self, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
        """peft's model of it, a new one, always the same, with moved tensors."""
        torch.manual_seed(self.seed)
        with quiet():
            model = peft.get_peft_model(self.base(dtype), self.peft_config(), **kwargs).eval()
        generator = torch.Generator().manual_seed(100 + self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Over a half-precision base peft lets AdaLoRA's count of ranks be trained; no file of its has it.
                if parameter.requires_grad and "ranknum" not in name:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((MOVED * noise).to(parameter.dtype))
        return model

    @functools.cached_property
    def reference(self) -> Any:
        """peft's model in float32, which none may change."""
        return self.peft_model()

    def widened(self, model: Any, dtype: torch.dtype = torch.float32) -> Any:
        """A peft model over a base of `dtype` in float64; where peft is wrong, that base with the adapter by hand."""
        if by_hand.is_needed(self.model_id):
            weights = safetensors.torch.load_file(saved(model) / "adapter_model.safetensors")
            return by_hand.adapted(cast(self.base(dtype), torch.float64), self.peft_config(), weights)
        return cast(copy.deepcopy(model), torch.float64)

    @functools.cached_property
    def exact(self) -> Any:
        """The reference in float64, which none may change."""
        return self.widened(self.reference)

    @functools.cached_property
    def folder(self) -> Path:
        """The files that peft writes."""
        return saved(self.reference)

    @functools.cached_property
    def adapter(self) -> pf.Adapter:
        """Ours, read from them."""
        self.config  # noqa: B018  # says what is not offered, before the file does
        return pf.load(self.folder, self.model)

    @functools.cached_property
    def truth(self) -> Tensor:
        """What peft computes in float64."""
        return self.run(self.exact)

    @functools.cached_property
    def rounded(self) -> Tensor:
        """What it computes in float32."""
        return self.run(self.reference)

    def inputs_for(self, model: nn.Module) -> dict[str, Any]:
        """The inputs, of which numbers that are no indices have the dtype of the module."""
        dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.inputs.items()}

    def run(self, model: nn.Module) -> Tensor:
        """The first output of a module."""
        with torch.no_grad(), quiet():
            return first(model(**self.inputs_for(model)))

    def apply(self, adapter: Any = None, model: nn.Module | None = None, **kwargs: Any) -> Tensor:
        """The first output of `apply`."""
        with torch.no_grad():
            given = self.adapter if adapter is None else adapter
            base = self.model if model is None else model
            return first(pf.apply(base, given, self.inputs_for(base), **kwargs))


def first(output: Any) -> Tensor:
    """The tensor that peft's tests look at."""
    return output if isinstance(output, Tensor) else output[0]


def converted(config: Any) -> pf.PeftConfig:
    """A config of peft's as one of ours, through its file."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            return pf.PeftConfig.from_pretrained(folder)
        except ValueError as error:
            raise verdicts.unsupported(error) or error from error


def saved(model: Any, **kwargs: Any) -> Path:
    """A folder with what peft saves of its model."""
    folder = Path(tempfile.mkdtemp(dir=temporary()))
    with quiet():
        model.save_pretrained(str(folder), **kwargs)
    return folder


@functools.cache
def temporary() -> Path:
    """One folder for all that a process writes; the runner removes it."""
    return Path(tempfile.mkdtemp(prefix="peft-suite-"))


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The module in another dtype, in place; peft's toy models keep the dtype of their input in an attribute."""
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):
            module.dtype = dtype
    return model


def quiet() -> Any:
    """peft and transformers warn of much that is asked for on purpose here."""
    caught = warnings.catch_warnings()
    caught.__enter__()
    warnings.simplefilter("ignore")
    return _Closing(caught)


class _Closing:
    def __init__(self, caught: Any) -> None:
        self.caught = caught

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.caught.__exit__(*error)
