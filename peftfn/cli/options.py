"""Command line options out of dataclass fields: a new field of a config appears as an option by itself."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import typer

_ALIASES = {"r": ("--rank",)}  # torchrun takes `--r` for the beginning of several of its own options
_SEQUENCES = (list, tuple, set, frozenset, Sequence, Collection, Iterable)


def kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union without None, or the type itself: `list[str] | str | None` gives two."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for member in get_args(hint) for kind in kinds(member))
    return () if hint in (None, type(None)) else (hint,)


def _plain(kind: Any) -> Any:
    return get_origin(kind) or kind


def _literals(hint: Any) -> list[Any]:
    return [value for kind in kinds(hint) if get_origin(kind) is Literal for value in get_args(kind)]


def _sequence(hint: Any) -> Any:
    """The sequence member of a union (`list[str]`), or None."""
    return next((kind for kind in kinds(hint) if _plain(kind) in _SEQUENCES), None)


def _is_json(hint: Any) -> bool:
    """Whether a value is written as JSON: mappings, sequences of sequences, nested configs."""
    plain = [_plain(kind) for kind in kinds(hint)]
    sequence = _sequence(hint)
    nested = sequence is not None and any(_sequence(item) for item in get_args(sequence))
    known = {bool, int, float, str, Literal, *_SEQUENCES}
    return nested or (bool(plain) and not any(kind in known for kind in plain))


def _one(hint: Any, text: str) -> Any:
    """`text` as the first member of `hint` that can hold it."""
    plain = [_plain(kind) for kind in kinds(hint)]
    by_name = {str(value).lower(): value for value in _literals(hint)}
    if text.lower() in by_name:
        return by_name[text.lower()]
    if bool in plain and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in plain:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in plain or not plain:
        return text
    wanted = [*by_name, *(["true", "false"] if bool in plain else [])]
    raise ValueError(f"{text!r} is not {_metavar(hint)}" + (f": one of {', '.join(wanted)}" if wanted else ""))


def _json(hint: Any, text: str) -> Any:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not JSON ({error}); write it as '{{\"name\": 8}}'") from None
    if _sequence(hint) is None and not isinstance(value, dict):
        raise ValueError(f"{text!r} is JSON but not an object; write it as '{{\"name\": 8}}'")
    return cast("Any", value)


def parse(hint: Any, texts: list[str]) -> Any:
    """What the option's values mean for a field of type `hint`.

    Lists are comma-separated or the option is repeated. Where a field takes a string or a list (target
    modules), `all-linear` and `regex:PATTERN` give the string. Mappings are JSON.
    """
    if _is_json(hint) or (texts[0].startswith("{") and {dict, Mapping} & {_plain(kind) for kind in kinds(hint)}):
        return _json(hint, texts[-1])
    sequence = _sequence(hint)
    if sequence is None:
        return _one(hint, texts[-1])
    if str in kinds(hint) and texts[0].startswith("regex:"):
        return texts[0].removeprefix("regex:")
    if str in kinds(hint) and texts == ["all-linear"]:
        return texts[0]
    item = next(iter(get_args(sequence)), str)
    return [_one(item, part.strip()) for text in texts for part in text.split(",") if part.strip()]


def _metavar(hint: Any) -> str:
    plain = [_plain(kind) for kind in kinds(hint)]
    if _is_json(hint):
        return "JSON"
    if sequence := _sequence(hint):
        return "INT,..." if int in get_args(sequence) else "NAME,..."
    if literals := _literals(hint):
        return "|".join([*(["true", "false"] if bool in plain else []), *(str(value) for value in literals)])
    named: dict[Any, str] = {int: "INT", float: "FLOAT", bool: "true|false"}
    return next((name for kind, name in named.items() if kind in plain), "TEXT")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _read(name: str, hint: Any, typed: Any) -> Any:
    """The field's value out of what typer has: a bool, a string, or strings. Errors name the option."""
    if isinstance(typed, bool):
        return typed
    texts = cast("list[str]", typed) if isinstance(typed, list) else [str(typed)]
    try:
        return parse(hint, texts)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name.replace('_', '-')}") from None


def _split(typed: Any) -> list[str]:
    """The parts of comma-separated or repeated values."""
    texts = cast("list[str]", typed) if isinstance(typed, list) else [str(typed)]
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def numbers(kinds_of: Iterable[type]) -> list[str]:
    """The fields of these dataclasses that are one number each, so that commas can part several of them."""
    hints = {name: hint for kind in kinds_of for name, hint in get_type_hints(kind).items()}
    return [n for n, h in hints.items() if {int, float} & set(kinds(h)) and _sequence(h) is None and not _is_json(h)]


def parameter(
    field: dataclasses.Field[Any], hint: Any, panel: str, more: str = "", *, several: bool = False
) -> inspect.Parameter:
    """The typer parameter of one dataclass field: `--its-name`, with the field's type, default and help, and `more`.

    With `several` it takes several values.
    """
    default = _default(field)
    text = field.metadata.get("help", "") + more
    if _sequence(hint) is not None and str in kinds(hint):
        text += " Write a regex as regex:PATTERN."
    shared: dict[str, Any] = {"help": text.strip(), "rich_help_panel": panel}
    required = default is dataclasses.MISSING
    if kinds(hint) == (bool,):
        annotation: Any = Annotated[bool, typer.Option(**shared)]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    shared["metavar"] = field.metadata.get("metavar", _metavar(hint)) + (",..." if several else "")
    typed: Any = list[str] if several or (_sequence(hint) is not None and not _is_json(hint)) else str
    flags = (f"--{field.name.replace('_', '-')}", *_ALIASES.get(field.name, ()))
    annotation = Annotated[typed if required else typed | None, typer.Option(*flags, **shared)]
    shown = inspect.Parameter.empty if required else _shown([default] if several and default is not None else default)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=annotation)


def _shown(default: Any) -> Any:
    """The default as it would be typed, so that --help shows it; None where there is nothing to type."""
    if default is None or default in ("", (), [], {}):
        return None
    if isinstance(default, (list, tuple)):
        return [str(item) for item in cast("Sequence[Any]", default)]
    return str(default).lower() if isinstance(default, bool) else str(default)


class OneOf(NamedTuple):
    """Dataclasses of which a command gets one: the one that an option names.

    Attributes:
        option: the field name of that option, such as `method`.
        kinds: by what is typed; the first one is the default.
        text: the option's help.
    """

    option: str
    kinds: Mapping[str, type]
    text: str

    def named(self, typed: str) -> str:
        """What was typed, if it is one of them."""
        if typed not in self.kinds:
            raise typer.BadParameter(
                f"{typed!r} is none of {', '.join(self.kinds)}", param_hint=f"--{self.option.replace('_', '-')}"
            )
        return typed


_Hints = dict[str, Any]
_Parameters = dict[str, inspect.Parameter]


def command(
    run: Callable[..., None],
    panels: Mapping[type, str],
    fixed: Collection[str] = (),
    one_of: OneOf | None = None,
    several: Collection[str] | None = None,
) -> Callable[..., None]:
    """A typer command whose options are the fields of the dataclasses in `panels`, in order, and of those of `one_of`.

    `run` is called with one value of each class. `fixed` names fields that `run` fills itself, of one class of `one_of`
    alone as `name.field`. A field that several classes of `one_of` have is one option. Where `several` is given, the
    fields that it names take several values: the first is in the class's value, and `run` gets all of them as well,
    by name, of those that were typed.
    """
    chosen: dict[type, _Hints] = {}
    parameters: _Parameters = {}
    for kind, panel in panels.items():
        chosen[kind] = _fields(kind, panel, fixed, parameters, several or ())
    choices = _choices(one_of, fixed, parameters, several or ()) if one_of else {}

    def typed(context: typer.Context, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value not in (None, [])}
        parts = {n: _split(v) for n, v in given.items() if n in (several or ()) and _is_written(context, n)}
        given |= {n: some[0] for n, some in parts.items()}
        made: list[Any] = [
            kind(**{n: _read(n, h, given[n]) for n, h in hints.items() if n in given}) for kind, hints in chosen.items()
        ]
        name = ""
        if one_of:
            name = one_of.named(given[one_of.option])
            written = {n: v for n, v in given.items() if _is_written(context, n)}
            _refuse_others(one_of, name, choices, written)
            hints = choices[name]
            fields = {n: _read(n, hints[n], v) for n, v in written.items() if n in hints}
            made.append(one_of.kinds[name](**fields))
        if several is not None:
            every = {n: h for hints in (*chosen.values(), choices.get(name, {})) for n, h in hints.items()}
            made.append({n: [_read(n, every[n], part) for part in some] for n, some in parts.items()})
        run(*made)

    typed.__name__, typed.__doc__ = run.__name__, run.__doc__
    # typer reads a command's options from its signature
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    typed.__signature__ = inspect.Signature([context, *parameters.values()])
    return typed


def _fields(
    kind: type, panel: str, fixed: Collection[str], parameters: _Parameters, several: Collection[str]
) -> _Hints:
    """The types of one class's fields by name, each of them a new parameter."""
    hints = get_type_hints(kind)
    fields = [f for f in dataclasses.fields(kind) if f.init and f.name not in fixed]
    fields.sort(key=lambda field: _default(field) is not dataclasses.MISSING)  # what has to be given comes first
    for field in fields:
        if field.name in parameters:
            raise TypeError(f"{kind.__name__}.{field.name} would hide another option of that name")
        many = field.name in several
        parameters[field.name] = parameter(field, hints[field.name], panel, several=many)
    return {field.name: hints[field.name] for field in fields}


def _choices(
    one_of: OneOf, fixed: Collection[str], parameters: _Parameters, several: Collection[str]
) -> dict[str, _Hints]:
    """The same for each class of `one_of`; the first that has a field shows it, and says which others have it."""
    flag, first = one_of.option.replace("_", "-"), next(iter(one_of.kinds))
    option: Any = typer.Option(help=one_of.text, metavar="|".join(one_of.kinds), rich_help_panel="Adapter")
    keyword = inspect.Parameter.KEYWORD_ONLY
    annotation = Annotated[str, option]
    parameters[one_of.option] = inspect.Parameter(one_of.option, keyword, default=first, annotation=annotation)
    taken = set(parameters)
    found: dict[str, _Hints] = {}
    for name, kind in one_of.kinds.items():
        own = [f for f in dataclasses.fields(kind) if f.name not in fixed and f"{name}.{f.name}" not in fixed]
        found[name] = {field.name: get_type_hints(kind)[field.name] for field in own}
    for name, kind in one_of.kinds.items():
        new = [f for f in dataclasses.fields(kind) if f.name in found[name] and f.name not in parameters]
        if hidden := taken & set(found[name]):
            raise TypeError(f"{kind.__name__}.{min(hidden)} would hide another option of that name")
        for field in new:
            others = [other for other, hints in found.items() if field.name in hints and other != name]
            panel, more, many = f"Adapter: --{flag} {name}", _also(others, len(found)), field.name in several
            parameters[field.name] = parameter(field, found[name][field.name], panel, more, several=many)
    return found


def _also(others: Sequence[str], count: int) -> str:
    if len(others) == count - 1:
        return " Of every method."
    return f" Of {', '.join(others)} too." if others else ""


def _is_written(context: typer.Context, name: str) -> bool:
    """Whether an option was typed: what was not has the chosen class's own default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _refuse_others(one_of: OneOf, name: str, choices: Mapping[str, _Hints], written: Collection[str]) -> None:
    every = {field for hints in choices.values() for field in hints}
    for field in written:
        if field in every and field not in choices[name]:
            own = ", ".join(f"--{one.replace('_', '-')}" for one in choices[name])
            raise typer.BadParameter(
                f"no option of --{one_of.option} {name}; it has {own}", param_hint=f"--{field.replace('_', '-')}"
            )
