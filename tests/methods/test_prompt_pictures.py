"""Prompts and prefixes beside pictures: what the model computes by hand, or a refusal with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import decoding
import oracle
import pytest
import torch
import transformers
from oracle import distance
from torch import Tensor, nn

import peftfn as pf

# The same sums in another order, in float64, relative to the largest value.
ROUNDING = 1e-9
# The same where `generate` gives its logits in float32.
SINGLE = 1e-6
TOKENS = 3
PICTURE = 38
"""The number that stands for a part of a picture."""

WORDS: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
WORDS |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
WORDS |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIGHT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT |= {"image_size": 16, "patch_size": 8, "projection_dim": 16}
TEXT = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6], [7, 3, 9, 4]])
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
GREEDY |= {"return_dict_in_generate": True, "output_logits": True}


def paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        vision_config={**SIGHT, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**WORDS, "model_type": "gemma"},
        image_token_index=PICTURE,
        projection_dim=16,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config={**SIGHT, "model_type": "clip_vision_model"},
        text_config={**WORDS, "model_type": "llama", "num_key_value_heads": 2},
        image_token_index=PICTURE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def florence() -> Any:
    halves = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    wide = {f"{half}_ffn_dim": 24 for half in ("encoder", "decoder")}
    sight: dict[str, Any] = {"depths": [1], "embed_dim": [8], "num_heads": [2], "num_groups": [2], "window_size": 4}
    sight |= {"patch_size": [7], "patch_stride": [8], "patch_padding": [3], "patch_prenorm": [False]}
    config = transformers.Florence2Config(
        vision_config={**sight, "projection_dim": 16, "max_position_embeddings": 4, "max_temporal_embeddings": 2},
        text_config={"model_type": "bart", "vocab_size": 40, "d_model": 16, **halves, **wide, "pad_token_id": 0},
        image_token_id=PICTURE,
    )
    return transformers.Florence2ForConditionalGeneration(config)


def qwen() -> Any:
    turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8},
        text_config={**WORDS, "rope_parameters": turns, "rope_scaling": turns},
        image_token_id=PICTURE,
        video_token_id=37,
        vision_start_token_id=36,
        vision_end_token_id=35,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


class Case:
    """A tiny model in float64 whose tokens are felt, a batch of three rows that begin with a picture, and adapters."""

    def __init__(self, name: str, build: Callable[[], Any], parts: int, **pictures: Tensor) -> None:
        self.name = name
        self.model = build().double().eval()
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.2)
        ids = torch.cat([torch.full((3, parts), PICTURE), TEXT], 1)
        self.batch: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}

    def adapter(self, kind: str, tokens: int = TOKENS) -> pf.Adapter:
        make = {"prompt": pf.PromptTuningConfig, "prefix": pf.PrefixTuningConfig}[kind]
        task = "SEQ_2_SEQ_LM" if self.name == "florence" else "CAUSAL_LM"
        return oracle.randomised(pf.init(self.model, make(num_virtual_tokens=tokens, task_type=task)), tokens, size=1.0)

    def row(self, number: int) -> dict[str, Tensor]:
        """A row alone."""
        each = {name: tensor.shape[0] // 3 for name, tensor in self.batch.items()}
        return {name: tensor[number * each[name] :][: each[name]] for name, tensor in self.batch.items()}


def pixels() -> Tensor:
    return torch.randn(3, 3, 16, 16, dtype=torch.float64)


def seen(length: int) -> dict[str, Tensor]:
    """What says that all tokens of a row see each other."""
    return {"token_type_ids": torch.zeros(3, length, dtype=torch.long)}


def of_qwen() -> dict[str, Tensor]:
    """Pictures of 4 x 2 patches for each row, of which four become one token."""
    shape = torch.tensor([[1, 4, 2]] * 3)
    kinds = torch.tensor([[1] * 2 + [0] * 4] * 3)
    return {
        "pixel_values": torch.randn(3 * 8, 2 * 3 * 64).double(),
        "image_grid_thw": shape,
        "mm_token_type_ids": kinds,
    }


CASES: dict[str, Callable[[], Case]] = {
    "paligemma": lambda: Case("paligemma", paligemma, 4, pixel_values=pixels(), **seen(8)),
    "llava": lambda: Case("llava", llava, 4, pixel_values=pixels()),
    "florence": lambda: Case("florence", florence, 5, pixel_values=pixels(), decoder_input_ids=TEXT),
    "qwen": lambda: Case("qwen", qwen, 2, **of_qwen()),
}
kinds = pytest.mark.parametrize("kind", ["prompt", "prefix"])


def by_hand(case: Case, adapter: pf.Adapter, batch: dict[str, Tensor], positions: Tensor | None = None) -> Tensor:
    """The logits of the batch's last tokens, with the prompt's numbers in the vocabulary or the prefix in the cache."""
    given: dict[str, Any] = dict(batch) | ({} if positions is None else {"position_ids": positions})
    rows, count = len(batch["input_ids"]), adapter.config.num_virtual_tokens
    if isinstance(adapter.config, pf.PrefixTuningConfig):
        cache = decoding.filled(case.model, adapter)
        cache.batch_repeat_interleave(rows)
        if case.name != "florence":
            given["attention_mask"] = torch.ones(rows, count + batch["input_ids"].shape[1], dtype=torch.long)
        given |= {decoding.cache_name(type(case.model)): cache}
        with torch.no_grad():
            return case.model(**given).logits
    made = copy.deepcopy(case.model)
    made.set_input_embeddings(Longer(made.get_input_embeddings(), decoding.prompt_of(adapter)))
    front = torch.arange(40, 40 + count).expand(rows, -1)
    given["input_ids"] = torch.cat([front, batch["input_ids"]], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    for name in {"mm_token_type_ids", "token_type_ids"} & given.keys():
        given[name] = torch.cat([torch.zeros_like(front), given[name]], 1)
    with torch.no_grad():
        return made(**given).logits


class Longer(nn.Module):
    """An embedding whose numbers from 40 on are those of a prompt."""

    def __init__(self, base: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.base, self.rows, self.weight = base, rows, base.weight

    def forward(self, ids: Tensor) -> Tensor:
        is_word = ids < 40
        rows = self.rows[(ids - 40).clamp(0, len(self.rows) - 1)]
        return torch.where(is_word[..., None], self.base(torch.where(is_word, ids, 0)), rows)


@pytest.mark.parametrize("name", ["paligemma", "llava", "florence"])
@kinds
def test_beside_pictures_outputs_are_those_by_hand(name: str, kind: str) -> None:
    case = CASES[name]()
    adapter = case.adapter(kind)
    found = pf.apply(case.model, adapter, case.batch).logits
    assert distance(found, by_hand(case, adapter, case.batch)) < ROUNDING
    length = case.batch["input_ids"].shape[1] if name != "florence" else 4
    bare = case.model(**case.batch).logits
    assert distance(found[:, -length:], bare) > 0.01, "the adapter is felt"
    blind = pf.apply(case.model, adapter, case.batch | {"pixel_values": pixels()}).logits
    assert distance(found, blind) > 0.001, "the pictures are seen"


only_new = pytest.mark.skipif(
    oracle.IS_TRANSFORMERS_4, reason="the bare model says something else without a cache (transformers 4)"
)


@pytest.mark.parametrize("name", [pytest.param("paligemma", marks=only_new), "llava", "florence"])
@kinds
def test_generate_beside_pictures_says_what_it_says_without_a_cache(name: str, kind: str) -> None:
    case = CASES[name]()
    adapter = case.adapter(kind)
    if (name, kind) == ("paligemma", "prefix"):
        del case.batch["token_type_ids"]  # see the next test
    given = {key: tensor for key, tensor in case.batch.items() if key != "decoder_input_ids"}
    found = pf.bind(case.model, adapter).generate(**given, **GREEDY)
    for step, said in enumerate(found.logits):
        grown = grown_by(case, found.sequences, step)
        assert distance(said, by_hand(case, adapter, grown)[:, -1]) < SINGLE, f"step {step}"


@pytest.mark.skipif(oracle.IS_TRANSFORMERS_4, reason="they have no force in evaluation there")
def test_token_types_that_a_prefix_puts_out_of_force_are_one_clear_error() -> None:
    case = CASES["paligemma"]()
    bound = pf.bind(case.model, case.adapter("prefix"))
    text = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT), "token_type_ids": torch.zeros_like(TEXT)}
    said = "the batch has token_type_ids, by which PaliGemmaForConditionalGeneration lets tokens see what comes after"
    for run in (lambda: bound.generate(**case.batch, **GREEDY), lambda: bound(**text)):
        with pytest.raises(ValueError, match=said):
            run()


def grown_by(case: Case, sequences: Tensor, step: int) -> dict[str, Tensor]:
    """The batch after so many tokens that `generate` added."""
    if case.name == "florence":
        return case.batch | {"decoder_input_ids": sequences[:, : 1 + step]}
    ids = sequences[:, : case.batch["input_ids"].shape[1] + step]
    grown = case.batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in case.batch:
        grown["token_type_ids"] = torch.cat([case.batch["token_type_ids"], torch.ones(3, step, dtype=torch.long)], 1)
    if "mm_token_type_ids" in case.batch:
        grown["mm_token_type_ids"] = (ids == PICTURE).long()
    return grown


UNLIKE = {
    ("paligemma", "prefix"): "the mask that PaliGemmaForConditionalGeneration makes of its pictures does not know",
}
"""What is said of prefixes of unlike length by row."""


@pytest.mark.parametrize("name", ["paligemma", "llava", "florence"])
@kinds
def test_rows_beside_pictures_are_those_of_each_row_alone_or_refused(name: str, kind: str) -> None:
    case = CASES[name]()
    adapters = [case.adapter(kind, tokens) for tokens in (2, 3)]
    said = UNLIKE.get((name, kind))
    if said is not None:
        for stacked, index in ((pf.stack(adapters), [0, 1, 1]), (pf.stack(adapters[1:] * 2), [0, -1, 1])):
            with pytest.raises(ValueError, match=said):
                pf.apply(case.model, stacked, case.batch, index=index)
        return
    found = pf.apply(case.model, pf.stack(adapters), case.batch, index=[1, -1, 0]).logits
    for number, own in enumerate((adapters[1], None, adapters[0])):
        row = case.row(number)
        with torch.no_grad():
            alone = case.model(**row).logits if own is None else by_hand(case, own, row)
        assert distance(found[number, -4:], alone[0, -4:]) < ROUNDING, f"row {number}"


@pytest.mark.skipif(oracle.IS_TRANSFORMERS_4, reason="it counts positions in space otherwise")
@kinds
def test_positions_in_space_are_those_that_generate_counts(kind: str) -> None:
    case = CASES["qwen"]()
    adapter = case.adapter(kind)
    found = pf.bind(case.model, adapter).generate(**case.batch, **GREEDY)
    for step, said in enumerate(found.logits):
        grown = grown_by(case, found.sequences, step)
        after = None if kind == "prompt" else in_space(case, grown) + TOKENS
        assert distance(said, by_hand(case, adapter, grown, after)[:, -1]) < SINGLE, f"step {step}"


def in_space(case: Case, batch: dict[str, Tensor]) -> Tensor:
    """(3, rows, length): the positions of the text alone, as the bare model counts them."""
    names = ("image_grid_thw", "attention_mask", "mm_token_type_ids")
    return case.model.model.get_rope_index(batch["input_ids"], **{name: batch[name] for name in names})[0]


@kinds
def test_positions_in_space_that_nobody_counts_are_one_clear_error(kind: str) -> None:
    case = CASES["qwen"]()
    with pytest.raises(ValueError, match=r"the batch has pixel_values, and Qwen2VLForConditionalGeneration counts pos"):
        pf.apply(case.model, case.adapter(kind), case.batch)


@pytest.mark.skipif(
    oracle.IS_TRANSFORMERS_4,
    reason="there the bare model runs on no embedded text, and starts at 0 after a filled cache",
)
@kinds
@pytest.mark.parametrize("padding", [0, 2])
def test_a_model_that_counts_in_space_writes_on_from_text_alone(kind: str, padding: int) -> None:
    case = CASES["qwen"]()
    adapter = case.adapter(kind)
    ids = torch.cat([torch.zeros(3, padding, dtype=torch.long), TEXT], 1)
    found = pf.bind(case.model, adapter).generate(input_ids=ids, attention_mask=(ids != 0).long(), **GREEDY)
    for number in range(3):
        logits = decoding.by_hand(case.model, adapter, TEXT)
        for step, said in enumerate(found.logits):
            alone = found.sequences[number : number + 1, padding : 4 + padding + step]
            assert distance(said[number], logits(alone)[0]) < SINGLE, f"row {number}, step {step}"
