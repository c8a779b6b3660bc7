"""Trainable tokens against peft: alone and beside LoRA, with and without a tied output layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import Tied, gpt2, llama, tokens
from compiled import one_graph
from exact import EXACT, Float64, off
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

IDS = [3, 17, 5]


def tied_llama() -> nn.Module:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=True))


def made(model: nn.Module, options: dict[str, Any], seed: int = 0) -> pf.Adapter:
    return oracle.randomised(pf.init(model, oracle.config_of(pf, options)), seed)


ALONE: dict[str, Any] = {"kind": "TrainableTokensConfig", "token_indices": IDS}
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "alone": (llama, ALONE),
    "alone, tied": (tied_llama, ALONE),
    "alone, tied Conv1D model": (gpt2, ALONE),
    "alone, both ends named": (tied_llama, {**ALONE, "target_modules": ["embed_tokens", "lm_head"]}),
    "alone, the output layer": (llama, {**ALONE, "target_modules": ["lm_head"]}),
    "beside LoRA": (llama, {**LORA, "trainable_token_indices": IDS}),
    "beside LoRA, tied": (tied_llama, {**LORA, "trainable_token_indices": IDS}),
    "beside LoRA, by name": (llama, {**LORA, "trainable_token_indices": {"embed_tokens": [1], "lm_head": IDS}}),
    "beside LoRA, tied and unlike": (
        tied_llama,
        {**LORA, "trainable_token_indices": {"embed_tokens": [1], "lm_head": IDS}},
    ),
    "beside DoRA and a saved norm": (
        llama,
        {**LORA, "use_dora": True, "modules_to_save": ["norm"], "trainable_token_indices": IDS},
    ),
}


@oracle.by_new_peft
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_outputs_gradients_merges_and_files_are_pefts(case: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, options = case
    model, ids = build().double().eval(), tokens()()
    adapter = made(model, options)
    pf.save(adapter, tmp_path / "ours")
    theirs = oracle.loaded(model, tmp_path / "ours", autocast_adapter_dtype=False)
    before = snapshot(model)
    with Float64():
        expected = theirs(input_ids=ids).logits
        assert off(pf.apply(model, adapter, ids).logits, expected) < EXACT
        assert (expected - model(ids).logits).abs().max() > 1e-2
        assert off(pf.bind(model, adapter)(ids).logits, expected) < EXACT
        ours, named = oracle.gradients(model, adapter, ids), oracle.gradients_of(theirs, ids)
        assert off(ours, named) < EXACT
        for given in (dict(model.named_parameters(remove_duplicate=False)), model.state_dict()):
            merged = pf.merge(given, adapter, model=model)
            assert off(functional_call(model, merged, (ids,), tie_weights=False).logits, expected) < EXACT
        if case is CASES["beside LoRA, tied and unlike"]:
            with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' otherwise than 'lm_head\.weight'"):
                pf.merge(model.state_dict(), adapter)
        elif adapter.sites:
            merged = pf.merge(model.state_dict(), adapter)
            assert off(functional_call(model, merged, (ids,), tie_weights=False).logits, expected) < EXACT
        with oracle.quiet_peft():
            theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        for again in (pf.load(tmp_path / "theirs", model), pf.load(tmp_path / "theirs"), pf.load(tmp_path / "ours")):
            assert off((again.params, again.buffers), (adapter.params, adapter.buffers)) == 0.0
            assert off(pf.apply(model, again, ids).logits, expected) < EXACT
    assert again.config == adapter.config
    assert snapshot(model) == before


def test_a_fresh_adapter_has_the_bases_own_rows() -> None:
    model, ids = tied_llama().eval(), tokens()()
    adapter = pf.init(model, pf.TrainableTokensConfig(token_indices=IDS))
    rows = adapter.params["model.embed_tokens"]["trainable_tokens_delta"]
    assert torch.equal(rows, model.model.embed_tokens.weight[IDS])
    assert torch.equal(pf.apply(model, adapter, ids).logits, model(ids).logits)
    other = pf.init(model, pf.TrainableTokensConfig(token_indices=IDS, init_weights=False))
    assert not torch.equal(pf.apply(model, other, ids).logits, model(ids).logits)
    with torch.device("meta"):
        empty = tied_llama()
    with pytest.raises(ValueError, match=r"tokens begin as the base's own, and the model is on the meta device"):
        pf.init(empty, pf.TrainableTokensConfig(token_indices=IDS))


class Scaled(nn.Embedding):
    """An embedding whose forward does more, as Gemma's."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        """Three times the rows."""
        return 3 * super().forward(input)


@pytest.mark.parametrize(
    "table",
    [
        lambda: nn.Embedding(20, 6),
        lambda: nn.Embedding(20, 6, padding_idx=3),
        lambda: nn.Embedding(20, 6, padding_idx=4, max_norm=0.9),
        lambda: nn.Embedding(20, 6, scale_grad_by_freq=True),
        lambda: Scaled(20, 6),
    ],
)
def test_every_embedding_is_the_one_with_the_rows_in_its_weight(table: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(table(), nn.Linear(6, 3)).double(), torch.randint(0, 20, (4, 9))
    adapter = made(model, {**ALONE, "target_modules": ["0"]})
    rows = adapter.params["0"]["trainable_tokens_delta"].clone().requires_grad_()
    found = pf.apply(model, adapter.replace(params={"0": {"trainable_tokens_delta": rows}}), ids)
    own = rows.detach().clone().requires_grad_()
    weight = model[0].weight.detach().index_copy(0, torch.tensor(IDS), own)
    layer = model[0]
    looked_up = nn.functional.embedding(ids, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq) * (
        3 if isinstance(layer, Scaled) else 1
    )
    if layer.max_norm is not None:
        norms = looked_up.norm(dim=-1, keepdim=True)
        looked_up = looked_up * torch.where(norms > layer.max_norm, layer.max_norm / (norms + 1e-7), 1.0)
    expected = model[1](looked_up)
    assert off(found, expected) < EXACT
    found.square().mean().backward()
    expected.square().mean().backward()
    assert off(rows.grad, own.grad) < EXACT


def test_stacks_of_unlike_tokens_routes_and_transforms_are_calls_one_by_one() -> None:
    torch.manual_seed(0)
    model, ids = Tied().double(), tokens()()
    configs = [{**ALONE, "target_modules": ["emb"], "token_indices": some} for some in (IDS, [17, 2], [8])]
    adapters = [made(model, config, seed) for seed, config in enumerate(configs)]
    alone = [pf.apply(model, each, ids) for each in adapters]
    assert all(off(one, model(ids)) > 1e-3 for one in alone)
    stacked = pf.stack(adapters)
    assert off(vmap(lambda a: pf.apply(model, a, ids))(stacked), torch.stack(alone)) < EXACT
    routed = pf.apply(model, stacked, ids, index=[1, 0, -1, 2])
    assert off(routed, torch.stack([alone[1][0], alone[0][1], model(ids)[2], alone[2][3]])) < EXACT
    assert off([each.params for each in pf.unstack(stacked)], [each.params for each in adapters]) == 0.0

    def loss(params: Any, adapter: pf.Adapter) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), ids).square().mean()

    gradients = vmap(grad(loss))(stacked.params, stacked)["emb"]["trainable_tokens_delta"]
    every = sorted({2, 8, *IDS})
    own = grad(loss)(adapters[1].params, adapters[1])["emb"]["trainable_tokens_delta"]
    assert off(gradients[1, [every.index(17), every.index(2)]], own) < EXACT


def test_beside_lora_adapters_stack_route_and_bind() -> None:
    torch.manual_seed(0)
    model, ids = tied_llama().double().eval(), tokens()()
    one, other = (made(model, {**LORA, "trainable_token_indices": IDS}, seed) for seed in (1, 2))
    with Float64():
        alone = [pf.apply(model, each, ids).logits for each in (one, other)]
        stacked = pf.stack([one, other])
        assert off(vmap(lambda a: pf.apply(model, a, ids).logits)(stacked), torch.stack(alone)) < EXACT
        expected = torch.stack([alone[1][0], alone[0][1], model(ids).logits[2], alone[1][3]])
        assert off(pf.apply(model, stacked, ids, index=[1, 0, -1, 1]).logits, expected) < EXACT
        bound = pf.bind(model, stacked, index=[1, 0, -1, 1])
        assert off(bound(ids).logits, expected) < EXACT
    assert off(pf.unbind(bound).params, stacked.params) == 0.0
    assert off([each.params for each in pf.unstack(stacked)], [one.params, other.params]) == 0.0
    with pytest.raises(ValueError, match="trainable_token_indices of"):
        pf.stack([one, made(model, LORA)])


def test_two_adapters_act_one_after_the_other() -> None:
    torch.manual_seed(0)
    model, ids = tied_llama().double().eval(), tokens()()
    first, last = made(model, ALONE, 1), made(model, {**ALONE, "token_indices": [5, 6]}, 2)
    lora = made(model, {"r": 2, "target_modules": ["embed_tokens"]}, 3)
    with Float64():
        for several in ((first, last), (lora, first)):
            merged = pf.merge(model.state_dict(), several[0], model=model)
            if several[0] is lora:  # the other end of the tie keeps the base's weight, but for the trained rows
                merged = {**merged, "lm_head.weight": model.lm_head.weight}
            expected = pf.apply(model, several[1], ids, params=merged).logits
            assert off(pf.apply(model, several, ids).logits, expected) < EXACT


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"token_indices=\[3, 3\]; expected numbers of tokens from 0, each of them once", {"token_indices": [3, 3]}),
        (r"token_indices=\[-1\]", {"token_indices": [-1]}),
        (r"token_indices is empty", {}),
        (r"model.embed_tokens: token_indices has 20, and there are 20 tokens here", {"token_indices": [20]}),
        (r"cannot act on this convolution|matched no module", {"token_indices": [1], "target_modules": ["conv"]}),
    ],
)
def test_tokens_that_are_not_there_are_refused(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.init(llama(), pf.TrainableTokensConfig(**options))


def test_a_module_is_trained_whole_or_in_part() -> None:
    config = pf.LoraConfig(**LORA, modules_to_save=["embed_tokens"], trainable_token_indices={"embed_tokens": [1]})
    with pytest.raises(ValueError, match=r"modules_to_save and trainable_token_indices both name \['embed_tokens'\]"):
        pf.init(llama(), config)


@one_graph
def test_a_compiled_call_follows_a_tied_weight() -> None:
    model, ids = Tied().requires_grad_(False), tokens()()
    adapter = made(model, {**ALONE, "target_modules": ["emb"]})
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        step = torch.compile(lambda a, x: pf.apply(model, a, x), backend=lambda graph, _: graph.forward, fullgraph=True)
        found = step(adapter, ids)
    torch.testing.assert_close(found, pf.apply(model, adapter, ids))


def test_from_file_to_file_a_tied_table_stays_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = tied_llama().eval(), tokens()()
    model.save_pretrained(tmp_path / "base")
    adapter = made(model, {**LORA, "trainable_token_indices": IDS})
    pf.save(adapter, tmp_path / "adapter")
    pf.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(ids).logits, pf.apply(model, adapter, ids).logits)
