"""`prepare_for_kbit_training` against PEFT's, which does in place what this does beside the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bases import BASES, llama
from oracle import distance, file_of, furthest, gradients, loaded, loss, quiet_peft, randomised
from snapshot import snapshot
from torch import nn

import peftfn as pf

CLOSE = 1e-6  # float32 in both, the same products in the same order, or nearly
HALVES = [torch.float16, torch.bfloat16]


def prepared(model: nn.Module, **options: Any) -> Any:
    """What PEFT makes of a copy of the model."""
    with quiet_peft():
        return peft.prepare_model_for_kbit_training(copy.deepcopy(model), **options)


def dtypes(model: nn.Module) -> dict[str, tuple[torch.dtype, str, bool]]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: (p.dtype, type(p).__name__, p.requires_grad) for name, p in named}


def adapter_for(model: nn.Module) -> pf.Adapter:
    config = pf.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return randomised(pf.init(model, config))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_outputs_and_gradients_are_peft_s_and_the_base_stays(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, batch = BASES[name].make().to(dtype), BASES[name].inputs()
    before = snapshot(base)
    view = pf.prepare_for_kbit_training(base)
    adapter = adapter_for(view)
    with torch.random.fork_rng():  # peft draws a start that it then overwrites
        theirs = loaded(prepared(base), pf.save(adapter, tmp_path))
    assert dtypes(view) == dtypes(prepared(base))
    output = pf.apply(view, adapter, batch).logits
    assert output.dtype == torch.float32
    assert distance(output, theirs(**batch).logits) < CLOSE
    names = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss(theirs(**batch)), list(names.values()))
    assert furthest(gradients(view, adapter, batch), file_of(theirs, dict(zip(names, grads, strict=True)))) < CLOSE
    assert snapshot(base) == before
    # In half precision the base computes something else: this is what the view is for.
    assert distance(pf.apply(base, adapter, batch).logits, output) > 1e-4


def test_a_tied_weight_stays_one() -> None:
    view = pf.prepare_for_kbit_training(BASES["llama tied"].make().half())
    assert view.lm_head.weight is view.model.embed_tokens.weight


def test_what_is_not_widened_is_shared() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4).half())
    base[0].register_buffer("qweight", torch.ones(100, 100, dtype=torch.int32))  # as GPTQ holds its weights
    base[0].register_buffer("calls", torch.zeros((), dtype=torch.int64))
    view = pf.prepare_for_kbit_training(base)
    assert view[0].qweight is base[0].qweight
    assert view[0].calls is not base[0].calls
    assert view[0].weight.data_ptr() == base[0].weight.data_ptr()
    assert {p.dtype for p in view[1].parameters()} == {torch.float32}
    assert view[1](torch.ones(2, 4))[0].dtype == torch.float32  # it reads its weights from a list of its own


@pytest.mark.parametrize("method", ["gptq", "aqlm", "eetq", "hqq", "torchao", "awq", None])
def test_formats_that_read_half_precision_keep_it(method: str | None) -> None:
    base = BASES["llama"].make().half()
    base.quantization_method = method
    assert dtypes(pf.prepare_for_kbit_training(base)) == dtypes(prepared(base, use_gradient_checkpointing=False))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_the_base_s_own(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    llama(vocab_size=64, hidden_size=64, intermediate_size=64)().half().save_pretrained(tmp_path)
    how = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=how, dtype=torch.float16, device_map="cpu"
    )
    before = snapshot(base)
    view = pf.prepare_for_kbit_training(base)
    assert snapshot(base) == before
    packed = base.model.layers[0].self_attn.q_proj.weight
    assert type(packed) is not nn.Parameter
    assert view.model.layers[0].self_attn.q_proj.weight is packed
    found = {name: dtype for name, (dtype, _, _) in dtypes(view).items()}
    assert found["model.norm.weight"] == found["model.embed_tokens.weight"] == found["lm_head.weight"] == torch.float32
    with quiet_peft():
        theirs = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)  # it cannot be copied
    assert found == {name: dtype for name, (dtype, _, _) in dtypes(theirs).items()}


def test_checkpointing_the_view_reaches_the_view_alone() -> None:
    base, batch = BASES["llama"].make().half(), BASES["llama"].inputs()
    before = snapshot(base)
    view = pf.prepare_for_kbit_training(base).train()
    adapter = adapter_for(view)
    plain = gradients(view, adapter, batch)
    # Not reentrant: torch.autograd.grad does not see through that, and transformers 4 has it for a default.
    enable = getattr(view, "activation_checkpointing_enable", view.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    assert view.model.gradient_checkpointing or view.model.layers[0].gradient_checkpointing
    assert furthest(gradients(view, adapter, batch), plain) < CLOSE
    assert snapshot(base) == before


def test_the_view_goes_wherever_a_base_does() -> None:
    base, batch = BASES["llama"].make().half(), BASES["llama"].inputs()
    view = pf.prepare_for_kbit_training(base)
    adapter = adapter_for(view)
    before, expected = snapshot(base), pf.apply(view, adapter, batch).logits
    bound = pf.bind(view, adapter)
    torch.testing.assert_close(bound(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert all("lora_" in name for name, parameter in bound.named_parameters() if parameter.requires_grad)
    merged = pf.merge(dict(view.named_parameters()), adapter)
    output = torch.func.functional_call(view, merged, (), batch).logits
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert snapshot(base) == before


def test_a_view_of_float32_cannot_be_loaded_over() -> None:
    """Its parameters are the base's own."""
    base = nn.Sequential(nn.Linear(4, 4))
    view = pf.prepare_for_kbit_training(base)
    before = snapshot(base)
    with pytest.raises(RuntimeError, match="is not what the base has"):
        view.load_state_dict({"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)})
    assert snapshot(base) == before


def test_something_that_is_no_module_is_said() -> None:
    wrong: Any = {"weight": torch.ones(2)}
    with pytest.raises(TypeError, match="was given a dict; expected the base, a module"):
        pf.prepare_for_kbit_training(wrong)
