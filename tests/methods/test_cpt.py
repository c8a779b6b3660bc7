"""Context-aware prompt tuning against peft, and where peft's loss is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from bases import BASES, ids
from oracle import distance, quiet_peft
from prompts import Case, saved
from safetensors.torch import load_file
from same import assert_same
from torch import Tensor

import peftfn as pf

ROUNDING = 1e-6  # the same sums in another order, relative to the largest value
TRAINING = 1e-5
IDS, TYPES = [3, 9, 4, 8, 11, 2, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8]  # two examples
RADII = {"opt_projection_epsilon": 3.0, "opt_projection_format_epsilon": 20.0}  # 0.27 and 1.8, of changes of 0.4
SLOW = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7}


def config(library: Any, ids: Any = tuple(IDS), types: Any = tuple(TYPES), **more: Any) -> Any:
    given = {"cpt_token_ids": list(ids), "cpt_tokens_type_mask": None if types is None else list(types)}
    return library.CPTConfig(**{**given, "task_type": "CAUSAL_LM", **RADII, **more})


def batch() -> dict[str, Tensor]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    tokens = ids(3, 7)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def typed() -> Tensor:
    """An example before the one that is asked for, in two rows of three."""
    return torch.tensor([[1, 2, 3, 4, 5, 6, 8], [1, 2, 4, 4, 4, 0, 0], [1, 4, 5, 8, 9, 12, 12]])


def theirs(**more: Any) -> Any:
    with quiet_peft():
        model = peft.get_peft_model(BASES["llama"].make(), config(peft, **more)).eval()
    oracle.randomise(model)
    return model


def ours(model: Any, **more: Any) -> pf.Adapter:
    delta = model.prompt_encoder["default"].delta_embedding.weight.detach().clone()
    return pf.init(BASES["llama"].make(), config(pf, **more)).replace(params={"": {"delta_embedding": delta}})


@oracle.by_new_peft
@pytest.mark.parametrize("options", [{}, SLOW], ids=["plain", "decay"])
@pytest.mark.parametrize("has_types", [False, True], ids=["all answers", "typed"])
def test_outputs_losses_and_gradients_are_pefts(options: dict[str, Any], has_types: bool) -> None:
    model, given = theirs(**options), batch()
    adapter = ours(model, **options)
    more = {"input_type_mask": typed()} if has_types else {}
    base = BASES["llama"].make()
    found = pf.apply(base, adapter, {**given, **more})
    slopes = torch.func.grad(lambda p: pf.apply(base, adapter.replace(params=p), {**given, **more}).loss)(
        adapter.params
    )
    gradient = slopes[""]["delta_embedding"]
    with quiet_peft():
        expected = model(**given, **{name: one.clone() for name, one in more.items()})
        expected.loss.backward()
    assert distance(found.logits, expected.logits) < ROUNDING
    assert distance(found.loss, expected.loss) < ROUNDING
    slope = model.prompt_encoder["default"].delta_embedding.weight.grad
    assert distance(gradient, slope) < 10 * ROUNDING
    assert gradient[3].count_nonzero() == 0
    assert gradient[0].abs().min() > 0


def test_what_a_call_is_given_stays_as_it_is() -> None:
    # peft adds to the caller's input_type_mask, in place: the next call has other labels.
    kinds = typed()
    pf.apply(BASES["llama"].make(), pf.init(BASES["llama"].make(), config(pf)), {**batch(), "input_type_mask": kinds})
    assert kinds.equal(typed())
    with quiet_peft():
        theirs()(**batch(), input_type_mask=kinds)
    assert not kinds.equal(typed())


def test_a_prompt_that_ends_with_no_answer_leaves_the_texts_labels_alone() -> None:
    model, given = BASES["llama"].make(), batch()
    adapter = pf.init(model, config(pf, types=None))  # all of type 1: a template
    found = pf.apply(model, adapter, given)
    plain = pf.init(model, pf.PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"))
    plain = plain.replace(params={"": {"prompt_embeddings": adapter.buffers[""]["embedding"]}})
    assert distance(found.loss, pf.apply(model, plain, given).loss) < ROUNDING
    with quiet_peft():
        assert theirs(types=None)(**given).loss.isnan()  # peft has no label left


@oracle.by_new_peft
def test_steps_with_a_projection_after_each_are_pefts() -> None:
    model, given, base = theirs(), batch(), BASES["llama"].make()
    adapter = ours(model)
    weight = model.prompt_encoder["default"].delta_embedding.weight
    with quiet_peft():
        oracle.steps([weight], lambda: model(**given).loss, 10)
        model(**given)  # which projects
    leaves = pf.leaves(adapter)

    def value() -> Tensor:
        with torch.no_grad():
            for leaf, inside in zip(leaves, pf.leaves(pf.cpt.projected(adapter)), strict=True):
                leaf.copy_(inside)
        return pf.apply(base, adapter, given).loss

    oracle.steps(leaves, value, 10)
    assert distance(pf.cpt.projected(adapter).params[""]["delta_embedding"], weight) < TRAINING


def test_files_go_both_ways(tmp_path: Path) -> None:
    model, given, base = theirs(), batch(), BASES["llama"].make()
    folder = saved(model, tmp_path / "theirs")
    adapter = pf.load(folder, base)
    assert adapter.config.cpt_tokens_type_mask == tuple(TYPES)
    with quiet_peft():
        assert distance(pf.apply(base, adapter, given).loss, model(**given).loss) < ROUNDING
    again = pf.save(adapter, tmp_path / "again")
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, again))
    assert before.keys() == after.keys() == {"prompt_embeddings"}
    assert before["prompt_embeddings"].equal(after["prompt_embeddings"])
    mine = oracle.randomised(pf.init(base, config(pf)))
    with quiet_peft():
        read: Any = peft.PeftModel.from_pretrained(BASES["llama"].make(), str(pf.save(mine, tmp_path / "ours"))).eval()
        assert distance(pf.apply(base, mine, given).logits, read(**given).logits) < ROUNDING
    assert_same(pf.load(tmp_path / "ours"), mine)  # the changes, and what they are changes of


def test_rows_of_a_batch_have_unlike_prompts_and_their_own_labels() -> None:
    base, given = BASES["llama"].make(), batch()
    made = [
        oracle.randomised(pf.init(base, config(pf))),
        oracle.randomised(pf.init(base, config(pf, ids=IDS[:4], types=TYPES[:4], opt_projection_epsilon=1.0))),
    ]
    found = pf.apply(base, pf.stack(made), given, index=[1, -1, 0])
    losses, counts = [], []
    for row, alone in enumerate((made[1], (), made[0])):
        one = {name: tensor[row : row + 1] for name, tensor in given.items()}
        expected = pf.apply(base, alone, one)
        assert distance(found.logits[row][-expected.logits.shape[1] :], expected.logits[0]) < ROUNDING
        prompt = 0 if not alone else sum(kind % 4 == 0 for kind in alone.config.cpt_tokens_type_mask)
        counts.append(int((one["labels"] != -100).sum()) + prompt - (0 if alone else 1))
        losses.append(expected.loss * counts[-1])
    assert distance(found.loss, sum(losses) / sum(counts)) < ROUNDING
    for one, other in zip(pf.unstack(pf.stack(made)), made, strict=True):
        assert_same(one, other)


def test_generate_takes_types_and_needs_none() -> None:
    base = BASES["llama"].make()
    bound = pf.bind(base, oracle.randomised(pf.init(base, config(pf)))).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 40}
    text = ids(2, 5)
    written = bound.generate(text, **options)
    assert written.equal(bound.generate(text, input_type_mask=torch.full((2, 5), 4), **options))
    assert written.shape == (2, 8)


def test_what_makes_no_sense_is_refused() -> None:
    base = BASES["llama"].make()
    with pytest.raises(ValueError, match="expected 'CAUSAL_LM'"):
        pf.CPTConfig(cpt_token_ids=[1], task_type="SEQ_CLS")
    assert pf.CPTConfig(cpt_token_ids=[1]).task_type == "CAUSAL_LM"
    with pytest.raises(ValueError, match="expected as many of each"):
        config(pf, types=[1, 2])
    with pytest.raises(ValueError, match="for 5 virtual tokens"):
        config(pf, num_virtual_tokens=5)
    with pytest.raises(ValueError, match="negative"):
        config(pf, opt_projection_epsilon=-1.0)
    with pytest.raises(ValueError, match="the type of each token of the text"):
        pf.apply(base, pf.init(base, config(pf)), {**batch(), "input_type_mask": torch.ones(3, 6)})
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        pf.init(Case("t5", "prefix").model(), config(pf))
    with pytest.raises(TypeError, match="expected CPTConfig"):
        pf.cpt.projected(pf.init(base, pf.LoraConfig(target_modules=["q_proj"])))
