"""`load_with_model`: an adapter and the base that it names, in one call."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.checkpoints import checkpoint
from peftfn.core import files, reading
from peftfn.core.adapter import Adapter
from peftfn.core.config import PeftConfig

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""transformers' class for each task, as PEFT's AutoPeftModelFor... have them."""

_TOKENIZER = "tokenizer_config.json"
_WORDS = (  # the other files of a tokenizer, each of which some kinds have
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
LABELS = re.compile(r"\.(classifier|score)(\.out_proj)?\.weight$")


def load_with_model(
    folder_or_hub_id: str | Path,
    cls: Any = None,
    *,
    base: str | Path | None = None,
    adapter_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> tuple[Any, Adapter]:
    """The base model that an adapter names, and the adapter: `pf.apply(*pf.load_with_model(folder), batch)`.

    It does what PEFT's `AutoPeftModelFor...` classes do. The adapter's config says which base, in which revision, and
    which of transformers' classes: by its task type (`CLASSES` of this file), or by the class of the model that it was
    made for. The base is what `from_pretrained` returns, unchanged: the adapter is not put into it.

    Two things follow the adapter: a vocabulary that it has grown (an embedding in its file, or a tokenizer beside it),
    and the labels of a head in its file: their number, and their names where `peftfn train` made it. What the base's
    folder lacks is drawn from seed 0, and the global random state is left as it is.

    Args:
        folder_or_hub_id: of the adapter.
        cls: a class with `from_pretrained` to load the base with, in place of the one that the config means.
        base: a folder or hub id to take the base from, in place of the one that the config names.
        adapter_name: an adapter that PEFT saved under a name of its own, in a sub-folder.
        subfolder: where in the folder or repository the adapter's files are.
        revision: of the adapter; that of the base is in the config.
        token: for the hub, for both.
        cache_dir: for the hub, for both.
        **options: for the base's `from_pretrained`: `dtype`, `device_map`, `quantization_config`, ...

    Raises:
        FileNotFoundError: the adapter, or its base, is not there.
        ValueError: the config names no base, or no class that can be used; the base's folder holds an adapter itself;
            or the adapter's files are not whole or do not fit the base, as in `load`.
        KeyError: the adapter lacks sites of the base, or has others, as in `load`.
        TypeError: `cls` has no `from_pretrained`.

    Example:
        >>> import tempfile, torch, transformers, peftfn as pf
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ... )
        >>> base = tempfile.mkdtemp()
        >>> transformers.LlamaForCausalLM(config).save_pretrained(base)
        >>> lora = pf.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        >>> adapter = pf.init(transformers.LlamaForCausalLM.from_pretrained(base), lora)
        >>> model, adapter = pf.load_with_model(pf.save(adapter, tempfile.mkdtemp()))
        >>> pf.apply(model, adapter, torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 8])
    """
    where = "/".join(part for part in (subfolder, adapter_name) if part and part != "default") or None
    origin = reading.settled(reading.Origin(str(folder_or_hub_id), where, revision, token, cache_dir))
    tensors, _, source, config = checkpoint.read(origin, torch.device("cpu"))
    origin = reading.pinned(origin, source)
    name = _base_name(config, base, source)
    loader = cls if cls is not None else _class_of(config, source)
    given = {"token": token, "cache_dir": cache_dir, "revision": config.revision if base is None else None}
    options = {**{key: value for key, value in given.items() if value is not None}, **options}
    with _seeded():
        head = _of_head(config, tensors, options, trained_labels(origin))
        model = _from_pretrained(loader, name, {**head, **options}, source)
        _grow(model, origin, tensors, options)
    adapter = checkpoint.load(
        folder_or_hub_id,
        model,
        adapter_name=adapter_name,
        subfolder=subfolder,
        revision=origin.commit or revision,
        token=token,
        cache_dir=cache_dir,
        device=getattr(model, "device", "cpu"),
    )
    return model, adapter


def _base_name(config: PeftConfig, base: str | Path | None, source: Path) -> str:
    name = str(base) if base is not None else config.base_model_name_or_path
    if not name:
        raise ValueError(
            f"{source.parent} names no base (base_model_name_or_path is empty in its {files.CONFIG}); pass base=..., a "
            "folder or hub id, or load the model yourself: peftfn.load(folder, model)."
        )
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise FileNotFoundError(
            f"the adapter in {source.parent} is for the base {name!r}, which is no folder here; pass base=..., the "
            "folder where it is now, or a hub id."
        )
    return name


def _class_of(config: PeftConfig, source: Path) -> Any:
    import transformers

    if config.task_type is not None:
        return getattr(transformers, CLASSES[config.task_type])
    if config.auto_mapping is None:
        raise ValueError(
            f"{source.parent} has neither a task_type nor an auto_mapping, so nothing says which class loads its base; "
            "pass cls=..., for example cls=transformers.AutoModel."
        )
    return _mapped(config.auto_mapping, source)


def _mapped(mapping: Mapping[str, Any], source: Path) -> Any:
    library, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    # A file must not make code run: only transformers is imported for it, and of the rest what is imported already.
    if library.partition(".")[0] == "transformers":
        try:
            importlib.import_module(library)
        except ImportError:
            library = ""
    found = getattr(sys.modules.get(library), name, None)
    if isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "from_pretrained"):
        return found
    raise ValueError(
        f"{source.parent} is for a {name} of {mapping.get('parent_library')!r} (auto_mapping), which is no class with "
        "from_pretrained that is in transformers or imported here; import its library first, or pass cls=..., or load "
        "the model yourself: peftfn.load(folder, model)."
    )


def _from_pretrained(loader: Any, name: str, options: Mapping[str, Any], source: Path) -> Any:
    if not hasattr(loader, "from_pretrained"):
        raise TypeError(f"cls is {loader!r}; expected a class with from_pretrained, as transformers.AutoModel.")
    try:
        model = loader.from_pretrained(name, **options)
    except OSError as error:
        first = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"the adapter in {source.parent} is for the base {name!r}, which {loader.__name__} could not load "
            f"({first}). Pass base=... if it is elsewhere."
        ) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the folder of the base, {name!r}, holds an adapter too, and transformers has put it into the model; move "
            f"its {files.CONFIG} to a folder of its own."
        )
    return model


def trained_labels(origin: reading.Origin) -> list[str]:
    """The names of the labels by id, from the record that `peftfn train` leaves beside an adapter; none without it."""
    path = reading.try_find(origin, files.RUN)
    found: Any = reading.read_json(path).get("columns") if path is not None else None
    names = cast("dict[str, Any]", found).get("labels") if isinstance(found, dict) else None
    return [str(name) for name in cast("list[Any]", names)] if isinstance(names, list) else []


def _of_head(
    config: PeftConfig, tensors: Mapping[str, Tensor], options: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Options of `from_pretrained` by which the base gets a head with the labels of the one in the adapter's file."""
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS") or {"num_labels", "id2label", "config"} & options.keys():
        return {}
    labels = {tensor.shape[0] for key, tensor in tensors.items() if LABELS.search(key)}
    if len(labels) != 1:
        return {}
    count = labels.pop()
    named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return {**(named if len(names) == count else {"num_labels": count}), "ignore_mismatched_sizes": True}


def _grow(model: Any, origin: reading.Origin, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Give the fresh model the vocabulary of the adapter: of its saved embedding, or a larger one of its tokenizer."""
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if not isinstance(embedding, nn.Embedding):
        return
    path = next(path for path, module in model.named_modules() if module is embedding)
    endings = (f".{path}.weight", f".{path}.base_layer.weight")
    saved = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(endings)}
    own = embedding.weight.shape[0]
    size = saved.pop() if saved else max(own, _words(origin, options))
    if size != own:
        model.resize_token_embeddings(size)


def _words(origin: reading.Origin, options: Mapping[str, Any]) -> int:
    """The size of the tokenizer that was saved with the adapter, or in the folder above it; 0 without one."""
    from transformers import AutoTokenizer

    for place in dict.fromkeys((origin, origin._replace(subfolder=None))):
        found = reading.try_find(place, _TOKENIZER)
        if found is not None:
            for name in _WORDS:
                reading.try_find(place, name)
            # By its folder: of a repository without a config.json, AutoTokenizer finds no class.
            loader: Any = AutoTokenizer
            return len(loader.from_pretrained(found.parent, trust_remote_code=options.get("trust_remote_code")))
    return 0


@contextmanager
def _seeded() -> Generator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
