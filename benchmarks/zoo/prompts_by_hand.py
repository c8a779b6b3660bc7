"""Prompts and prefixes without peftfn: a vocabulary with the prompt's rows at its end, and a cache filled by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import peftfn as pf
from zoo.batches import signature
from zoo.case import Case, called, output_of
from zoo.checks_generate import decoded, found
from zoo.verdicts import RIGHT, NotApplicable, judged

TOKENS_BEFORE = 2


class Enlarged(nn.Module):
    """An embedding with more rows: numbers past its vocabulary are those of the prompt."""

    def __init__(self, base: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.base, self.size = base, base.weight.shape[0]
        self.rows = nn.Parameter(rows.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The vocabulary's own, as models look at its shape and dtype."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """The embedded tokens, each from the vocabulary or from the prompt."""
        inside = ids < self.size
        found = self.base(torch.where(inside, ids, 0))
        own = self.rows[(ids - self.size).clamp(0, len(self.rows) - 1)].to(found.dtype)
        return torch.where(inside[..., None], found, own)


@contextlib.contextmanager
def reference() -> Any:
    """Where the bare model is asked: what it raises there says nothing of peftfn."""
    try:
        yield
    except NotApplicable:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:150]}".replace("\n", " ")
        raise NotApplicable(f"the bare model cannot do it: {said}") from error


def tensors_of(adapter: pf.Adapter) -> Tensor:
    """The virtual tokens, or keys and values, that the adapter trains."""
    (rows,) = [leaf["prompt_embeddings"] for leaf in adapter.params.values() if "prompt_embeddings" in leaf]
    return rows[: adapter.config.num_virtual_tokens]


def prompted(case: Case, adapter: pf.Adapter) -> Any:
    """A copy of the model whose vocabulary goes on with the prompt; a head trained beside it is put in."""
    if case.entry.family == "classification" and case.model.config.is_encoder_decoder:
        raise NotApplicable("a classifier of an encoder and a decoder makes the decoder's tokens from the prompt's too")
    made = copy.deepcopy(case.model)
    for path, leaf in adapter.params.items():
        for name, tensor in leaf.items():
            if name != "prompt_embeddings":
                setattr(made.get_submodule(path), name, nn.Parameter(tensor.detach().clone()))
    made.set_input_embeddings(Enlarged(made.get_input_embeddings(), tensors_of(adapter)))
    if not isinstance(made.get_input_embeddings(), Enlarged):
        raise NotApplicable("its embedding cannot be replaced by hand")
    return made


def rows_of(made: Any) -> Tensor:
    return made.get_input_embeddings().rows


def longer(case: Case, batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The batch with the prompt's numbers before each row."""
    size = case.model.get_input_embeddings().weight.shape[0]
    ids = batch["input_ids"]
    front = torch.arange(size, size + tokens).expand(ids.shape[0], -1)
    changed = dict(batch) | {"input_ids": torch.cat([front, ids], 1)}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in batch:
            changed[name] = torch.cat([torch.full_like(front, fill), batch[name]], 1)
    if "bbox" in batch:
        changed["bbox"] = torch.cat([batch["bbox"].new_zeros(*front.shape, 4), batch["bbox"]], 1)
    return changed


def run(model: Any, batch: Mapping[str, Any], adapter: pf.Adapter | None = None) -> Any:
    torch.manual_seed(0)
    output = model(**batch) if adapter is None else pf.apply(model, adapter, batch)
    return {"logits": output.logits if hasattr(output, "logits") else output[0]}


def text_part(case: Case, output: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The logits of the batch's own tokens, whatever stands before them; those of a classifier as they are."""
    logits = output["logits"] if "logits" in output else next(iter(output.values()))
    if case.entry.family == "classification" or logits.ndim < 3:
        return {"logits": logits}
    ids = case.batch.get("decoder_input_ids", case.batch["input_ids"])
    return {"logits": logits[:, -ids.shape[1] :]}


def prompted_row(case: Case, adapter: pf.Adapter, row: Mapping[str, Any]) -> dict[str, Tensor]:
    tokens = adapter.config.num_virtual_tokens
    return text_part(case, called(prompted(case, adapter), longer(case, row, tokens)))


def ignores_masked(case: Case) -> bool:
    """Whether the bare model's output for a row is the same with masked tokens before it, as padding on the left."""
    row = case.rows(1)
    padded = longer(case, row, TOKENS_BEFORE)
    ids = padded["input_ids"].clone()
    ids[:, :TOKENS_BEFORE] = 0
    if "attention_mask" not in row:
        return False
    mask = padded["attention_mask"].clone()
    mask[:, :TOKENS_BEFORE] = 0
    with reference():
        got = text_part(case, called(case.model, padded | {"input_ids": ids, "attention_mask": mask}))
        want = text_part(case, called(case.model, row))
    return judged(got, want, None, case.exact).verdict == RIGHT


def takes_keys(model: Any) -> bool:
    """Whether the model, or what is in it, takes a cache that has layers of keys and values."""
    parts = [model, model.base_model, *([model.get_decoder()] if hasattr(model, "get_decoder") else [])]
    if not any({"cache", "past_key_values"} & signature(part) for part in parts if part is not None):
        return False
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return not layers or any(hasattr(layer, "keys") for layer in layers)


def _cache(case: Case, adapter: pf.Adapter, rows: int) -> tuple[str, Any]:
    """The name of the argument, and a new cache with the prefix alone in it."""
    names = signature(case.model)
    name = next((one for one in ("cache", "past_key_values") if one in names), None)
    if name is None:
        raise NotApplicable("it takes no cache")
    config = adapter.config
    values = tensors_of(adapter)  # (n, 2 * layers * width)
    shape = (config.num_virtual_tokens, config.num_layers * 2, config.num_attention_heads, -1)
    layers = values.reshape(shape).permute(1, 2, 0, 3)  # (2 * layers, heads, n, head)
    cache = DynamicCache(config=case.model.config)
    step = config.num_transformer_submodules or 1  # with two of them, PEFT gives layer i the pair 2i of the doubled row
    for layer in range(config.num_layers):
        pair = 2 * ((step * layer) % config.num_layers)
        key, value = (layers[pair + i].expand(rows, -1, -1, -1).contiguous() for i in range(2))
        cache.update(key, value, layer)
    return name, EncoderDecoderCache(
        cache, DynamicCache(config=case.model.config)
    ) if case.model.config.is_encoder_decoder else cache


def prefixed(case: Case, adapter: pf.Adapter, batch: Mapping[str, Any]) -> Any:
    """The model's output with a cache that has the prefix in it."""
    if case.entry.family == "classification" and any(
        name != "prompt_embeddings" for leaf in adapter.params.values() for name in leaf
    ):
        model = copy.deepcopy(case.model)
        for path, leaf in adapter.params.items():
            for name, tensor in leaf.items():
                if name != "prompt_embeddings":
                    setattr(model.get_submodule(path), name, nn.Parameter(tensor.detach().clone()))
    else:
        model = case.model
    rows = batch["input_ids"].shape[0]
    with reference():
        name, cache = _cache(case, adapter, rows)
        given = dict(batch) | {name: cache}
        if not case.model.config.is_encoder_decoder and "attention_mask" in given:
            front = given["attention_mask"].new_ones(rows, adapter.config.num_virtual_tokens)
            given["attention_mask"] = torch.cat([front, given["attention_mask"]], 1)
        return model(**given)


def prefixed_row(case: Case, adapter: pf.Adapter, row: Mapping[str, Any]) -> dict[str, Tensor]:
    return text_part(case, output_of(lambda: prefixed(case, adapter, row)))


def greedy(case: Case, adapter: pf.Adapter, batch: Mapping[str, Any], new: int = 5) -> dict[str, Tensor]:
    """Tokens and scores, each step computed from the start."""
    return _from_start(case, batch, new, lambda given: output_of(lambda: prefixed(case, adapter, given)))


def decodes_as_it_reads(case: Case, batch: Mapping[str, Any], new: int = 5) -> bool:
    """Whether the bare model generates what it says of the whole text at each step.

    Some do not: of RoBERTa `generate` counts positions otherwise, Moshi forgets what is out of its cache's window.
    """
    with reference():
        want = _from_start(case, batch, new, lambda given: called(case.model, given))
        return judged(decoded(case.model, batch), want, None, case.exact).verdict == RIGHT


def continued(case: Case, adapter: pf.Adapter, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tokens and scores of the bare model's own `generate`, which is given a cache that has the prefix in it."""
    with reference():
        name, cache = _cache(case, adapter, batch["input_ids"].shape[0])
        tokens = adapter.config.num_virtual_tokens
        before = {key: value for key, value in longer(case, batch, tokens).items() if key in batch}
        before["input_ids"][:, :tokens] = 0
        return decoded(case.model, before | {name: cache})


def _from_start(case: Case, batch: Mapping[str, Any], new: int, run: Callable[[dict[str, Any]], Any]) -> Any:
    """Tokens and scores, each step computed from the start."""
    encodes = case.model.config.is_encoder_decoder
    rows = batch["input_ids"].shape[0]
    told = case.model.generation_config
    start = told.bos_token_id if told.decoder_start_token_id is None else told.decoder_start_token_id
    tokens = torch.full((rows, 1), start) if encodes else batch["input_ids"]
    scores = []
    for _ in range(new):
        grown = {"decoder_input_ids": tokens} if encodes else _grown(batch, tokens)
        scores.append(run(dict(batch) | grown)["logits"][:, -1].float())
        tokens = torch.cat([tokens, scores[-1].argmax(-1, keepdim=True)], 1)
    return found(torch.stack(scores, 1), tokens[:, -new:])


def _grown(batch: Mapping[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    more = tokens.shape[1] - batch["input_ids"].shape[1]
    grown = {"input_ids": tokens}
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in batch:
            grown[name] = torch.cat([batch[name], batch[name].new_full((len(tokens), more), fill)], 1)
    return grown
