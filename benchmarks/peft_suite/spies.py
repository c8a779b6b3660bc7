"""What one of peft's tests builds: it is run as it is, with peft, and its bases and configs are noted on the way."""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import auto_factory

from peft_suite import judge, models
from peft_suite.inventory import Case
from peft_suite.verdicts import UnfitError

LIMIT = 8
"""How many bases and configs of one test are looked at."""


class Built(NamedTuple):
    """A base and a config, and what peft raised when it was given both."""

    model: nn.Module
    config: Any
    error: Exception | None


class Refused(NamedTuple):
    """Fields that peft's config of a class refuses."""

    config_cls: Any
    fields: dict[str, Any]


class Notes:
    """All that a test has built."""

    def __init__(self) -> None:
        self.built: list[Built] = []
        self.refused: list[Refused] = []
        self.bases: dict[int, nn.Module] = {}
        self.kept: list[Any] = []


def watch(case: Case, module: types.ModuleType) -> Notes:
    """Run the test; what it raises, or fails to show, is not asked about.

    Raises:
        UnfitError: it needs a fixture or a base that is not there, and has built nothing before.
    """
    notes = Notes()
    try:
        with contextlib.ExitStack() as stack:
            for one in _patches(module, notes):
                stack.enter_context(one)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _run(case, module)
    except UnfitError:
        if not notes.built and not notes.refused:
            raise
    except (Exception, pytest.fail.Exception):  # noqa: S110  # its own assertions are peft's matter
        pass
    return notes


def _patches(module: types.ModuleType, notes: Notes) -> Iterator[Any]:
    for name in ("get_peft_model", "inject_adapter_in_model"):
        if hasattr(module, name):
            yield mock.patch.object(module, name, _noted(getattr(module, name), notes))
    yield mock.patch.object(peft.PeftModel, "add_adapter", _added(peft.PeftModel.add_adapter, notes))
    fake = classmethod(lambda cls, model_id, *_, **given: _from_hub(cls, model_id, given))
    for kind in (auto_factory._BaseAutoModelClass, PreTrainedModel):
        yield mock.patch.object(kind, "from_pretrained", fake)
    yield mock.patch("socket.getaddrinfo", _no_network)
    for cls in (peft.LoraConfig, peft.AdaLoraConfig, peft.IA3Config, peft.PromptTuningConfig):
        yield mock.patch.object(cls, "__init__", _constructed(cls, cls.__init__, notes))


def _no_network(*_: Any, **__: Any) -> Any:
    raise UnfitError("a model hub")


def _noted(function: Any, notes: Notes) -> Any:
    def get(*args: Any, **kwargs: Any) -> Any:
        both = [*args[:2], *[kwargs[name] for name in ("model", "peft_config") if name in kwargs]]
        model, config = sorted(both[:2], key=lambda one: not isinstance(one, nn.Module))
        plain = not any(isinstance(one, peft.tuners.tuners_utils.BaseTunerLayer) for one in model.modules())
        before = (copy.deepcopy(model), copy.deepcopy(config)) if plain and len(notes.built) < LIMIT else None
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if before:
                notes.built.append(Built(*before, error))
            raise
        if before:
            notes.built.append(Built(*before, None))
            notes.bases[id(result)] = before[0]
            notes.kept.append(result)  # so that no other object gets its id
        return result

    return get


def _added(function: Any, notes: Notes) -> Any:
    def add(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        base, config = notes.bases.get(id(self)), copy.deepcopy(peft_config)
        result = function(self, adapter_name, peft_config, *args, **kwargs)
        if base is not None and len(notes.built) < LIMIT:
            notes.built.append(Built(base, config, None))
        return result

    return add


def _constructed(cls: Any, function: Any, notes: Notes) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            function(self, *args, **kwargs)
        except Exception:
            if type(self) is cls and not args and len(notes.refused) < LIMIT:
                notes.refused.append(Refused(cls, kwargs))
            raise

    return init


_FROM_AUTO, _FROM_MODEL = (one.from_pretrained.__func__ for one in (auto_factory._BaseAutoModelClass, PreTrainedModel))


def _from_hub(cls: Any, model_id: Any, given: dict[str, Any]) -> nn.Module:
    if Path(str(model_id)).is_dir():
        function = _FROM_MODEL if issubclass(cls, PreTrainedModel) else _FROM_AUTO
        return function(cls, model_id, **given)
    if not models.is_known(str(model_id)):
        raise UnfitError(f"no base is built here for {model_id}")
    dtype = given.get("dtype", given.get("torch_dtype", torch.float32))
    return models.build(str(model_id), cls, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def _run(case: Case, module: types.ModuleType) -> None:
    group = getattr(module, case.group)() if case.group else None
    function = getattr(group, case.test) if group else getattr(module, case.test)
    with pytest.MonkeyPatch.context() as monkeypatch:
        known = {"monkeypatch": monkeypatch, "recwarn": _Warnings(), "tmp_path": Path(tempfile.mkdtemp())}
        if group is not None and hasattr(group, "setUp"):
            group.setUp()
        params = dict(case.params)
        if "values" in params:  # of `parameterized.expand`: given by position
            values = params["values"]
            function(*(values if isinstance(values, tuple) else (values,)))
            return
        wanted = [name for name in inspect.signature(function).parameters if name not in params]
        function(**copy.deepcopy(params), **{name: _fixture(name, group, module, known) for name in wanted})


def _fixture(name: str, group: Any, module: types.ModuleType, known: dict[str, Any]) -> Any:
    """The value of a fixture: one of pytest's own that are used, or one that the class or the module defines."""
    if name not in known:
        found = getattr(type(group), name, None) or getattr(module, name, None)
        inner = getattr(found, "_fixture_function", None)
        if inner is None:
            raise UnfitError(f"the fixture {name} of pytest")
        names = list(inspect.signature(inner).parameters)
        given = [group if one == "self" else _fixture(one, group, module, known) for one in names]
        value = inner(*given)
        known[name] = next(value) if inspect.isgenerator(value) else value
    return known[name]


class _Warnings(list[Any]):
    """Stands for pytest's `recwarn`."""

    list = property(lambda self: self)

    def clear(self) -> None:
        """Forget them."""
        del self[:]


def is_offered(config: Any) -> bool:
    """Whether the method of a config of peft's is one of ours."""
    return judge.method_of(type(config)) in judge.OFFERED
