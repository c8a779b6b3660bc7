"""Adapters on a part of a fused projection, by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import trained
from oracle import quiet_peft
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import peftfn as pf

EAGER: dict[str, Any] = {"attn_implementation": "eager", "vocab_size": 20}
SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, **EAGER}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=4, n_layer=2, n_positions=16, **EAGER))


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=24, **SMALL))


def bloom() -> nn.Module:
    return BloomForCausalLM(BloomConfig(hidden_size=16, n_head=4, n_layer=2, **EAGER))


def falcon() -> nn.Module:
    return FalconForCausalLM(FalconConfig(multi_query=False, new_decoder_architecture=False, alibi=False, **SMALL))


def phi3() -> nn.Module:
    sizes: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
    return Phi3ForCausalLM(Phi3Config(**sizes, **SMALL))


def mpt() -> nn.Module:
    return MptForCausalLM(MptConfig(d_model=16, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=20))


FUSED = [(gpt2, "c_attn"), (neox, "query_key_value"), (bloom, "query_key_value"), (falcon, "query_key_value")]
FUSED += [(phi3, "qkv_proj"), (mpt, "Wqkv")]


@pytest.mark.parametrize(("build", "layer"), FUSED, ids=lambda value: getattr(value, "__name__", value))
def test_values_move_the_output_and_not_where_the_model_looks(build: Callable[[], Any], layer: str) -> None:
    """What the first block looks at is a function of queries and keys: an adapter on `v` leaves it as it is."""
    model, ids = build().eval(), torch.randint(0, 20, (2, 6))

    def run(adapter: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = pf.apply(model, adapter, {"input_ids": ids, "output_attentions": True})
        return found.attentions[0], found.logits

    base_attention, base_logits = run(())
    for part, looks_elsewhere in (("q", True), ("k", True), ("v", False)):
        adapter = trained(pf.init(model, pf.LoraConfig(r=2, target_modules=[f"{layer}.{part}"])), size=0.5)
        attention, logits = run(adapter)
        assert (attention - base_attention).abs().max().item() > 1e-4 if looks_elsewhere else True, part
        assert torch.equal(attention, base_attention) or looks_elsewhere, part
        assert (logits - base_logits).abs().max() > 1e-4, part


def test_a_list_with_a_bare_letter_names_modules_and_never_parts() -> None:
    with pytest.raises(ValueError, match="matched no module"):
        pf.init(gpt2(), pf.LoraConfig(target_modules=["q", "v"]))


def test_grouped_queries_have_their_own_sizes() -> None:
    adapter = pf.init(phi3(), pf.LoraConfig(r=2, target_modules=["qkv_proj.k", "gate_up_proj.up"]))
    shapes = {path.rpartition(".")[2]: tuple(leaf["lora_B"].shape) for path, leaf in adapter.params.items()}
    assert shapes == {"qkv_proj": (8, 2), "gate_up_proj": (24, 2)}


@pytest.mark.parametrize("parts", [("q", "v"), ("v", "q", ""), ("k", "k")], ids=str)
def test_a_stack_of_other_parts_is_each_of_them(parts: tuple[str, ...]) -> None:
    model, batch = neox().eval().double(), {"input_ids": torch.randint(0, 20, (3, 6))}
    names = [f"query_key_value.{part}" if part else "query_key_value" for part in parts]
    adapters = [
        trained(pf.init(model, pf.LoraConfig(r=2 + n, target_modules=[name])), seed=n) for n, name in enumerate(names)
    ]
    stacked = pf.stack(adapters)
    expected = torch.stack([pf.apply(model, one, batch).logits for one in adapters])
    mapped = torch.vmap(lambda one: pf.apply(model, one, batch).logits)(stacked)
    torch.testing.assert_close(mapped, expected)
    routed = pf.apply(model, stacked, batch, index=[1, -1, 0]).logits
    wanted = torch.stack([expected[1, 0], model(**batch).logits[1], expected[0, 2]])
    torch.testing.assert_close(routed, wanted)
    for one, again in zip(adapters, pf.unstack(stacked), strict=True):
        assert again.sites == one.sites
        assert all(
            torch.equal(again.params[path][name], t) for path, leaf in one.params.items() for name, t in leaf.items()
        )


def test_an_adapter_of_more_outputs_than_the_layer_has_is_refused() -> None:
    small, large = (
        phi3(),
        Phi3ForCausalLM(Phi3Config(num_key_value_heads=4, intermediate_size=24, pad_token_id=0, **SMALL)),
    )
    adapter = pf.init(large, pf.LoraConfig(r=2, target_modules=["qkv_proj.v"]))
    with pytest.raises(ValueError, match=r"qkv_proj: the adapter acts on 48 outputs, expected at most 32"):
        pf.apply(small, adapter, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})


def test_peft_reads_it_as_an_adapter_on_the_whole_layer(tmp_path: Path) -> None:
    from peft import PeftModel

    model, batch = gpt2().eval(), {"input_ids": torch.randint(0, 20, (2, 6))}
    adapter = trained(pf.init(model, pf.LoraConfig(r=2, target_modules=["c_attn.q", "c_attn.v", "mlp.c_fc"])))
    pf.save(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["c_attn", "mlp.c_fc"]
    with quiet_peft():
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
        expected = theirs(**batch).logits
    torch.testing.assert_close(pf.apply(model, adapter, batch).logits, expected, rtol=1e-5, atol=1e-6)
    again = pf.load(tmp_path, model)
    assert again.config == adapter.config
    merged = pf.merge(dict(model.named_parameters()), again)
    changed = (merged["transformer.h.0.attn.c_attn.weight"] - model.transformer.h[0].attn.c_attn.weight).abs().sum(0)
    assert (changed[:16] > 0).all() and (changed[16:32] == 0).all() and (changed[32:] > 0).all()
