"""What a configuration's numbers become in a tiny model: rules on fields' names, so that new models need no others.

Widths are 32 and heads 4 of 8 everywhere, so that parts that a model joins fit each other, also across sub-configs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

VOCABULARY = 128
WIDTH, INNER, HEADS, HEAD = 32, 48, 4, 8
IMAGE, POSITIONS = 32, 128
STAGE = 16  # the width of the first stage of a model whose stages widen


def capped(limit: int) -> Callable[[int], int]:
    """At most so much: a number that is small already says something (0: none, 1: shared)."""
    return lambda value: min(value, limit)


def fixed(size: int) -> Callable[[int], int]:
    """Always this, but for 0 and negative numbers, which switch something off."""
    return lambda value: size if value > 0 else value


# The first pattern that matches a field's whole name says what becomes of its number.
INTEGERS: list[tuple[str, Callable[[int], int]]] = [
    (
        r".*vocab(_?size)?(_per_layer_input)?|unpadded_vocab_size|num_codevectors_per_group|codebook_size",
        fixed(VOCABULARY),
    ),
    (r"type_vocab_size|.*_min_masks|.*topk_method|.*_offset", lambda value: value),
    (
        r"(num_)?(n_)?(routed_|local_|moe_num_)?experts|moe_num_experts|num_local_experts|n_routed_experts|num_experts",
        capped(4),
    ),
    (r".*experts_per_tok.*|moe_topk|moe_k|top_k_experts|top_k|num_selected_experts|.*experts_top_?k", capped(2)),
    (r"n_groups?|topk_group|num_expert_groups?|topk_groups", capped(1)),
    (r"first_k_dense_replace|num_dense_layers|decoder_sparse_step|num_nextn_predict_layers|num_mtp_layers", capped(1)),
    (r".*(kv|key_value)_heads|multi_query_group_num|.*num_kv.*heads", capped(2)),
    (r".*linear_num_key_heads", capped(2)),
    (r".*(heads?|head_count)(_num|_count)?|.*n_heads|.*num_.*heads", capped(HEADS)),
    (r".*head_dim|.*head_size|d_kv|.*_head_dim.*|qk_.*_dim|kv_channels|attention_key_size", capped(HEAD)),
    (r".*rotary_dim", capped(4)),
    (r".*(layers?|depth|blocks?|n_layer|n_layers|num_hidden_groups|inner_group_num)(_num)?", capped(2)),
    (r".*lora_rank|.*_rank|rank", capped(8)),
    (
        r".*(intermediate|ffn|mlp|feedforward|d_ff|n_inner|expansion_dim).*(dim|size)|.*ffn|d_ff|n_inner|dim_feedforward|ff_dim|ffn_size",
        fixed(INNER),
    ),
    (r".*image_size|img_size|input_size|resolution", capped(IMAGE)),
    (r"patch_size|patch_temporal", capped(8)),
    (
        r".*(max|n)_?.*(position|pos|length|len|ctx|seq).*|.*positions|.*max_.*_embeddings|num_position_embeddings|block_size|context_length",
        capped(POSITIONS),
    ),
    (r".*sliding_window.*|.*local_attention|.*attention_window|.*chunk_size|window_size|.*local.*window", capped(8)),
    (
        r"num_channels|in_channels|in_chans|num_mel_bins|.*kernel.*|.*stride.*|.*groups?|.*token.*|.*index|.*factor",
        lambda value: value,
    ),
    (r"num_queries|num_query_tokens|.*num_.*latents|num_proposals|resampler_n_latents|latent_query_num", capped(6)),
    (r"num_denoising|train_num_points", capped(4)),
    (r".*state_size|.*d_state|ssm_state_size", capped(8)),
    (
        r".*(hidden|width|channels?|embd|embed|dim|size|features|d_model|proj).*",
        lambda value: WIDTH if value > 48 else value,
    ),
]


def integer(name: str, value: int) -> int:
    """What a whole number becomes."""
    for pattern, rule in INTEGERS:
        if re.fullmatch(pattern, name):
            return rule(value)
    return value


def widths(values: list[int]) -> list[int]:
    """The same growth from a narrow first stage."""
    smallest = min((value for value in values if value > 0), default=STAGE)
    return [value if value <= STAGE else max(8, round(value / smallest * STAGE / 8) * 8) for value in values]


LISTS: list[tuple[str, Callable[[list[int]], list[int]]]] = [
    (
        r"depths?|stage_num.*|num_block_repeats|layer_depths|block_sizes|n_layers|num_layers",
        lambda values: [min(v, 2) for v in values],
    ),
    (r".*heads?|n_heads", lambda values: [min(v, 2) for v in values]),
    (
        r".*kernel.*|.*stride.*|.*padding.*|.*dilation.*|.*ratio.*|.*factor.*|.*ind(ic|ex)es.*|.*groups?|patch_sizes?|.*scales|.*pool.*|.*levels",
        lambda values: values,
    ),
    (r".*image_size|img_size", lambda values: [min(v, IMAGE) for v in values]),
    (r".*vocab_sizes", lambda values: values),
    (r".*(hidden|width|channels|dims?|sizes?).*", widths),
]


def numbers(name: str, values: list[Any]) -> list[Any]:
    """What a list of whole numbers becomes."""
    for pattern, rule in LISTS:
        if re.fullmatch(pattern, name):
            return rule(values)
    return values
