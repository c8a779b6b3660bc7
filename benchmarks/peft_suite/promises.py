"""What a case of peft's tests promises: which procedure, with which arguments, or why peft itself leaves it out.

The test function is called with everything that it would do in place of being done: the procedures of peft's common
tester are caught with their arguments, and so is the first model that it asks for. Nothing of peft is run.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import types
import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from peft_suite.inventory import Case


class Promise(NamedTuple):
    """A procedure on one model and one config.

    Attributes:
        procedure: a procedure of the common tester without its `_test_`, or the test's own name without `test_`.
        model_id: the base.
        config_cls: peft's class of config.
        kwargs: what the config is made with.
        extra: the procedure's other arguments.
        tester: an instance of the test's class, which makes the inputs.
    """

    procedure: str
    model_id: str
    config_cls: Any
    kwargs: Mapping[str, Any]
    extra: Mapping[str, Any]
    tester: Any


class Left(NamedTuple):
    """A case that peft's tests skip, with their reason."""

    reason: str


class _AsksForModelError(Exception):
    """Raised where a test would load a model."""


class _IsCalledError(Exception):
    """Raised in place of a procedure."""

    def __init__(self, procedure: str, arguments: inspect.BoundArguments) -> None:
        super().__init__(procedure)
        self.procedure, self.arguments = procedure, arguments


def of(case: Case, module: types.ModuleType) -> Promise | Left | None:
    """What the case promises; `None` where it is no case of a model and a config."""
    if case.skipped:
        return Left(case.skipped)
    group = getattr(module, case.group, None)
    if not {"model_id", "config_cls", "config_kwargs"} <= set(case.params) or group is None:
        return None
    tester = group()
    for name, function in inspect.getmembers(group, inspect.isfunction):
        if name.startswith("_test_"):
            setattr(tester, name, _caught(name, inspect.signature(function)))
    try:
        _call(getattr(group, case.test), tester, case.params)
    except _IsCalledError as called:
        return _of_procedure(group(), called)
    except (pytest.skip.Exception, unittest.SkipTest) as skipped:
        return Left(str(skipped))
    except Exception:  # noqa: S110  # it does its work itself, with the model that it did not get
        pass
    names = ("model_id", "config_cls", "config_kwargs", "test_name")
    extra = {name: value for name, value in case.params.items() if name not in names}
    kwargs = copy.deepcopy(case.params["config_kwargs"])
    return Promise(
        case.test.removeprefix("test_"), case.params["model_id"], case.params["config_cls"], kwargs, extra, group()
    )


def _caught(name: str, signature: inspect.Signature) -> Any:
    def procedure(*args: Any, **kwargs: Any) -> None:
        raise _IsCalledError(name.removeprefix("_test_"), signature.bind(None, *args, **kwargs))

    return procedure


def _of_procedure(tester: Any, called: _IsCalledError) -> Promise | Left:
    given = dict(called.arguments.arguments)
    given.pop("self")
    kwargs = copy.deepcopy(given.get("config_kwargs"))
    try:
        _call(getattr(type(tester), f"_test_{called.procedure}"), tester, copy.deepcopy(given))
    except (pytest.skip.Exception, unittest.SkipTest) as skipped:
        return Left(str(skipped))
    except Exception:  # noqa: S110  # the first model that it asks for is where its skipping ends
        pass
    model_id, config_cls = given.pop("model_id"), given.pop("config_cls")
    del given["config_kwargs"]
    return Promise(called.procedure, model_id, config_cls, kwargs or {}, given, tester)


def _call(function: Any, tester: Any, params: Mapping[str, Any]) -> None:
    names = list(inspect.signature(function).parameters)
    given = {name: copy.deepcopy(params[name]) for name in names if name in params}
    if "tmp_path" in names:
        given["tmp_path"] = Path(tempfile.gettempdir())
    asks = mock.Mock(side_effect=_AsksForModelError)
    network = mock.patch("socket.getaddrinfo", asks)
    with network, mock.patch.object(tester, "transformers_class", mock.Mock(from_pretrained=asks), create=True):
        function(tester, **given)
