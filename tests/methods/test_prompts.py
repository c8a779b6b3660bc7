"""Prompt tuning, P-tuning, prefix tuning and LLaMA-Adapter against peft, on every task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import decoding
import oracle
import peft
import pytest
import torch
from bases import ids, minilm_folder
from oracle import distance, furthest, quiet_peft
from prompts import CASES, OF_TASKS, Case, ours, output, place, saved
from safetensors.torch import load_file
from same import assert_same
from torch import Tensor

import peftfn as pf
from peftfn.checkpoints import keys

# The same sums in another order, relative to the largest value.
ROUNDING = 1e-6
TRAINING = 1e-5

every_case = pytest.mark.parametrize("case", [*CASES, *OF_TASKS], ids=str)


def loss(result: Any) -> Tensor:
    return output(result).double().sin().mean()  # not of squares: a norm makes their mean 1


def named(adapter: pf.Adapter) -> dict[tuple[str, str], Tensor]:
    return {(path, name): tensor for path, leaf in adapter.params.items() for name, tensor in leaf.items()}


@every_case
def test_outputs_and_loss_are_pefts(case: Case) -> None:
    theirs, batch = case.theirs(), case.batch()
    with quiet_peft():
        expected = theirs(**batch)
    found = pf.apply(case.model(), ours(theirs, case), batch)
    assert distance(output(found), output(expected)) < ROUNDING
    if "labels" in batch:
        assert distance(found.loss, expected.loss) < ROUNDING


@every_case
def test_every_gradient_is_pefts(case: Case) -> None:
    theirs, batch, model = case.theirs(), case.batch(), case.model()
    adapter = ours(theirs, case)
    names = oracle.trained(theirs.double())  # exact, so that the rounding of one library is measured, and not of both
    with quiet_peft():
        grads = torch.autograd.grad(loss(theirs(**batch)), list(names.values()), materialize_grads=True)
    expected = {place(name, case.method): one for name, one in zip(names, grads, strict=True)}
    pf.leaves(adapter)
    loss(pf.apply(model, adapter, batch)).backward()
    found = {place: torch.zeros_like(t) if t.grad is None else t.grad for place, t in named(adapter).items()}
    assert furthest(found, expected) < ROUNDING


@every_case
def test_ten_steps_of_adamw_give_pefts_leaves(case: Case) -> None:
    theirs, batch, model = case.theirs(), case.batch(), case.model()
    adapter = ours(theirs, case)
    with quiet_peft():
        oracle.steps(list(oracle.trained(theirs).values()), lambda: loss(theirs(**batch)), 10)
    oracle.steps(pf.leaves(adapter), lambda: loss(pf.apply(model, adapter, batch)), 10)
    expected = {place(name, case.method): tensor for name, tensor in oracle.trained(theirs).items()}
    assert furthest(named(adapter), expected) < TRAINING


@every_case
def test_a_folder_of_pefts_gives_pefts_output_and_comes_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    theirs, batch, model = case.theirs(), case.batch(), case.model()
    folder = saved(theirs, tmp_path / "theirs")
    adapter = pf.load(folder, model)
    with quiet_peft():
        assert distance(output(pf.apply(model, adapter, batch)), output(theirs(**batch))) < ROUNDING
    again = pf.save(adapter, tmp_path / "ours")
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, again))
    assert sorted(before) == sorted(after)
    assert all(before[key].equal(after[key]) for key in before)
    assert_same(pf.load(again), adapter)


@every_case
def test_peft_reads_what_we_save_and_computes_the_same(case: Case, tmp_path: Path) -> None:
    model, batch = case.model(), case.batch()
    adapter = oracle.randomised(pf.init(model, case.config(pf)))
    folder = pf.save(adapter, tmp_path)
    with quiet_peft():
        theirs: Any = peft.PeftModel.from_pretrained(case.model(), str(folder)).eval()
        expected = output(theirs(**batch))
        written = peft.get_peft_model_state_dict(theirs)
    assert distance(output(pf.apply(model, adapter, batch)), expected) < ROUNDING
    file = keys.to_keys(adapter)
    assert sorted(written) == sorted(file)
    assert all(written[key].equal(file[key]) for key in file)


@every_case
def test_both_libraries_train_as_many_numbers(case: Case) -> None:
    with quiet_peft():
        theirs = peft.get_peft_model(case.model(), case.config(peft))
    assert pf.count(pf.init(case.model(), case.config(pf))).trained == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral", "t5", "bert features"])
@pytest.mark.parametrize("method", ["prefix", "projected prefix"])
def test_a_prefix_is_what_comes_first_in_a_cache_made_by_hand(name: str, method: str) -> None:
    case = Case(name, method)
    model, batch = case.model(), {"input_ids": ids(3, 7)}
    if name == "t5":
        batch["decoder_input_ids"] = ids(3, 4)
    adapter = oracle.randomised(pf.init(model, case.config(pf)))
    for row in range(3):
        one = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        cache = {decoding.cache_name(type(model)): decoding.filled(model, adapter)}
        expected = output(model(**one, **cache, use_cache=True))
        assert distance(output(pf.apply(model, adapter, batch))[row], expected[0]) < ROUNDING


@pytest.mark.parametrize("case", [case for case in CASES if case.base == "bert questions"], ids=str)
def test_token_types_go_along_where_peft_drops_them(case: Case) -> None:
    # peft's question answering names token_type_ids in its forward and passes them on to nobody.
    theirs, batch, model = case.theirs(), case.batch(), case.model()
    kinds = (batch["input_ids"] > 20).long()
    adapter = ours(theirs, case)
    found = output(pf.apply(model, adapter, {**batch, "token_type_ids": kinds}))
    with quiet_peft():
        dropped = output(theirs(**batch, token_type_ids=kinds))
    assert distance(output(pf.apply(model, adapter, batch)), dropped) < ROUNDING
    embedded = model.get_input_embeddings()(batch["input_ids"])
    if case.method == "prompt tuning":  # by hand: the prompt is of type 0
        prompt = adapter.params[""]["prompt_embeddings"].expand(3, -1, -1)
        whole = {"inputs_embeds": torch.cat([prompt, embedded], 1)}
        whole |= {"attention_mask": torch.cat([torch.ones(3, 3), batch["attention_mask"]], 1)}
        whole |= {"token_type_ids": torch.cat([torch.zeros(3, 3).long(), kinds], 1)}
        head = adapter.replace(params={"qa_outputs": adapter.params["qa_outputs"]})
        assert distance(found, output(pf.apply(model, head, whole))) < ROUNDING
    assert distance(found, dropped) > 1e-3


def test_answers_move_with_their_tokens() -> None:
    # peft leaves start and end where they were, so they name tokens of the prompt.
    case = Case("bert questions", "prompt tuning")
    theirs, batch, model = case.theirs(), case.batch(), case.model()
    at = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 4])}
    found = pf.apply(model, ours(theirs, case), {**batch, **at})
    with quiet_peft():
        expected = theirs(**batch, **{name: tensor + 3 for name, tensor in at.items()})
    assert distance(found.loss, expected.loss) < ROUNDING


def test_labels_of_tokens_are_extended_where_peft_fails() -> None:
    case = Case("bert tokens", "prompt tuning")
    batch, model = case.batch(), case.model()
    labels = ids(3, 7) % 2
    adapter = oracle.randomised(pf.init(model, case.config(pf)))
    found = pf.apply(model, adapter, {**batch, "labels": labels})
    logits = found.logits[:, 3:].flatten(0, 1)
    assert distance(found.loss, torch.nn.functional.cross_entropy(logits, labels.flatten())) < ROUNDING
    with quiet_peft(), pytest.raises(ValueError, match="batch_size"):
        case.theirs()(**batch, labels=labels)


@pytest.mark.parametrize("method", ["prompt tuning", "prefix"])
def test_two_prompts_are_active_together(method: str) -> None:
    case = Case("gpt2", method)
    model, batch = case.model(), {"input_ids": case.batch()["input_ids"]}
    one, other = (oracle.randomised(pf.init(model, case.config(pf)), seed) for seed in (1, 2))
    both = torch.cat([one.params[""]["prompt_embeddings"], other.params[""]["prompt_embeddings"]])
    long = case.config(pf)
    joined = pf.init(model, type(long)(num_virtual_tokens=6, task_type="CAUSAL_LM"))
    joined = joined.replace(params={"": {"prompt_embeddings": both}})
    found = output(pf.apply(model, (one, other), batch))
    assert distance(found, output(pf.apply(model, joined, batch))) < ROUNDING


def test_a_prompt_a_prefix_and_lora_are_active_together() -> None:
    model, batch = Case("llama", "prefix").model(), Case("llama", "prefix").batch()
    prompt, prefix = (
        oracle.randomised(pf.init(model, Case("llama", method).config(pf))) for method in ("prompt tuning", "prefix")
    )
    lora = oracle.randomised(pf.init(model, pf.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])))
    found = output(pf.apply(model, (prompt, prefix, lora), batch))
    params = pf.merge(dict(model.named_parameters()), lora)
    assert distance(found, output(pf.apply(model, (prefix, prompt), batch, params=params))) < 1e-5
    assert found.shape[1] == batch["input_ids"].shape[1] + 3


ENCODED = [case for case in CASES if case.base == "gpt2" and case.method in ("p-tuning by lstm", "projected prefix")]


@pytest.mark.parametrize("case", ENCODED, ids=str)
def test_training_goes_on_where_it_was_saved(case: Case, tmp_path: Path) -> None:
    model = case.model()
    first, second = (oracle.randomised(pf.init(model, case.config(pf)), seed) for seed in (1, 2))
    assert_same(pf.load(pf.save(first, tmp_path)), first)
    assert_same(pf.load(pf.save(second, tmp_path), model), second)
    assert len(list(tmp_path.glob("peftfn_encoder-*"))) == 1
    prompt = keys.to_keys(second)["prompt_embeddings"]
    with quiet_peft():  # another writer leaves no network that makes its prompt
        peft.PeftModel.from_pretrained(case.model(), str(saved(case.theirs(), tmp_path))).save_pretrained(tmp_path)
    loaded = pf.load(tmp_path).params[""]
    assert list(loaded) == ["prompt_embeddings"]
    assert not loaded["prompt_embeddings"].equal(prompt)


def test_a_prompt_starts_at_embeddings_of_the_vocabulary_or_of_a_text() -> None:
    case = Case("gpt2", "prompt tuning")
    model = case.model()
    table = model.get_input_embeddings().weight
    sampled = pf.init(model, case.config(pf, prompt_tuning_init="SAMPLE_VOCAB")).params[""]["prompt_embeddings"]
    assert all(bool((table == row).all(1).any()) for row in sampled)
    folder = str(minilm_folder())
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "to be", "tokenizer_name_or_path": folder}
    wide = Case("bert", "prompt tuning").model()
    wide.resize_token_embeddings(31000, mean_resizing=False)

    with quiet_peft():
        options |= {"num_virtual_tokens": 6, "task_type": "SEQ_CLS"}
        theirs = peft.get_peft_model(copy.deepcopy(wide), peft.PromptTuningConfig(**options))
    expected = theirs.prompt_encoder["default"].embedding.weight
    assert pf.init(wide, pf.PromptTuningConfig(**options)).params[""]["prompt_embeddings"].equal(expected)
