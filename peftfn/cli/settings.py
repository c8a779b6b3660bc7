"""What a run is, apart from the adapter's config: dataclasses whose fields are the options of a command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from peftfn.cli.errors import UserError
from peftfn.core.config import PeftConfig


def option(text: str, default: Any = dataclasses.MISSING, **metadata: str) -> Any:
    """A dataclass field that carries its own help text."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """A base, the data and how one is fed to the other: what training and measuring have in common."""

    model: str = option("Base model: a folder or a hub id.", metavar="FOLDER|ID")
    data: str = option("A .csv, .tsv, .json or .jsonl file, or a `datasets` name or name:config.", metavar="FILE|NAME")
    split: str = option("Split of a `datasets` name.", "train")
    task: Literal["auto", "seq_cls", "causal_lm"] = option(
        "seq_cls: a label for each text. causal_lm: the next token. auto: seq_cls if a column has labels.",
        "auto",
    )
    text_column: str | None = option("Column with the text; found by its name if not given.", None)
    label_column: str | None = option("Column with the label; found by its name if not given.", None)
    completion_column: str | None = option(
        "causal_lm: column with what follows the text, which is then the prompt; the loss is on it alone. `completion` "
        "beside `prompt` if not given.",
        None,
    )
    max_length: int = option("Tokens in one example, at most.", 256)
    long_text: Literal["chunk", "truncate"] = option(
        "causal_lm: chunk joins the texts and cuts pieces of --max-length; truncate cuts each text once. Rows with a "
        "completion are never joined.",
        "chunk",
    )
    batch_size: int = option("Examples in one forward pass.", 16)
    seed: int = option("Seed of the new weights, the order of the data and dropout.", 0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Number type of the base; auto: as its files have it.", "auto"
    )
    device: str = option("cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.", "auto")
    threads: int | None = option("CPU threads; torch decides if not given.", None)

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use, by the name of their option."""
        _refuse_numbers(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(DataSettings):
    """One training run: the data, the loop and what is kept."""

    output: str = option("Folder for the adapter, loss.png and metrics.jsonl.", metavar="FOLDER")
    eval_data: str | None = option("Held-out data, measured after each epoch.", None, metavar="FILE|NAME")
    eval_split: str = option("Split of a `datasets` name given as --eval-data.", "test")
    epochs: float = option("Passes over the data.", 3.0)
    max_steps: int | None = option("Optimizer steps; replaces --epochs.", None)
    grad_accumulation: int = option("Forward passes in one optimizer step.", 1)
    lr: float = option("Highest learning rate of AdamW; prompts and (IA)³ want a larger one, such as 0.01.", 2e-4)
    weight_decay: float = option("Weight decay of AdamW.", 0.0)
    warmup: float = option("Steps of linear warm-up, or their share of all steps if below 1.", 0.06)
    max_grad_norm: float = option("Gradients are scaled down to this norm; 0 for never.", 1.0)
    save_every: int = option("Optimizer steps between two checkpoints.", 100)
    resume: bool = option("Go on from the last checkpoint in --output, if there is one.", True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings(TrainSettings):
    """Several training runs at once: what they share, and the first value of what they do not."""

    combine: Literal["grid", "zip"] = option(
        "grid: every combination of the values. zip: the first values together, the second ones, and so on.", "grid"
    )
    patience: int | None = option(
        "An adapter stops when its held-out loss has not fallen for so many epochs; needs --eval-data.", None
    )
    replace: bool = option("Replace the sweep that is in --output, and begin anew.", False)

    def __post_init__(self) -> None:
        """Refuse a patience without held-out data, whose loss it is about."""
        super().__post_init__()
        if self.patience is not None and self.eval_data is None:
            raise UserError(f"--patience {self.patience} watches the held-out loss; give --eval-data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What `eval` is asked for; what is None is as in the adapter's training, or the default of `train`."""

    data: str = option("A .csv, .tsv, .json or .jsonl file, or a `datasets` name or name:config.", metavar="FILE|NAME")
    adapter: str | None = option("Adapter folder or hub id; without it the base alone.", None, metavar="FOLDER|ID")
    adapter_column: str | None = option("Column that names each row's adapter, by its folder or --adapters.", None)
    adapters: Sequence[str] | None = option("The names in that column: NAME=FOLDER, NAME=FOLDER, ...", None)
    model: str | None = option("Base model, if not the one in the adapter's config.", None, metavar="FOLDER|ID")
    split: str = option("Split of a `datasets` name.", "test")
    task: Literal["auto", "seq_cls", "causal_lm"] | None = option("As in `train`.", None)
    text_column: str | None = option("Column with the text.", None)
    label_column: str | None = option("Column with the label.", None)
    completion_column: str | None = option("Column with what follows the text.", None)
    max_length: int | None = option("Tokens in one example, at most.", None)
    long_text: Literal["chunk", "truncate"] | None = option("As in `train`.", None)
    batch_size: int = option("Examples in one forward pass.", 32)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = option("Number type of the base.", None)
    device: str = option("cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.", "auto")
    threads: int | None = option("CPU threads; torch decides if not given.", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What `generate` is asked for."""

    data: str = option("A .csv, .tsv, .json or .jsonl file, or a `datasets` name or name:config.", metavar="FILE|NAME")
    adapter: str | None = option("One adapter for all rows: a folder or hub id.", None, metavar="FOLDER|ID")
    adapter_column: str | None = option(
        "Column that names each row's adapter, by its folder or --adapters; `adapter` if there is one. An empty cell "
        "is the base alone.",
        None,
    )
    adapters: Sequence[str] | None = option("The names in that column: NAME=FOLDER, NAME=FOLDER, ...", None)
    model: str | None = option("Base model, if not the one in the adapters' configs.", None, metavar="FOLDER|ID")
    output: str | None = option("A .jsonl file to write; without it the rows are printed.", None, metavar="FILE")
    split: str = option("Split of a `datasets` name.", "test")
    text_column: str | None = option("Column with the text; found by its name if not given.", None)
    max_new_tokens: int = option("How many tokens to write after a text, at most.", 64)
    num_beams: int = option("Beams; 1 writes the likeliest token each time.", 1)
    batch_size: int = option("Rows in one batch, whatever their adapters.", 16)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("Number type of the base.", "auto")
    device: str = option("cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.", "auto")
    threads: int | None = option("CPU threads; torch decides if not given.", None)

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use, by the name of their option."""
        _refuse_numbers(self)


_Bound = tuple[Callable[[float], bool], str]
_AT_LEAST_ONE: _Bound = (lambda value: value >= 1, "a whole number of at least 1")
_NOT_NEGATIVE: _Bound = (lambda value: value >= 0, "a number of at least 0")
_POSITIVE: _Bound = (lambda value: value > 0, "a number above 0")
_BOUNDS: dict[str, _Bound] = {
    **dict.fromkeys(
        (
            "max_length",
            "batch_size",
            "grad_accumulation",
            "save_every",
            "max_steps",
            "threads",
            "max_new_tokens",
            "num_beams",
            "patience",
        ),
        _AT_LEAST_ONE,
    ),
    **dict.fromkeys(("weight_decay", "warmup", "max_grad_norm"), _NOT_NEGATIVE),
    **dict.fromkeys(("epochs", "lr"), _POSITIVE),
}


def _refuse_numbers(settings: Any) -> None:
    for name, (holds, wanted) in _BOUNDS.items():
        value = getattr(settings, name, None)
        if value is not None and not holds(value):  # written so that nan is refused too
            raise UserError(f"--{name.replace('_', '-')} {value}: give {wanted}")


# What may differ between a run and the run that goes on from its checkpoint: none of these changes the final
# leaves (`threads` and `device` only by rounding; the examples themselves are compared by their digest).
MAY_DIFFER = frozenset(
    {"output", "eval_data", "eval_split", "device", "threads", "save_every", "resume", "data", "split"}
)


def fingerprint(settings: TrainSettings, config: PeftConfig, data: str) -> dict[str, Any]:
    """What has to be equal for a run to go on from a checkpoint, as JSON reads it back.

    `data` is a digest of the encoded examples.
    """
    kept = {k: v for k, v in dataclasses.asdict(settings).items() if k not in MAY_DIFFER}
    return json.loads(json.dumps({**kept, "data": data, "config": config.to_dict()}))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`["lr: 0.1, now 0.2"]` for two fingerprints; fields of the config by dotted names."""
    found: list[str] = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if name == "config" and isinstance(before, dict) and isinstance(now, dict):
            inner = differences(cast("dict[str, Any]", before), cast("dict[str, Any]", now))
            found += [f"config.{line}" for line in inner]
        elif before != now:
            found.append("other training data" if name == "data" else f"{name}: {before}, now {now}")
    return found
