"""Every public name says what its parameters or fields are and what it raises, and has an example.

`make doctest` runs the examples. A failing test names what is missing, function by function.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

import peftfn

HEADINGS = ("Args", "Attributes", "Example", "Raises", "Returns")


class Documented(NamedTuple):
    """A public function or class.

    Attributes:
        name: how users call it.
        thing: the function or the class.
        listed: the parameters or fields that its docstring has to list.
        allowed: those that it may list: a class's inherited fields too.
        bodies: the functions whose errors its docstring has to name.
    """

    name: str
    thing: Any
    listed: frozenset[str]
    allowed: frozenset[str]
    bodies: tuple[Any, ...]


def public_names(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes that a module offers, and those of the modules that it offers."""
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    for name in getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]:
        thing = getattr(module, name)
        if isinstance(thing, types.ModuleType):
            yield from ((f"{name}.{inner}", found) for inner, found in public_names(thing))
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            yield name, thing


def of_function(name: str, function: Any, *, is_method: bool = False) -> Documented:
    names = frozenset([*inspect.signature(function).parameters][1 if is_method else 0 :])
    return Documented(name, function, names, names, (function,))


def of_class(name: str, cls: type) -> Iterator[Documented]:
    """A class with the fields that it adds, and the methods and properties that it defines."""
    members = vars(cls)
    own = every = frozenset(members.get("_fields", ()))
    if dataclasses.is_dataclass(cls):
        every = frozenset(field.name for field in dataclasses.fields(cls))
        own = every & inspect.get_annotations(cls).keys()
    checks = tuple(one for one in (members.get("__new__"), members.get("__post_init__")) if is_written_here(one))
    yield Documented(name, cls, own, every, checks)
    for method, found in members.items():
        function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if not method.startswith("_") and is_written_here(function):
            yield of_function(f"{name}.{method}", function, is_method=True)


def is_written_here(thing: Any) -> bool:
    """Whether it is a function of peftfn's source: Python gives a NamedTuple and a dataclass methods of their own."""
    return inspect.isfunction(thing) and thing.__module__.startswith("peftfn") and thing.__code__.co_filename[0] != "<"


def documented() -> Iterator[Documented]:
    for name, thing in public_names(peftfn):
        if not inspect.isclass(thing):
            yield of_function(name, thing)
            continue
        for cls in thing.__mro__:  # a config's base classes list the fields and methods that they add
            if cls.__module__.startswith("peftfn"):
                yield from of_class(name if cls is thing else cls.__name__, cls)


def sections(docstring: str) -> dict[str, str]:
    """The text under each heading of a docstring."""
    parts = re.split(rf"^({'|'.join(HEADINGS)}):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    texts = [re.split(r"^\S", text, maxsplit=1, flags=re.MULTILINE)[0] for text in parts[2::2]]
    return dict(zip(parts[1::2], map(textwrap.dedent, texts), strict=True))


def entries(section: str) -> frozenset[str]:
    """The names that a section describes, one or several (`KeyError, ValueError: ...`) in a place."""
    heads = re.findall(r"^([\w*]+(?:, [\w*]+)*):", section, flags=re.MULTILINE)
    return frozenset(name.lstrip("*") for head in heads for name in head.split(", "))


def raised(function: Any) -> frozenset[str]:
    """The exceptions that a function's own body makes and raises, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    made = [node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return frozenset(_exception(one, function) for one in made if isinstance(one, (ast.Name, ast.Attribute)))


def _exception(called: ast.expr, function: Any) -> str:
    """The exception that a call makes: of a class, or of a function that is annotated to return one."""
    found = eval(ast.unparse(called), {**vars(builtins), **vars(sys.modules[function.__module__])})  # noqa: S307
    return found.__name__ if inspect.isclass(found) else str(inspect.signature(found).return_annotation)


def is_exception(name: str) -> bool:
    found = vars(builtins).get(name)
    return inspect.isclass(found) and issubclass(found, BaseException)


def faults(one: Documented) -> list[str]:
    """What a docstring lacks or has too much, each in a few words."""
    has = sections(one.thing.__doc__ or "")
    heading = "Attributes" if inspect.isclass(one.thing) else "Args"
    told, errors = entries(has.get(heading, "")), entries(has.get("Raises", ""))
    found = [f"{heading} lacks {name}" for name in sorted(one.listed - told)]
    found += [f"{heading} has {name}, which is none" for name in sorted(told - one.allowed)]
    found += [
        f"Raises lacks {name}" for name in sorted({name for body in one.bodies for name in raised(body)} - errors)
    ]
    found += [f"Raises has {name}, which is no exception" for name in sorted(errors) if not is_exception(name)]
    return found if ">>> " in has.get("Example", "") else [*found, "no Example"]


PUBLIC = {one.name: one for one in documented()}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_lists_parameters_and_errors_and_has_an_example(name: str) -> None:
    found = faults(PUBLIC[name])
    assert not found, f"{name}: {'; '.join(found)}"


def test_what_a_docstring_lacks_is_found() -> None:
    def badly_documented(x: int, y: int) -> None:
        """Nothing.

        Args:
            x: a number.
            z: another one.

        Raises:
            Valueerror: never.
        """
        if x:
            raise TypeError(y)
        raise peftfn.ops.merge._missing("a", {})

    assert faults(of_function("badly_documented", badly_documented)) == [
        "Args lacks y",
        "Args has z, which is none",
        "Raises lacks KeyError",
        "Raises lacks TypeError",
        "Raises has Valueerror, which is no exception",
        "no Example",
    ]
    assert {"apply", "Adapter.replace", "PeftConfig.from_dict", "sweep.step", "Count.share"} <= PUBLIC.keys()
