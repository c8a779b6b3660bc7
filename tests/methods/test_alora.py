"""aLoRA: deltas act from the last invocation on, whatever is cached; peft is the oracle where it looks at ids."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import gpt2, llama, t5
from exact import EXACT, Float64, off
from torch import Tensor, nn
from torch.func import grad, vmap

import peftfn as pf

CALL = [7, 8]
OPTIONS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "alora_invocation_tokens": CALL,
    "task_type": "CAUSAL_LM",
}
# Invoked at 2; twice, at 1 and 4; never; at the very end.
IDS = torch.tensor([[1, 2, 7, 8, 3, 4], [1, 7, 8, 2, 7, 8], [1, 7, 2, 8, 3, 4], [1, 2, 3, 4, 7, 8]])
STARTS = [2, 4, 6, 4]


def base(build: Any = llama) -> Any:
    torch.manual_seed(0)
    model = build().double().eval()
    model.generation_config.eos_token_id = None  # a row goes on
    return model


def made(model: nn.Module, seed: int = 1, **options: Any) -> pf.Adapter:
    return oracle.randomised(pf.init(model, pf.LoraConfig(**{**OPTIONS, **options})), seed, 0.3)


def plain(adapter: pf.Adapter) -> pf.Adapter:
    """The same tensors as LoRA, which acts on all tokens."""
    return adapter.replace(config=pf.LoraConfig(**{**OPTIONS, "alora_invocation_tokens": None}))


@pytest.fixture
def exact() -> Any:
    with Float64():
        yield


exactly = pytest.mark.usefixtures("exact")


@oracle.by_new_peft
@exactly
@pytest.mark.parametrize(
    "options", [{}, {"lora_bias": True, "target_modules": ["c_proj"]}], ids=["llama", "gpt2, bias"]
)
def test_outputs_gradients_and_files_are_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    model = base(gpt2 if options else llama)
    adapter = made(model, **options)
    pf.save(adapter, tmp_path / "ours")
    theirs = oracle.loaded(model, tmp_path / "ours", autocast_adapter_dtype=False)
    expected = theirs(input_ids=IDS).logits
    for found in (
        pf.apply(model, adapter, {"input_ids": IDS}),
        pf.apply(model, adapter, IDS),
        pf.bind(model, adapter)(IDS),
    ):
        assert off(found.logits, expected) < EXACT
    assert (
        off(oracle.gradients(model, adapter, {"input_ids": IDS}), oracle.gradients_of(theirs, {"input_ids": IDS}))
        < EXACT
    )
    with oracle.quiet_peft():
        theirs.save_pretrained(tmp_path / "theirs")
    again = pf.load(tmp_path / "theirs", model)
    assert off(again.params, adapter.params) == 0.0
    assert again.config.alora_invocation_tokens == (7, 8)
    offsets = [3, None, 6, 1]
    expected = theirs(input_ids=IDS, alora_offsets=offsets).logits
    assert off(pf.apply(model, adapter, {"input_ids": IDS, "alora_offsets": offsets}).logits, expected) < EXACT


@exactly
def test_before_the_invocation_everything_is_the_bases_bit_for_bit() -> None:
    model = base()
    adapter = made(model)
    found, bare = pf.apply(model, adapter, IDS), pf.apply(model, (), IDS)
    for row, start in enumerate(STARTS):
        assert torch.equal(found.logits[row, :start], bare.logits[row, :start])
        assert start == 6 or off(found.logits[row, start:], bare.logits[row, start:]) > 1e-3
        for ours, theirs in zip(found.past_key_values.layers, bare.past_key_values.layers, strict=True):
            assert torch.equal(ours.keys[row, :, :start], theirs.keys[row, :, :start])
            assert torch.equal(ours.values[row, :, :start], theirs.values[row, :, :start])
            assert start == 6 or not torch.equal(ours.keys[row, :, start:], theirs.keys[row, :, start:])


@exactly
def test_a_cache_that_the_base_filled_is_gone_on_with() -> None:
    model = base()
    adapter, row = made(model), IDS[:1]
    whole = pf.apply(model, adapter, row).logits
    with torch.no_grad():  # torch copies nothing that has a graph
        cache = model(row[:, :2], use_cache=True).past_key_values
        parts = [pf.apply(model, adapter, {"input_ids": row[:, 2:4], "past_key_values": cache}).logits]
    cache = pickle.loads(pickle.dumps(copy.deepcopy(cache)))  # it knows what was seen
    parts += [
        pf.apply(model, adapter, {"input_ids": row[:, n : n + 1], "past_key_values": cache}).logits for n in (4, 5)
    ]
    assert off(torch.cat(parts, 1), whole[:, 2:]) < EXACT


@exactly
def test_an_invocation_may_come_in_two_calls() -> None:
    """What is cached stays the base's, and what follows is adapted; of a cache of the base nobody knows the ids."""
    model = base()
    adapter, row = made(model), IDS[:1]
    first = pf.apply(model, adapter, {"input_ids": row[:, :3], "use_cache": True})
    last = pf.apply(model, adapter, {"input_ids": row[:, 3:], "past_key_values": first.past_key_values}).logits
    rest = {"input_ids": row[:, 3:], "past_key_values": model(row[:, :3], use_cache=True).past_key_values}
    assert off(last, pf.apply(model, plain(adapter), rest).logits) < EXACT
    rest["past_key_values"] = model(row[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="begin with the end of the invocation"):
        pf.apply(model, adapter, rest)


@exactly
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_what_calls_of_the_whole_row_give(beams: int) -> None:
    model = base()
    adapter = made(model)
    bound = pf.bind(model, adapter)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    found = bound.generate(IDS, attention_mask=mask, **settings)
    without = pf.bind(model, adapter).generate(IDS, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(found, without)
    assert not torch.equal(found, model.generate(IDS, attention_mask=mask, **settings))
    if beams == 1:  # peft refuses beams
        rows = found[:, : IDS.shape[1]]
        for _ in range(4):
            rows = torch.cat([rows, pf.apply(model, adapter, rows).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, rows)


@exactly
def test_rows_may_have_other_invocations_or_none() -> None:
    model = base()
    one, other, every = (
        made(model, 1),
        made(model, 2, alora_invocation_tokens=[2]),
        made(model, 3, alora_invocation_tokens=None),
    )
    stacked = pf.stack([one, other, every])
    found = pf.apply(model, stacked, IDS, index=[1, 0, -1, 2]).logits
    alone = [pf.apply(model, each, IDS).logits for each in (other, one, (), every)]
    assert off(found, torch.stack([each[row] for row, each in enumerate(alone)])) < EXACT
    bound = pf.bind(model, stacked, index=[1, 0, -1, 2])
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    rows = bound.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    for number, each in enumerate((other, one, None, every)):
        single = model if each is None else pf.bind(model, each)
        row = single.generate(IDS[number : number + 1], attention_mask=torch.ones(1, 6).long(), **settings)
        assert torch.equal(rows[number], row[0])
    with pytest.raises(ValueError, match="unlike alora_invocation_tokens"):
        vmap(lambda a: pf.apply(model, a, IDS).logits)(stacked)


@exactly
def test_transforms_and_two_adapters() -> None:
    model = base()
    one, other = made(model, 1), made(model, 2)
    stacked = pf.stack([one, other])
    found = vmap(lambda a: pf.apply(model, a, IDS).logits)(stacked)
    assert off(found, torch.stack([pf.apply(model, each, IDS).logits for each in (one, other)])) < EXACT

    def loss(params: Any, adapter: pf.Adapter) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), IDS).logits.square().mean()

    gradients = vmap(grad(loss))(stacked.params, stacked)
    second = {path: {name: t[1] for name, t in leaf.items()} for path, leaf in gradients.items()}
    assert off(second, grad(loss)(other.params, other)) < EXACT
    both = pf.apply(model, (one, plain(other)), IDS).logits
    merged = pf.merge(dict(model.named_parameters()), plain(other))
    assert off(both, pf.apply(model, one, IDS, params=merged).logits) < EXACT


def test_checkpointed_blocks_run_again_for_their_own_call() -> None:
    model = base()
    adapter = made(model)
    expected = oracle.gradients(model, adapter, IDS)
    # Into a reentrant block autograd.grad does not reach.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    assert off(oracle.gradients(model, adapter, IDS), expected) < EXACT
    bound = pf.bind(model, adapter)
    for _ in range(2):
        bound.zero_grad()
        oracle.loss(bound(IDS)).backward()
    found = {f"base_model.model.{name}.weight": one.grad for name, one in bound.named_parameters() if one.requires_grad}
    assert off(found, expected) < EXACT
    first = oracle.loss(bound(IDS))
    oracle.loss(bound(IDS.flip(0)))
    with pytest.raises(RuntimeError, match="was called 2 times since the last backward pass"):
        first.backward()


@exactly
def test_a_bound_module_is_copied_and_pickled() -> None:
    model = base()
    bound = pf.bind(model, made(model))
    expected = bound(IDS).logits
    assert torch.equal(copy.deepcopy(bound)(IDS).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(bound))(IDS).logits, expected)


@exactly
def test_what_has_no_meaning_is_refused() -> None:
    model = base()
    adapter = made(model)
    with pytest.raises(ValueError, match="acts on some tokens alone, and no weight does that"):
        pf.merge(dict(model.named_parameters()), adapter)
    embedded = {"inputs_embeds": model.model.embed_tokens(IDS)}
    with pytest.raises(ValueError, match="looked for in input_ids"):
        pf.apply(model, adapter, embedded)
    with pytest.raises(RuntimeError, match="runs outside of a call of the whole model"):
        pf.bind(model, adapter).model.layers[0].mlp.down_proj(torch.randn(2, 3, 24).double())
    with pytest.raises(ValueError, match="expected 'CAUSAL_LM'"):
        pf.LoraConfig(alora_invocation_tokens=[1], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="expected the ids of at least one token"):
        pf.LoraConfig(alora_invocation_tokens=[-2])
    with pytest.raises(ValueError, match="expected one of them"):
        pf.LoraConfig(alora_invocation_tokens=[1], use_dora=True)
    conv = nn.Sequential(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="this convolution has no output for each token"):
        pf.init(conv, pf.LoraConfig(r=2, target_modules=["0"], alora_invocation_tokens=[1]))
    both, ids = base(t5), {"input_ids": IDS, "decoder_input_ids": IDS}
    adapter = pf.init(both, pf.LoraConfig(target_modules=["q"], alora_invocation_tokens=[1]))
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        pf.apply(both, adapter, ids)
