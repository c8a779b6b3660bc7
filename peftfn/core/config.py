"""Frozen configs with PEFT's field names and defaults, and `adapter_config.json` both ways."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from peftfn.core import files, hub, reading

TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# A PEFT field that has no effect while it holds one of these values; `ANY` where it only modifies another one.
ANY = object()
OFF: tuple[Any, ...] = (None, False, {}, [])

# Left out of files while they are None: versions of PEFT that have no such field warn of it, or refuse the file.
_LATER = (
    *("alora_invocation_tokens", "exclude_modules", "init_weights", "peft_version", "target_parameters"),
    *("tokenizer_kwargs", "trainable_token_indices"),
)

_BY_TYPE: dict[str, type[PeftConfig]] = {}
"""The class of each `peft_type`, put there where the class is defined."""


def _refuse_change(*_: Any, **__: Any) -> Any:
    raise TypeError("this dictionary is a part of a frozen value; make a changed one of dict(it).")


class FrozenDict(dict[str, Any]):
    """A dictionary that cannot change and can be hashed: a config is static for every transform."""

    __slots__ = ()

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = cast("Any", _refuse_change)

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # a dict has none
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)  # pickle and copy would set its items one by one

    def __or__(self, other: Any) -> Any:
        return dict(self) | dict(other)


def freeze(value: Any) -> Any:
    """The value with lists as tuples, sets as sorted tuples and dicts as `FrozenDict`, all the way down."""
    if isinstance(value, (set, frozenset)):
        value = sorted(cast("set[Any]", value))
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in cast("list[Any]", value))
    if isinstance(value, Mapping):
        return FrozenDict({str(key): freeze(item) for key, item in cast("Mapping[Any, Any]", value).items()})
    return value


def thaw(value: Any) -> Any:
    """The value with tuples as lists and mappings as dicts, as JSON has them."""
    if isinstance(value, (list, tuple)):
        return [thaw(item) for item in cast("list[Any]", value)]
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in cast("Mapping[str, Any]", value).items()}
    return value


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What every adapter's config holds, whatever its method.

    Attributes:
        task_type: what the model is for; `SEQ_CLS` and its like also train the model's head, as PEFT does.
        auto_mapping: base model class and library, kept from and for files.
        base_model_name_or_path: the base's folder or hub id, filled by `peftfn.init` where the model knows it.
        revision: the base's revision.
        inference_mode: kept from and for files; it changes nothing here.
        peft_version: the version of PEFT that wrote the file, if one did.
    """

    peft_type: ClassVar[str] = ""
    # PEFT's fields that are not this library's (yet), with the values that ask for nothing.
    inactive: ClassVar[Mapping[str, Any]] = {"runtime_config": ANY}

    task_type: str | None = dataclasses.field(default=None, metadata={"help": "The type of task, e.g. SEQ_CLS."})
    auto_mapping: Mapping[str, Any] | None = None
    base_model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "The base model's folder or hub id."}
    )
    revision: str | None = dataclasses.field(default=None, metadata={"help": "The base model's revision."})
    inference_mode: bool = dataclasses.field(default=False, metadata={"help": "Kept for PEFT's files."})
    peft_version: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Make files of the class's own `peft_type` be read as this class."""
        super().__init_subclass__(**options)
        if kind := vars(cls).get("peft_type"):
            _BY_TYPE[kind] = cls

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """A config whose fields are yet to be set; names that are no fields are refused with near ones."""
        _check_fields(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, freeze(getattr(self, field.name)))
        _check_types(self)
        _check_patterns(self)
        if self.task_type is not None:
            # PEFT's TaskType is a str enum: keep its value, so that the config is plain data.
            object.__setattr__(self, "task_type", str(getattr(self.task_type, "value", self.task_type)))
            if self.task_type not in TASK_TYPES:
                raise ValueError(f"task_type={self.task_type!r} is unknown; expected one of {', '.join(TASK_TYPES)}.")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON data, `peft_type` included."""
        fields = {field.name: thaw(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"peft_type": self.peft_type, **fields}

    def to_json(self) -> str:
        """The text of `adapter_config.json`."""
        # Fields in PEFT's order, and patterns in their own: the first pattern that matches a path counts.
        fields = sorted(self.to_dict().items())
        return json.dumps({n: v for n, v in fields if v is not None or n not in _LATER}, indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the given mapping") -> PeftConfig:
        """The config that `data` describes, of the class that its `peft_type` names.

        Raises:
            ValueError: `peft_type` is missing or unknown, or a field is unknown, of a wrong type, or asks for what is
                not supported here.
        """
        given = dict(data)
        kind = given.pop("peft_type", None) or cls.peft_type
        found = _BY_TYPE.get(kind) if isinstance(kind, str) else None
        if found is None:
            raise ValueError(
                f"{source} has peft_type={data.get('peft_type')!r}, which this version of peftfn does not read: "
                f"{', '.join(sorted(_BY_TYPE))}."
            )
        if not issubclass(found, cls):
            raise ValueError(f"{source} holds a {found.__name__} (peft_type={kind!r}), not a {cls.__name__}.")
        for name in [name for name, value in given.items() if found.is_inactive(name, value)]:
            del given[name]
        try:
            return found(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def is_inactive(cls, name: str, value: Any) -> bool:
        """Whether `name` is a field of PEFT's that is not held here, at a value that asks for nothing."""
        for one in cls.__mro__:
            off = vars(one).get("inactive", {}).get(name)
            if off is not None:
                return off is ANY or value in off
        return False

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `adapter_config.json` into `folder` (made if missing), atomically; its path."""
        path = Path(folder) / files.CONFIG
        files.write_atomic(path, lambda temporary: temporary.write_text(self.to_json(), encoding="utf-8"))
        return path

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> PeftConfig:
        """The config in a folder or hub repository, of the class that its `peft_type` names."""
        origin = reading.Origin(str(folder_or_hub_id), subfolder, revision, token, cache_dir)
        path = reading.find(origin, files.CONFIG)
        return cls.from_dict(reading.read_json(path), source=str(path))

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
        """Upload `adapter_config.json` alone to a hub repository; the commit's address."""
        return hub.push(repo_id, self.save_pretrained, token=token, private=private)


@dataclasses.dataclass(frozen=True)
class TargetedConfig(PeftConfig):
    """The config of a method that acts on layers: which ones, by PEFT's rules.

    Attributes:
        target_modules: names (a path's ending), a regex for whole paths, or `"all-linear"`.
        exclude_modules: names or a regex of modules to leave out.
        modules_to_save: modules to train and save whole, such as a new head.
    """

    target_modules: Sequence[str] | str | None = dataclasses.field(
        default=None, metadata={"help": "Module names (a path's ending), a regex, or 'all-linear'."}
    )
    exclude_modules: Sequence[str] | str | None = dataclasses.field(
        default=None, metadata={"help": "Names or a regex of modules to leave out."}
    )
    modules_to_save: Sequence[str] | None = dataclasses.field(
        default=None, metadata={"help": "Modules to train and save whole, such as a new head."}
    )


@dataclasses.dataclass(frozen=True)
class LayeredConfig(TargetedConfig):
    """The config of a method whose targets can be limited to some layers.

    Attributes:
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the list of layers, if it is an unusual one.
    """

    layers_to_transform: Sequence[int] | int | None = dataclasses.field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: Sequence[str] | str | None = dataclasses.field(
        default=None, metadata={"help": "Name of the list of layers, if it is an unusual one."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, field) is not None:
                raise ValueError(f"{field} cannot be used with target_modules={self.target_modules!r}, a string.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform beside it.")


def _check_fields(cls: type[PeftConfig], given: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in given:
        if name in known:
            continue
        if any(name in vars(one).get("inactive", {}) for one in cls.__mro__):
            raise ValueError(
                f"{cls.__name__}({name}={given[name]!r}): peft has this field, peftfn does not support it yet. Leave "
                "it out, or keep training this adapter with peft."
            )
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise TypeError(f"{cls.__name__} has no field {name!r}.{hint} Its fields: {', '.join(known)}.")


def _check_types(config: PeftConfig) -> None:
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            raise TypeError(f"{type(config).__name__}({field.name}={thaw(value)!r}): expected {field.type}.")


def _check_patterns(config: PeftConfig) -> None:
    regexes = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
    for field in (*regexes, "rank_pattern", "alpha_pattern"):
        value: Any = getattr(config, field, None)
        patterns: list[str] = [value] if isinstance(value, str) else [*value] if isinstance(value, Mapping) else []
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{type(config).__name__}({field}={thaw(value)!r}): {pattern!r} is no regex ({error}). "
                    "Write '.*' for anything, or give a list of names."
                ) from error


@functools.cache
def _hints(cls: type[PeftConfig]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a frozen value is of an annotated type: of those that configs have, and so JSON."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if kind is Sequence:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in cast("tuple[Any, ...]", value))
    if kind is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(item, inner[1]) for item in cast("Mapping[Any, Any]", value).values()
        )
    if hint is float or hint is int:
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)
