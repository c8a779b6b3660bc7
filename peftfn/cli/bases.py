"""The base model and its tokenizer, straight from `from_pretrained`, and its train or eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from peftfn.cli.data.tasks import TASKS
from peftfn.cli.errors import UserError, sentence
from peftfn.cli.settings import DataSettings


class Base(NamedTuple):
    """A loaded base model.

    Attributes:
        model: the transformers model, on its device.
        tokenizer: its tokenizer.
        pad: the id that fills up short rows (the attention mask hides it).
        longest: the most tokens that the model has positions for.
        new: modules whose weights the folder does not have, so that they were drawn at random: a new head.
    """

    model: Any
    tokenizer: Any
    pad: int
    longest: int
    new: list[str]


def device_of(name: str) -> torch.device:
    """The device that `name` means; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({sentence(error)}); try cpu") from None
    return device


def quiet() -> None:
    """Keep transformers' bars and reports off the terminal: what matters of them is said in our own words."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def from_pretrained(kind: str, name: str, **options: Any) -> Any:
    """What transformers' class `kind` loads from a folder or hub id, or a `UserError` that says why it cannot."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name} has no config.json; give the folder of a transformers model")
    loader: Any = getattr(transformers, kind)
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{kind} could not load --model {name}: {sentence(error)}") from error


def in_base_order(name: str, revision: str | None, labels: Sequence[str]) -> list[str]:
    """The base's own label names where it knows all of `labels` (a trained classifier), else `labels`."""
    config = from_pretrained("AutoConfig", name, revision=revision)
    own = [str(config.id2label[i]) for i in sorted(config.id2label)] if config.id2label else []
    return own if labels and set(labels) <= set(own) else list(labels)


def load_model(
    name: str,
    kind: str,
    labels: Sequence[str] = (),
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device | None = None,
    seed: int = 0,
    pad: int | None = None,
) -> tuple[Any, list[str]]:
    """The model as transformers' class `kind` loads it, on `device`, and the modules of it that the folder lacks.

    Where `labels` are given it has a head for them: its own if that fits, else a new one, drawn from `seed`.
    """
    extra: dict[str, Any] = {}
    if labels:
        extra = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,  # a head for other labels is replaced by a new one
        }
    if labels and pad is not None:
        extra["pad_token_id"] = pad  # decoder models find a row's last token by it
    torch.manual_seed(seed)
    model, info = from_pretrained(kind, name, revision=revision, dtype=dtype, output_loading_info=True, **extra)
    return model.to(device or torch.device("cpu")), _new_modules(info)


def load_base(settings: DataSettings, task: str, labels: Sequence[str], revision: str | None = None) -> Base:
    """The base of a run for `task`, with its tokenizer; for a language model, checked to be one."""
    quiet()
    name = settings.model
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = device_of(settings.device)
    tokenizer = from_pretrained("AutoTokenizer", name, revision=revision)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    model, new = load_model(
        name,
        TASKS[task].auto_class,
        labels,
        revision=revision,
        dtype=settings.dtype,
        device=device,
        seed=settings.seed,
        pad=pad,
    )
    # a tokenizer that knows no limit says 1e30; RoBERTa's has two positions less than its config
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    base = Base(model, tokenizer, pad, int(min(positions, tokenizer.model_max_length)), new)
    if task == "causal_lm":
        refuse_seeing_ahead(base, name)
    return base


def refuse_seeing_ahead(base: Base, name: str) -> None:
    """Raise where an earlier token's logits depend on a later one: an encoder cannot be a language model."""
    rows = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 1]], device=base.model.device)
    with torch.no_grad(), mode(base.model, training=False):
        first, second = (base.model(input_ids=row[None]).logits[0, 0].float() for row in rows)
    if not torch.allclose(first, second, atol=1e-4, rtol=1e-4):
        raise UserError(
            f"--model {name} ({type(base.model).__name__}) sees the tokens that come after, so it cannot predict them; "
            "give a causal language model, or a label column for --task seq_cls"
        )


def _new_modules(info: dict[str, Any]) -> list[str]:
    missing = [key if isinstance(key, str) else key[0] for key in (*info["missing_keys"], *info["mismatched_keys"])]
    modules = {key.rpartition(".")[0] for key in missing}
    return sorted(one for one in modules if not any(one.startswith(other + ".") for other in modules))


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Generator[None]:
    """Put the model into train or eval mode, and each module back to its own flag at the end."""
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
