"""Cartridge against peft, and what it is started from against the base that reads the text itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from bases import ids
from oracle import distance, quiet_peft
from prompts import Case, output, saved
from safetensors.torch import load_file
from same import assert_same
from torch import Tensor

import peftfn as pf

theirs_of: Any = pytest.importorskip("peft.tuners.cartridge.utils", reason="this peft has no cartridges")

ROUNDING = 1e-6  # the same sums in another order, relative to the largest value
SIZES: dict[str, Any] = {"num_virtual_tokens": 4, "num_frozen_tokens": 2}


def config(library: Any, task: str = "CAUSAL_LM", **more: Any) -> Any:
    return library.CartridgeConfig(**{"task_type": task, **SIZES, **more})


def theirs(case: Case, task: str = "CAUSAL_LM", **more: Any) -> Any:
    with quiet_peft():
        model = peft.get_peft_model(case.model(), config(peft, task, **more)).eval()
    oracle.randomise(model)
    return model


def ours(model: Any, case: Case, task: str = "CAUSAL_LM", **more: Any) -> pf.Adapter:
    encoder = model.prompt_encoder["default"]
    adapter = pf.init(case.model(), config(pf, task, **more))
    frozen = {} if encoder.frozen_embedding is None else {"": {"frozen_embedding": encoder.frozen_embedding.detach()}}
    trained = {"": {"trainable_embedding": encoder.trainable_embedding.detach().clone()}}
    return adapter.replace(params=trained, buffers={**adapter.buffers, **frozen})


def prefix(adapter: pf.Adapter) -> Tensor:
    return torch.cat([adapter.buffers[""]["frozen_embedding"], adapter.params[""]["trainable_embedding"]])


@pytest.mark.parametrize(
    ("name", "task", "more"),
    [
        ("llama", "CAUSAL_LM", {}),
        ("gpt2", "CAUSAL_LM", {"num_frozen_tokens": 0}),
        ("t5", "SEQ_2_SEQ_LM", {"num_frozen_tokens": 1}),
    ],
)
def test_outputs_and_gradients_are_pefts(name: str, task: str, more: dict[str, Any]) -> None:
    case = Case(name, "prefix")
    model, batch = theirs(case, task, **more), case.batch()
    adapter, base = ours(model, case, task, **more), case.model()
    with quiet_peft():
        expected = model(**batch)
        expected.loss.backward()
    found = pf.apply(base, adapter, batch)
    assert distance(output(found), output(expected)) < ROUNDING
    slope = torch.func.grad(lambda p: pf.apply(base, adapter.replace(params=p), batch).loss)(adapter.params)
    grad = model.prompt_encoder["default"].trainable_embedding.grad
    assert distance(slope[""]["trainable_embedding"], grad) < 10 * ROUNDING
    assert pf.count(adapter).trained == grad.numel()


def test_files_go_both_ways(tmp_path: Path) -> None:
    case = Case("llama", "prefix")
    model, batch, base = theirs(case), case.batch(), case.model()
    folder = saved(model, tmp_path / "theirs")
    adapter = pf.load(folder, base)
    assert prefix(adapter).equal(prefix(ours(model, case)))
    assert adapter.params[""]["trainable_embedding"].shape[0] == 2
    again = pf.save(adapter, tmp_path / "ours")
    assert {path.name for path in again.glob("*.safetensors")} == {"adapter_model.safetensors"}
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, again))
    assert before.keys() == after.keys()
    assert before["prompt_embeddings"].equal(after["prompt_embeddings"])
    with quiet_peft():
        read: Any = peft.PeftModel.from_pretrained(case.model(), str(again)).eval()
        assert distance(output(pf.apply(base, adapter, batch)), output(read(**batch))) < ROUNDING


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["CartridgeConfig", "PrefixTuningConfig"])
def test_the_base_with_a_texts_cartridge_computes_what_it_computes_after_the_text(name: str, kind: str) -> None:
    model = Case(name, "prefix").model()
    adapter = pf.init(model, getattr(pf, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    text, question = ids(1, 5), ids(3, 4)
    with torch.no_grad():
        expected = output(model(torch.cat([text.expand(3, -1), question], 1)))[:, 5:]
    found = output(pf.apply(model, pf.cartridge.of_text(model, adapter, text), {"input_ids": question}))
    assert distance(found, expected) < 10 * ROUNDING
    assert distance(output(pf.apply(model, adapter, {"input_ids": question})), expected) > 1e-3


def test_the_start_from_a_cache_is_pefts() -> None:
    case = Case("llama", "prefix")
    model, base, text = theirs(case), case.model(), ids(1, 7)
    with torch.no_grad():
        cache = base(text, use_cache=True).past_key_values
    expected = theirs_of.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    adapter = pf.init(base, config(pf))
    made = pf.cartridge.of_cache(adapter, cache)
    assert prefix(made).equal(expected)
    assert_same(pf.cartridge.of_cache(adapter, [(one.keys, one.values) for one in cache.layers]), made)


def test_several_are_one_as_peft_joins_them(tmp_path: Path) -> None:
    base = Case("llama", "prefix").model()
    made = [oracle.randomised(pf.init(base, config(pf, num_virtual_tokens=n)), n) for n in (4, 3)]
    folders = [pf.save(one, tmp_path / str(number)) for number, one in enumerate(made)]
    with quiet_peft():
        theirs_of.compose_cartridge_adapters(folders, output_path=tmp_path / "both")
    joined = pf.cartridge.compose(made)
    assert prefix(pf.load(tmp_path / "both")).equal(prefix(joined))
    assert joined.config.num_virtual_tokens == 7
    batch = Case("llama", "prefix").batch()
    both = output(pf.apply(base, tuple(made), batch))  # active together they follow each other too
    assert distance(both, output(pf.apply(base, joined, batch))) < 10 * ROUNDING


def test_adapters_of_unlike_length_are_one_stack() -> None:
    case = Case("llama", "prefix")
    base, batch = case.model(), {"input_ids": ids(3, 6)}
    made = [oracle.randomised(pf.init(base, config(pf, num_virtual_tokens=n)), n) for n in (4, 6)]
    stacked = pf.stack(made)
    found = output(pf.apply(base, stacked, batch, index=[1, -1, 0]))
    for row, alone in enumerate((made[1], (), made[0])):
        assert distance(found[row], output(pf.apply(base, alone, batch))[row]) < 10 * ROUNDING
    for one, other in zip(pf.unstack(stacked), made, strict=True):
        assert_same(one, other)


def test_what_does_not_fit_is_refused() -> None:
    base = Case("llama", "prefix").model()
    adapter = pf.init(base, config(pf))
    with pytest.raises(ValueError, match="from 0 to that of all"):
        config(pf, num_frozen_tokens=5)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        pf.cartridge.of_text(base, adapter, ids(1, 3))
    with pytest.raises(ValueError, match="expected one row"):
        pf.cartridge.of_text(base, adapter, ids(2, 5))
    with pytest.raises(TypeError, match="without a projection"):
        pf.cartridge.of_text(base, pf.init(base, pf.LoraConfig(target_modules=["q_proj"])), ids(1, 5))
    with pytest.raises(ValueError, match="at least one"):
        pf.cartridge.compose([])
    with pytest.raises(TypeError, match="expected CartridgeConfig"):
        pf.cartridge.compose([pf.init(base, pf.PrefixTuningConfig(num_virtual_tokens=3))])
