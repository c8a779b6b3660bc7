"""Frozen configs with PEFT's field names and defaults, and `adapter_config.json` both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from peftfn.core import config_values, files, hub, reading
from peftfn.core.config_values import freeze, thaw

TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Values of `PeftConfig.inactive`. `OFF`: a field of PEFT's that changes nothing while it has one of these values.
# `ANY`: one that may have any value, because it only modifies another field.
ANY = object()
OFF: tuple[Any, ...] = (None, False, {}, [])

_BY_TYPE: dict[str, type[PeftConfig]] = {}
"""The class of each `peft_type`, put there where the class is defined."""


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

    Raises:
        TypeError: a name is no field (near ones are named), or a value is not of its field's type.
        ValueError: `task_type` is unknown, a pattern is no regex, or a field is one of PEFT's that peftfn lacks.

    Example:
        >>> import peftfn as pf
        >>> pf.PeftConfig.from_dict({"peft_type": "LORA", "r": 4, "target_modules": ["query"]}).target_modules
        ('query',)
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
        config_values.refuse_unknown(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, freeze(getattr(self, field.name)))
        config_values.check_types(self)
        config_values.check_patterns(self)
        if self.task_type is not None:
            # PEFT's TaskType is a str enum: keep its value, so that the config is plain data.
            object.__setattr__(self, "task_type", str(getattr(self.task_type, "value", self.task_type)))
            if self.task_type not in TASK_TYPES:
                raise ValueError(f"task_type={self.task_type!r} is unknown; expected one of {', '.join(TASK_TYPES)}.")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON data, `peft_type` included.

        Example:
            >>> import peftfn as pf
            >>> fields = pf.LoraConfig(target_modules=["query"]).to_dict()
            >>> fields["peft_type"], fields["target_modules"]
            ('LORA', ['query'])
        """
        fields = {field.name: thaw(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"peft_type": self.peft_type, **fields}

    def to_json(self) -> str:
        """The text of `adapter_config.json`: all fields, but no empty one that older versions of PEFT lack.

        Example:
            >>> import peftfn as pf
            >>> print(pf.LoraConfig(r=4).to_json().splitlines()[1])
              "alpha_pattern": {},
        """
        # Fields in PEFT's order, and patterns in their own: the first pattern that matches a path counts.
        unsaid = {one.name: one.default for one in dataclasses.fields(self) if one.name in config_values.LATER}
        fields = {n: v for n, v in sorted(self.to_dict().items()) if n not in unsaid or v != unsaid[n]}
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the given mapping") -> PeftConfig:
        """The config that `data` describes, of the class that its `peft_type` names.

        Args:
            data: field names to values, as PEFT's `config.to_dict()` or an `adapter_config.json` has them. Without
                `peft_type` it is a config of the class that this is called on.
            source: where `data` comes from, for messages.

        Raises:
            ValueError: `peft_type` is missing, unknown, or not of the class that this is called on; or a field is
                unknown, of a wrong type, or asks for what is not supported here.

        Example:
            >>> import peftfn as pf
            >>> pf.LoraConfig.from_dict({"r": 4}).r
            4
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
        """Whether `name` is a field that peftfn does not have, with a value that asks for nothing.

        Of fields of PEFT's it is known which values do. Any other, as the next PEFT may write, asks for nothing where
        it is null, false, {} or [].

        Args:
            name: the field.
            value: its value in a file.

        Example:
            >>> import peftfn as pf
            >>> pf.IA3Config.is_inactive("runtime_config", {"ephemeral_gpu_offload": False})
            True
        """
        if any(field.name == name for field in dataclasses.fields(cls)):
            return False
        for one in cls.__mro__:
            off = vars(one).get("inactive", {}).get(name)
            if off is not None:
                return off is ANY or value in off
        return value is None or value is False or value in ({}, [])

    def save_pretrained(self, folder: str | Path) -> Path:
        """The path of `adapter_config.json`, written into `folder`: a kill leaves the old file or the new one.

        Args:
            folder: made if missing; other files in it are left alone.

        Raises:
            NotADirectoryError: `folder` is a file.
            OSError: the disk is full, or the folder cannot be written to.

        Example:
            >>> import tempfile, peftfn as pf
            >>> pf.LoraConfig(r=4).save_pretrained(tempfile.mkdtemp()).name
            'adapter_config.json'
        """
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
        """The config in a folder or hub repository, of the class that its `peft_type` names.

        Args:
            folder_or_hub_id: a folder, or a hub id.
            subfolder: where in the folder or repository the file is.
            revision: for the hub: a branch, a tag or a commit.
            token: for the hub, as `huggingface_hub` has it.
            cache_dir: for the hub: where downloads are kept.

        Raises:
            FileNotFoundError: there is no `adapter_config.json`, or the hub cannot be reached.
            ValueError: the file is no JSON object, or describes no config: see `from_dict`.

        Example:
            >>> import tempfile, peftfn as pf
            >>> folder = tempfile.mkdtemp()
            >>> path = pf.LoraConfig(r=4).save_pretrained(folder)
            >>> pf.LoraConfig.from_pretrained(folder).r
            4
        """
        origin = reading.Origin(str(folder_or_hub_id), subfolder, revision, token, cache_dir)
        path = reading.find(origin, files.CONFIG)
        return cls.from_dict(reading.read_json(path), source=str(path))

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
        """The address of the commit that puts `adapter_config.json` alone into a hub repository.

        Args:
            repo_id: the repository, `user/name`; made if missing.
            token: as `huggingface_hub` has it; by default the one of `hf auth login`.
            private: whether a repository that is made is private; by default what the account says.

        Raises:
            ValueError: `repo_id` is no valid name (`HFValidationError`).
            OSError: the hub cannot be reached, or refuses (`HfHubHTTPError`).

        Example:
            >>> import peftfn as pf
            >>> pf.LoraConfig(r=4).push_to_hub("user/name")  # doctest: +SKIP
            'https://huggingface.co/user/name/commit/...'
        """
        return hub.push(repo_id, self.save_pretrained, token=token, private=private)


@dataclasses.dataclass(frozen=True)
class TargetedConfig(PeftConfig):
    """The config of a method that acts on layers: which ones, by PEFT's rules.

    Attributes:
        target_modules: names (a path's ending), a regex for whole paths, or `"all-linear"`.
        exclude_modules: names or a regex of modules to leave out.
        modules_to_save: modules to train and save whole, such as a new head.

    Example:
        >>> import peftfn as pf
        >>> pf.IA3Config(target_modules=["k_proj", "v_proj"], modules_to_save=["classifier"]).modules_to_save
        ('classifier',)
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

    Raises:
        ValueError: one of the two is given with a `target_modules` that is a regex, or a pattern without indices.

    Example:
        >>> import peftfn as pf
        >>> pf.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1]).layers_to_transform
        (0, 1)
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
