"""Prompts, prefixes and LLaMA-Adapters by row: unlike ones in one batch compute what each computes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import decoding
import exact
import oracle
import pytest
import torch
import transformers
from oracle import distance
from prompts import CASES, Case, output
from same import assert_same
from test_generate import GENERATING, GREEDY, LEFT
from torch import Tensor
from torch.func import grad, vmap

import peftfn as pf

# The same sums in another order, in float64, relative to the largest value.
ROUNDING = 1e-10
INDEX = (2, -1, 0, 1)


@pytest.fixture
def in_float64() -> Iterator[None]:
    with exact.Float64():
        yield


every_case = pytest.mark.parametrize("case", CASES, ids=str)


def unlike(case: Case, model: Any, size: float = 0.1) -> list[pf.Adapter]:
    """Three adapters of 3, 1 and 5 tokens."""
    config = case.config(pf)
    field = "adapter_len" if case.method == "adaption prompt" else "num_virtual_tokens"
    configs = [dataclasses.replace(config, **{field: count}) for count in (3, 1, 5)]
    made = [pf.init(model, config, torch.Generator().manual_seed(n)) for n, config in enumerate(configs)]
    return [oracle.randomised(adapter, n, size=size) for n, adapter in enumerate(made)]


def batch_of(case: Case, padding: str) -> dict[str, Tensor]:
    """Four rows of seven tokens, the second and third of them padded."""
    mask = torch.ones(4, 7, dtype=torch.long)
    for row, count in ((1, 2), (2, 3)):
        mask[row, slice(count) if padding == "left" else slice(7 - count, 7)] = 0
    batch = {"input_ids": torch.randint(1, 38, (4, 7)), "attention_mask": mask}
    if padding == "none":
        del batch["attention_mask"]
    return batch | ({"decoder_input_ids": torch.randint(1, 38, (4, 5))} if case.base == "t5" else {})


def result(model: Any, adapter: Any, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    found = pf.apply(model, adapter, batch, **kwargs)
    return found.start_logits if "start_logits" in found else output(found)


def of_text(case: Case, found: Tensor, batch: dict[str, Tensor], row: int, before: int) -> Tensor:
    """What one row gives at its real tokens, which come after `before` others."""
    if case.base == "t5" or found.shape[0] < 7:  # a decoder's tokens, or one label for the row
        return found
    mask = batch.get("attention_mask", torch.ones(4, 7))
    return found[before:][: mask.shape[1]][mask[row] == 1]


@every_case
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.usefixtures("in_float64")
def test_each_row_computes_what_its_own_prompt_computes_alone(case: Case, padding: str) -> None:
    model, batch = exact.in_float64(case.model()).eval(), batch_of(case, padding)
    adapters = unlike(case, model)
    together = result(model, pf.stack(adapters), batch, index=INDEX)
    for row, number in enumerate(INDEX):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        alone = result(model, adapters[number] if number >= 0 else (), one)[0]
        own = alone.shape[0] - 7
        places = own if case.base.startswith("bert") else together.shape[1] - 7
        found = of_text(case, together[row], batch, row, places)
        assert distance(found, of_text(case, alone, batch, row, own)) < ROUNDING


@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")  # of transformers 4, whose BERTs call torch's own
# Bloom's activation is an autograd.Function that torch.func cannot go through.
@pytest.mark.parametrize("case", [case for case in CASES if case.base != "bloom"], ids=str)
@pytest.mark.usefixtures("in_float64")
def test_a_stack_of_unlike_lengths_comes_apart_and_maps(case: Case) -> None:
    if oracle.IS_OLD and case.base.startswith("bert") and "prefix" in case.method:
        pytest.skip("BERT of transformers 4 adds mapped positions in place, which torch.vmap cannot")
    model, batch = exact.in_float64(case.model()).eval(), batch_of(case, "none")
    adapters = unlike(case, model)
    stacked = pf.stack(adapters)
    for one, other in zip(pf.unstack(stacked), adapters, strict=True):
        assert one.config == other.config
        assert_same(one, other)
    mapped = vmap(lambda adapter: result(model, adapter, batch))(stacked)
    for adapter, found in zip(adapters, mapped, strict=True):
        alone = result(model, adapter, batch)
        shift = found.shape[1] - alone.shape[1] if found.dim() > 2 and not case.base.startswith("bert") else 0
        same = found[:, shift:][:, : alone.shape[1]] if alone.dim() > 1 else found
        assert distance(same, alone) < ROUNDING


TRAINED = [case for case in CASES if case.base in ("gpt2", "t5", "bert")]


@pytest.mark.parametrize("case", TRAINED, ids=str)
@pytest.mark.usefixtures("in_float64")
def test_gradients_by_row_are_those_of_each_adapter_on_its_rows(case: Case) -> None:
    model, batch = exact.in_float64(case.model()).eval(), batch_of(case, "right")
    adapters = unlike(case, model)
    stacked = pf.stack(adapters)
    mask = batch["attention_mask"]

    def loss(adapter: pf.Adapter, batch: dict[str, Tensor], mask: Tensor, **kwargs: Any) -> Tensor:
        found = result(model, adapter, batch, **kwargs).sin()
        if case.base == "gpt2":
            found = found[:, -7:] * mask[:, :, None]
        return found.sum()

    together = grad(lambda p: loss(stacked.replace(params=p), batch, mask, index=[2, 0, 0, 1]))(stacked.params)
    together = pf.unstack(stacked.replace(params=together))
    for number, rows in ((0, [1, 2]), (1, [3]), (2, [0])):
        own = {name: tensor[rows] for name, tensor in batch.items()}
        adapter = adapters[number]
        alone = grad(lambda p: loss(adapter.replace(params=p), own, mask[rows]))(adapter.params)  # noqa: B023  # called at once
        for path, leaf in alone.items():
            for name, expected in leaf.items():
                assert distance(together[number].params[path][name], expected) < 10 * ROUNDING, f"{path}.{name}"


GREEDILY: dict[str, Any] = {**GREEDY, "max_new_tokens": 5}


@pytest.mark.parametrize("case", GENERATING, ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_those_of_each_row_alone(case: Case, beams: int) -> None:
    model = case.model(writes=True).eval()
    adapters = unlike(case, model, size=1.0)
    rows, index = torch.cat([LEFT, LEFT[:1]]), [1, -1, 2, 0]
    mask = (rows != 0).long()
    bound = pf.bind(model, pf.stack(adapters), index=index)
    together = bound.generate(input_ids=rows, attention_mask=mask, num_beams=beams, **GREEDILY)
    for row, number in enumerate(index):
        alone: Any = pf.bind(model, adapters[number]) if number >= 0 else model
        one = {"input_ids": rows[row : row + 1], "attention_mask": mask[row : row + 1]}
        expected = alone.generate(**one, num_beams=beams, **GREEDILY)[0]
        assert together[row, : len(expected)].equal(expected)
        assert (together[row, len(expected) :] == (39 if beams > 1 else 0)).all(), "what fills a row that has ended"


def families() -> dict[str, Any]:
    """Models that count positions in other ways than those of `prompts`, or classify by a row's last token."""
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide: dict[str, Any] = {**sizes, "intermediate_size": 24, "initializer_range": 0.3}
    opt = transformers.OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, init_std=0.3, dropout=0.0)
    return {
        "opt": (transformers.OPTForCausalLM(opt), "CAUSAL_LM"),
        "roberta": (transformers.RobertaModel(transformers.RobertaConfig(**wide)), "FEATURE_EXTRACTION"),
        "roberta decoder": (
            transformers.RobertaForCausalLM(transformers.RobertaConfig(**wide, is_decoder=True)),
            "CAUSAL_LM",
        ),
        "llama labels": (
            transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**wide, pad_token_id=0)),
            "SEQ_CLS",
        ),
        "gpt2 tokens": (
            transformers.GPT2ForTokenClassification(
                transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, initializer_range=0.3)
            ),
            "TOKEN_CLS",
        ),
    }


@pytest.mark.filterwarnings("ignore:.*not detect padding tokens.*")
@pytest.mark.parametrize("name", ["opt", "roberta", "roberta decoder", "llama labels", "gpt2 tokens"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.usefixtures("in_float64")
def test_other_families_give_each_row_what_it_gives_alone(name: str, kind: str, padding: str) -> None:
    if oracle.IS_TRANSFORMERS_4 and name == "roberta decoder":
        pytest.skip("transformers 4 fills its masks, in float32, with the lowest number of float64")
    model, task = families()[name]
    exact.in_float64(model.eval())
    make = {"prompt": pf.PromptTuningConfig, "prefix": pf.PrefixTuningConfig}[kind]
    index = (1, -1, 0, 1)
    adapters = [
        oracle.randomised(pf.init(model, make(num_virtual_tokens=count, task_type=task)), count, size=0.5)
        for count in (2, 3)
    ]
    batch = batch_of(Case("bert" if name == "roberta" else "gpt2", kind), padding)
    together = result(model, pf.stack(adapters), batch, index=index)
    for row, number in enumerate(index):
        one = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        alone = result(model, adapters[number] if number >= 0 else (), one)[0]
        found, own = together[row], alone.shape[0] - 7
        if alone.dim() > 1:
            mask = batch.get("attention_mask", torch.ones(4, 7))[row] == 1
            found = found[own if name == "roberta" else found.shape[0] - 7 :][:7][mask]
            alone = alone[own:][mask]
        assert distance(found, alone) < ROUNDING


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.usefixtures("in_float64")
def test_a_prompt_of_each_row_goes_with_a_prefix_of_all(padding: str) -> None:
    case = Case("gpt2", "prefix")
    model, batch = exact.in_float64(case.model()).eval(), batch_of(case, padding)
    prefix = oracle.randomised(pf.init(model, case.config(pf)))
    prompts = unlike(Case("gpt2", "prompt tuning"), model)
    together = result(model, (pf.stack(prompts), prefix), batch, index=INDEX)
    for row, number in enumerate(INDEX):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        alone = result(model, (prompts[number], prefix) if number >= 0 else prefix, one)[0]
        mask = batch.get("attention_mask", torch.ones(4, 7))[row] == 1
        assert distance(together[row][-7:][mask], alone[-7:][mask]) < ROUNDING


@pytest.mark.parametrize("method", ["prompt tuning", "prefix", "adaption prompt"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.usefixtures("in_float64")
def test_the_loss_of_a_batch_is_that_of_its_rows(method: str, padding: str) -> None:
    case = Case("gpt2", method)
    model, batch = exact.in_float64(case.model()).eval(), batch_of(case, padding)
    mask = batch.get("attention_mask", torch.ones(4, 7))
    batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
    adapters = unlike(case, model)
    together = pf.apply(model, pf.stack(adapters), batch, index=INDEX).loss
    losses, terms = 0.0, 0
    for row, number in enumerate(INDEX):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        # behind a prompt or padding the first token is predicted, too
        shifted = method == "prompt tuning" and number >= 0
        count = int((one["labels"] != -100).sum()) - int(not shifted and one["labels"][0, 0] != -100)
        losses += float(pf.apply(model, adapters[number] if number >= 0 else (), one).loss) * count
        terms += count
    assert float(together) == pytest.approx(losses / terms, rel=2 * ROUNDING)


@pytest.mark.parametrize("method", ["prompt tuning", "prefix"])
@pytest.mark.usefixtures("in_float64")
def test_a_cache_goes_on_without_a_mask(method: str) -> None:
    case = Case("gpt2", method)
    model, batch = exact.in_float64(case.model()).eval(), batch_of(case, "none")
    adapters = unlike(case, model)
    whole = result(model, pf.stack(adapters), batch, index=INDEX)
    ids = batch["input_ids"]
    first = pf.apply(model, pf.stack(adapters), {"input_ids": ids[:, :4], "use_cache": True}, index=INDEX)
    name = decoding.cache_name(type(model))
    later = {"input_ids": ids[:, 4:], name: first[name]}
    assert distance(result(model, pf.stack(adapters), later, index=INDEX), whole[:, -3:]) < ROUNDING


@pytest.mark.parametrize("rows", [[0, 1, 0], [1, -1, 0]])
@pytest.mark.usefixtures("in_float64")
def test_heads_of_a_bound_stack_are_each_rows_own(rows: list[int]) -> None:
    case = Case("bert", "prompt tuning")
    model, batch = exact.in_float64(case.model()).eval(), case.batch()
    adapters = unlike(case, model)[:2]
    bound = pf.bind(model, pf.stack(adapters), index=rows)
    expected = pf.apply(model, pf.stack(adapters), batch, index=rows)
    assert distance(bound(**batch).logits, expected.logits) < ROUNDING
    for one, other in zip(pf.unstack(pf.unbind(bound)), adapters, strict=True):
        assert_same(one, other)
    trained = {name for name, parameter in bound.named_parameters() if parameter.requires_grad}
    assert trained == {"prompt_embeddings", "classifier.stacked_weight", "classifier.stacked_bias"}
    with pytest.raises(TypeError, match=r"a module bound to a stack: it has no one set of weights"):
        bound.save_pretrained("nowhere")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_lora_generates_for_each_row_what_it_generates_alone(name: str, beams: int) -> None:
    model: Any = Case(name, "prefix").model(writes=True).eval()
    configs = [
        pf.LoraConfig(r=rank, target_modules=targets) for rank, targets in ((2, "all-linear"), (3, "all-linear"))
    ]
    adapters = [oracle.randomised(pf.init(model, config), n, size=0.5) for n, config in enumerate(configs)]
    mask, index = (LEFT != 0).long(), [1, -1, 0]
    bound = pf.bind(model, pf.stack(adapters), index=index)
    together = bound.generate(input_ids=LEFT, attention_mask=mask, num_beams=beams, **GREEDILY)
    assert len({tuple(row.tolist()) for row in together}) == 3
    for row, number in enumerate(index):
        alone: Any = pf.bind(model, adapters[number]) if number >= 0 else model
        one = {"input_ids": LEFT[row : row + 1], "attention_mask": mask[row : row + 1]}
        expected = alone.generate(**one, num_beams=beams, **GREEDILY)[0]
        assert together[row, : len(expected)].equal(expected)
