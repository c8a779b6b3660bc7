"""The registry of methods: of a row follow the laws, the comparison with peft and the table of transforms.

A new method is a file in peftfn/methods, a line in their table, and a row here; what is peculiar to it has a test file
of its own. LoRA and prompts have more rows of the laws, by hand, in cases.py: theirs are the kinds of layer and of
base that no other method has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peftfn as pf

Options = Mapping[str, Any]

ALL = ("linear", "transposed-square", "embedding", "conv1d", "conv2d-groups", "conv3d")
"""Kinds of layer; cases.py has a base of each."""

ONES = "it starts at ones, whatever the generator"
ZEROS = "it starts at zeros, whatever the generator"
ASKED = "asked not to be it"


def nothing_more(targets: Sequence[str]) -> Options:
    """No options that depend on the layers' names."""
    return {}


@dataclasses.dataclass(frozen=True)
class AgainstPeft:
    """What is held against peft: outputs, gradients, the merge, files both ways, and a fresh adapter's shapes.

    Attributes:
        name: says what is peculiar.
        base: a kind of layer; test_methods_against_peft.py has a base of each.
        options: of the config, beside the method's.
        wrong: what peft has wrong ("outputs", "gradients" or "merge") -> how; that is then left out.
        in_old: whether peft 0.17 has it too.
        is_felt: whether trained tensors change the output.
        in_float32: whether peft computes what it adds in float32, whatever the dtype.
    """

    name: str
    base: str
    options: Options = dataclasses.field(default_factory=dict)
    wrong: Mapping[str, str] = dataclasses.field(default_factory=dict)
    in_old: bool = True
    is_felt: bool = True
    in_float32: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """A method as the tests see it.

    Attributes:
        name: begins the names of its cases.
        title: what the table of transforms calls it.
        config: the name of its config, here and in peft.
        options: of a small config, for layers whose sizes are multiples of 4.
        more: `(targets) -> options` that name layers.
        kinds: the kinds of layer that it acts on.
        others: more cases of the laws: what is peculiar -> (a kind of layer, options).
        models: "llama" and what else there is in cases.py -> options, of cases on whole models.
        exceptions: law -> why it has no meaning for the method.
        start: the field that says how it starts, its value for no change and its value for random numbers, which its
            case "random" has; `None` where it has no such field.
        peft: what is held against peft.
        variants: titles -> options, of the rows in the table of transforms where there are several.
        packed: whether the laws also run on packed bases.
    """

    name: str
    title: str
    config: str
    options: Options = dataclasses.field(default_factory=dict)
    more: Callable[[Sequence[str]], Options] = nothing_more
    kinds: Sequence[str] = ()
    others: Mapping[str, tuple[str, Options]] = dataclasses.field(default_factory=dict)
    models: Mapping[str, Options] = dataclasses.field(default_factory=lambda: {"llama": {}})
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start: tuple[str, Any, Any] | None = ("init_weights", True, False)
    peft: Sequence[AgainstPeft] = ()
    variants: Mapping[str, Options] = dataclasses.field(default_factory=dict)
    packed: bool = True

    def make(self, targets: Sequence[str] | None = None, /, **more: Any) -> Any:
        """A small config that acts on these layers, or on the default ones of the model."""
        named: Options = {} if targets is None else {"target_modules": list(targets), **self.more(targets)}
        return getattr(pf, self.config)(**{**self.options, **named, **more})


def last_is_feedforward(targets: Sequence[str]) -> Options:
    """(IA)³ scales what goes into the last layer, and what comes out of the others."""
    return {"feedforward_modules": list(targets[-1:])}


def first_of_blocks(targets: Sequence[str]) -> Options:
    """BD-LoRA cuts A of the first layer, and B of the others."""
    named = {"target_modules_bd_a": list(targets[:1]), "target_modules_bd_b": list(targets[1:])}
    return {"use_bdlora": {**named, "nblocks": 2}}


BLOCKS: Options = {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2}
BLOCKS_OF_ONE: Options = {"target_modules_bd_b": ["0"], "nblocks": 4, "match_strict": False}
LORA: Options = {"r": 4, "lora_alpha": 6}
TUCKER: Options = {"use_effective_conv2d": True, "r": 1}
LOHA_TUCKER: Options = {"use_effective_conv2d": True, "alpha": 200}
TOKENS: Options = {"num_virtual_tokens": 3}
VIEW = "'view size is not compatible with input tensor's size and stride'"
FOLDED = {"outputs": "patches are added up where they overlap"}
SWAPPED = {"gradients": "those of hada_w1_a and hada_w2_a are made with the other factor's; the laws have the slope"}
MATRICES = ("linear", "transposed-square")
SEED_3: Options = {"projection_prng_key": 3, "fan_in_fan_out": True}
SUM_OF_POWERS = {"in_old": False}  # before 0.18 peft's sum of powers was another one

METHODS = [
    Method(
        "lora", "LoRA", "LoraConfig", LORA
    ),  # its cases of the laws are in cases.py, what is peft's in test_against_peft.py
    Method(
        "ia3",
        "IA3",
        "IA3Config",
        more=last_is_feedforward,
        kinds=("linear", "transposed-square", "conv1d", "conv2d", "conv2d-groups", "conv3d"),
        models={
            "gpt2": {},
            "llama": {"target_modules": r".*_proj", "feedforward_modules": r".*\.(down|o)_proj"},
        },
        exceptions={"randomness": ONES},
        start=("init_ia3_weights", True, False),
    ),
    Method(
        "adalora",
        "AdaLoRA",
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "lora_alpha": 6},
        kinds=("linear", "transposed-square", "conv1d", "conv2d", "conv3d"),
        others={"bias": ("linear", {"bias": "lora_only"})},
        models={"gpt2": {"target_modules": ["c_attn", "c_proj"]}, "llama": {}},
        start=("init_lora_weights", True, False),
    ),
    Method(
        "loha",
        "LoHa",
        "LoHaConfig",
        {"r": 2, "alpha": 3},
        kinds=ALL,
        others={"conv2d-tucker": ("conv2d-groups", {"use_effective_conv2d": True})},
        peft=[
            AgainstPeft("as it is", "linear"),
            AgainstPeft("patterns", "linear", {"rank_pattern": {"2": 1}, "alpha_pattern": {"0": 5}}),
            AgainstPeft("as it is", "conv2d"),
            AgainstPeft("as it is", "conv1d", in_old=False),
            AgainstPeft("as it is", "conv2d-groups", in_old=False),
            AgainstPeft("Tucker", "conv2d", LOHA_TUCKER, SWAPPED),
            AgainstPeft("Tucker", "conv1d", LOHA_TUCKER, SWAPPED, in_old=False),
            AgainstPeft("Tucker", "pointwise", LOHA_TUCKER, in_old=False),
        ],
    ),
    Method(
        "lokr",
        "LoKr",
        "LoKrConfig",
        {"r": 1, "alpha": 2},
        kinds=ALL,
        others={
            "both-products": ("linear", {"decompose_both": True}),
            "whole": ("linear", {"r": 8}),
            "conv2d-tucker": ("conv2d-groups", {"use_effective_conv2d": True}),
        },
        peft=[
            AgainstPeft("whole factors", "linear", {"r": 8}),
            AgainstPeft("a product", "linear", {"alpha": 3}),
            AgainstPeft("both products", "linear", {"decompose_both": True}),
            AgainstPeft("factor 4", "linear", {"r": 2, "decompose_factor": 4}),
            AgainstPeft("a factor that does not divide", "linear", {"r": 2, "decompose_factor": 5}),
            AgainstPeft("patterns", "linear", {"r": 8, "rank_pattern": {"2": 1}, "alpha_pattern": {"0": 3}}),
            AgainstPeft("whole", "conv2d", {"r": 8}),
            AgainstPeft("a product", "conv2d"),
            AgainstPeft("Tucker", "conv2d", TUCKER),
            AgainstPeft("whole", "conv1d", {"r": 8}, in_old=False),
            AgainstPeft("a product", "conv1d", in_old=False),
            AgainstPeft("Tucker", "conv1d", TUCKER, {"outputs": VIEW, "merge": VIEW}, in_old=False),
            AgainstPeft("a product", "conv2d-groups", in_old=False),
            AgainstPeft("Tucker", "pointwise", TUCKER),
        ],
    ),
    Method(
        "dora",
        "DoRA",
        "LoraConfig",
        {**LORA, "use_dora": True},
        kinds=ALL,
        exceptions={"slope": "the norm is a constant for the gradient, as in peft (test_methods_against_peft.py)"},
        start=("init_lora_weights", True, False),
        peft=[
            AgainstPeft("as it is", "linear"),
            AgainstPeft(
                "patterns",
                "linear",
                {"rank_pattern": {"2": 1}, "alpha_pattern": {"0": 5}, "use_rslora": True},
            ),
            AgainstPeft("as it is", "transposed", {"fan_in_fan_out": True}),
            AgainstPeft("as it is", "embedding"),
            AgainstPeft("as it is", "conv1d"),
            AgainstPeft("as it is", "conv2d"),
            AgainstPeft("as it is", "conv3d"),
            AgainstPeft("as it is", "pointwise"),
        ],
    ),
    Method(
        "oft",
        "OFT",
        "OFTConfig",
        {"oft_block_size": 4},
        kinds=ALL,
        others={"exact": ("linear", {"use_cayley_neumann": False})},
        exceptions={"randomness": ZEROS},
        peft=[
            AgainstPeft("as it is", "linear", **SUM_OF_POWERS),
            AgainstPeft("blocks by number", "linear", {"oft_block_size": 0, "r": 4}, **SUM_OF_POWERS),
            AgainstPeft("exact", "linear", {"use_cayley_neumann": False}),
            *(
                AgainstPeft(
                    f"{terms} terms", "linear", {"num_cayley_neumann_terms": terms}, is_felt=terms > 1, **SUM_OF_POWERS
                )
                for terms in (1, 2, 3, 4, 7)
            ),
            AgainstPeft("a size that does not divide", "linear", {"oft_block_size": 7}, **SUM_OF_POWERS),
            AgainstPeft("one block for all", "linear", {"block_share": True}, **SUM_OF_POWERS),
            AgainstPeft(
                "constrained", "linear", {"oft_block_size": 0, "r": 4, "coft": True, "eps": 0.5}, **SUM_OF_POWERS
            ),
            AgainstPeft("as it is", "embedding", **SUM_OF_POWERS),
            AgainstPeft("as it is", "pointwise", **SUM_OF_POWERS),
            AgainstPeft("as it is", "conv2d", {}, FOLDED, **SUM_OF_POWERS),
        ],
    ),
    Method(
        "c3a",
        "C3A",
        "C3AConfig",
        {"block_size": 4, "init_weights": True},
        kinds=MATRICES,
        exceptions={"randomness": ZEROS},
        peft=[
            AgainstPeft("blocks of 2", "linear", {"block_size": 2}, in_old=False, in_float32=True),
            AgainstPeft(
                "patterns",
                "linear",
                {"block_size_pattern": {"2": 2}},
                in_old=False,
                in_float32=True,
            ),
        ],
    ),
    Method(
        "fourierft",
        "FourierFT",
        "FourierFTConfig",
        {"n_frequency": 12, "init_weights": True},
        kinds=MATRICES,
        exceptions={"randomness": ZEROS},
        peft=[
            AgainstPeft("as it is", "linear", in_old=False, in_float32=True),
            AgainstPeft(
                "patterns",
                "linear",
                {"n_frequency_pattern": {"2": 5}, "scaling": 30.0, "random_loc_seed": 5},
                in_old=False,
                in_float32=True,
            ),
            AgainstPeft("as it is", "transposed", {"fan_in_fan_out": True}, in_old=False, in_float32=True),
        ],
    ),
    Method(
        "gralora",
        "GraLoRA",
        "GraloraConfig",
        {"r": 4, "alpha": 6},
        kinds=MATRICES,
        others={"hybrid": ("linear", {"hybrid_r": 3})},
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("hybrid", "linear", {"hybrid_r": 3}, in_old=False),
            AgainstPeft("one block", "linear", {"gralora_k": 1}, in_old=False),
            AgainstPeft("as it is", "transposed", {"fan_in_fan_out": True}, in_old=False),
        ],
    ),
    Method(
        "shira",
        "SHiRA",
        "ShiraConfig",
        {"r": 2},
        kinds=MATRICES,
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("a seed", "linear", {"r": 1, "random_seed": 3}, in_old=False),
        ],
    ),
    Method(
        "supertuning",
        "Super-Tuning",
        "SupertuningConfig",
        {"sparsity": 0.8},
        kinds=MATRICES,
        others={"supra": ("linear", {"r": 2})},
        exceptions={"randomness": ZEROS},
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("the smallest", "linear", {"select_top": False}, in_old=False),
            AgainstPeft("Supra", "linear", {"r": 2, "lora_alpha": 3.0, "sparsity": 0.5}, in_old=False),
        ],
    ),
    Method(
        "waveft",
        "WaveFT",
        "WaveFTConfig",
        {"n_frequency": 12},
        kinds=MATRICES,
        others={"sym3": ("linear", {"wavelet_family": "sym3"})},
        exceptions={"randomness": ZEROS},
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("patterns", "linear", {"n_frequency_pattern": {"2": 5}, "random_loc_seed": 5}, in_old=False),
            AgainstPeft("db3", "linear", {"wavelet_family": "db3", "scaling": 10.0}, in_old=False),
            AgainstPeft("no transform", "linear", {"use_idwt": False}, in_old=False),
            AgainstPeft("as it is", "transposed", {"fan_in_fan_out": True}, in_old=False),
        ],
    ),
    Method(
        "boft",
        "BOFT",
        "BOFTConfig",
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        kinds=("linear", "transposed-square", "conv2d-groups"),
        exceptions={"randomness": ZEROS},
        peft=[
            AgainstPeft("two factors", "linear", in_old=False),
            AgainstPeft("one factor", "linear", {"boft_block_size": 4, "boft_n_butterfly_factor": 1}, in_old=False),
            AgainstPeft("blocks by number", "linear", {"boft_block_size": 0, "boft_block_num": 2}, in_old=False),
            AgainstPeft("three factors", "conv2d", {"boft_n_butterfly_factor": 3}, in_old=False),
        ],
        packed=False,  # test_boft.py
    ),
    Method(
        "hira",
        "HiRA",
        "HiraConfig",
        {"r": 3},
        kinds=ALL,
        peft=[
            *(
                AgainstPeft("as it is", base, in_old=False)
                for base in ("linear", "embedding", "conv1d", "conv2d", "conv3d", "pointwise")
            ),
            AgainstPeft("a random start", "transposed", {"fan_in_fan_out": True, "init_weights": False}, in_old=False),
        ],
        packed=False,  # test_hira.py
    ),
    Method(
        "hra",
        "HRA",
        "HRAConfig",
        {"r": 4},
        kinds=("linear", "transposed-square", "conv2d-groups"),
        peft=[
            AgainstPeft("pairs", "linear", in_old=False),
            AgainstPeft("one pair", "linear", {"r": 2}, in_old=False),
            AgainstPeft("pairs", "conv2d", in_old=False),
        ],
        packed=False,  # test_hra.py
    ),
    Method(
        "miss",
        "MiSS",
        "MissConfig",
        {"r": 4},
        kinds=("linear", "transposed-square"),
        others={"bat": ("transposed-square", {"init_weights": "bat"})},
        exceptions={"randomness": ZEROS},
        peft=[
            AgainstPeft("runs that divide", "linear", in_old=False),
            AgainstPeft("runs that do not", "linear", {"r": 5}, in_old=False),
            AgainstPeft("mini", "linear", {"init_weights": "mini", "mini_r": 2}, in_old=False),
            AgainstPeft("bat", "linear", {"init_weights": "bat", "r": 2}, in_old=False),
        ],
        packed=False,  # test_miss.py
    ),
    Method(
        "road",
        "RoAd",
        "RoadConfig",
        {"group_size": 4},
        kinds=("transposed-square",),
        others={
            f"{variant}-linear": ("linear-even", {"variant": variant}) for variant in ("road_1", "road_2", "road_4")
        },
        exceptions={"randomness": "it starts at zeros and ones, whatever the generator"},
        peft=[
            AgainstPeft("one number", "linear", {"group_size": 2}, in_old=False),
            AgainstPeft("two numbers", "linear", {"variant": "road_2", "target_modules": "0"}, in_old=False),
            AgainstPeft("four numbers", "linear", {"variant": "road_4", "target_modules": "0"}, in_old=False),
        ],
        packed=False,  # it never reads the weight
    ),
    Method(
        "delora",
        "DeLoRA",
        "DeloraConfig",
        {"r": 3, "delora_lambda": 4},
        kinds=("linear", "transposed-square"),
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("patterns", "linear", {"rank_pattern": {"2": 1}, "lambda_pattern": {"0": 7}}, in_old=False),
        ],
        packed=False,  # it reads the weight when it starts
    ),
    Method(
        "deft",
        "DEFT",
        "DeftConfig",
        {"r": 3},
        kinds=("linear", "transposed-square"),
        others={"qr": ("linear", {"decomposition_method": "qr"})},
        peft=[
            AgainstPeft("relu", "linear", in_old=False, in_float32=True),
            AgainstPeft("qr", "linear", {"decomposition_method": "qr"}, in_old=False, in_float32=True),
            AgainstPeft("scaled", "linear", {"r": 8, "alpha": 4}, in_old=False, in_float32=True),
            AgainstPeft("relu", "transposed", {"fan_in_fan_out": True}, in_old=False, in_float32=True),
        ],
        packed=False,  # test_deft.py
    ),
    Method(
        "glora",
        "GLoRA",
        "GloraConfig",
        {"r": 3},
        kinds=("linear", "transposed-square"),
        others={
            "vectors": ("linear", {"config_A_B": "vector", "config_D_E": "vector"}),
            "no-weight": ("linear", {"config_A_B": "none"}),
        },
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("vectors", "linear", {"config_A_B": "vector", "config_D_E": "vector"}, in_old=False),
            AgainstPeft("numbers", "linear", {"config_A_B": "constant", "config_C": "none"}, in_old=False),
        ],
        packed=False,  # test_glora.py
    ),
    Method(
        "lora-bias",
        "LoRA with a bias",
        "LoraConfig",
        {**LORA, "lora_bias": True},
        kinds=("linear", "transposed-square", "conv1d", "conv2d-groups", "conv3d"),
        models={"bert": {"target_modules": ["query", "value"]}},
        start=("init_lora_weights", True, False),
        peft=[
            AgainstPeft("as it is", "linear"),
            AgainstPeft("patterns", "linear", {"rank_pattern": {"2": 1}, "alpha_pattern": {"0": 5}}),
            AgainstPeft("as it is", "transposed", {"fan_in_fan_out": True}),
            AgainstPeft("as it is", "conv1d"),
            AgainstPeft("as it is", "conv2d"),
            AgainstPeft("as it is", "conv3d"),
        ],
        packed=False,  # the packed models have no biases to merge into
    ),
    Method(
        "bdlora",
        "BD-LoRA",
        "LoraConfig",
        {**LORA, "use_bdlora": {"target_modules_bd_b": ["_proj", "query", "value", "c_attn"], "nblocks": 2}},
        first_of_blocks,
        kinds=("linear-even", "transposed-square"),
        models={"llama": {}},
        start=None,
        peft=[
            AgainstPeft("A, then B", "linear", {"use_bdlora": BLOCKS}, in_old=False),
            AgainstPeft("B, then none", "linear", {"use_bdlora": BLOCKS_OF_ONE}, in_old=False),
        ],
        packed=False,  # it never reads the weight
    ),
    Method(
        "kasa",
        "KaSA",
        "LoraConfig",
        {"r": 2, "lora_alpha": 6, "kasa_config": {}},  # against peft in a file of its own: it decomposes in float32
        kinds=("linear", "transposed-square"),
        models={"llama": {}},
        exceptions={"identity": "the base without its smallest singular parts is where it starts"},
        start=None,
        packed=False,  # it reads the weight when it starts
    ),
    Method(
        "velora",
        "VeLoRA",
        "LoraConfig",
        {**LORA, "velora_config": {"num_groups": 3}},  # its gradient in training is in a file of its own
        kinds=("linear",),
        models={},
        start=None,
        packed=False,  # it never reads the weight
    ),
    Method(
        "beft",
        "BEFT",
        "BeftConfig",
        {"target_modules": r".*\.(v_proj|value|c_attn)"},
        kinds=("linear", "transposed-square", "conv1d", "conv2d-groups", "conv3d"),
        models={"bert": {"target_modules": ["output.dense"]}},
        exceptions={"randomness": ZEROS},
        peft=[AgainstPeft("as it is", "linear", in_old=False)],
        packed=False,  # the same
    ),
    Method(
        "vera",
        "VeRA",
        "VeraConfig",
        {"r": 4},
        kinds=MATRICES,
        exceptions={"randomness": "its vectors begin as constants, and A and B are of the config's own seed"},
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("another seed", "linear", {"projection_prng_key": 3, "r": 2}, in_old=False),
            AgainstPeft("as it is", "transposed", {"r": 1, "fan_in_fan_out": True}, in_old=False),
        ],
    ),
    Method(
        "pvera",
        "PVeRA",
        "PveraConfig",
        {"r": 4},
        kinds=MATRICES,
        exceptions={
            "randomness": "its vectors begin as constants, and A and B are of the config's own seed",
            "draws": "in training mode it draws from torch's generator, as dropout",
        },
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("another seed", "transposed", {**SEED_3, "d_initial": 1.0}, in_old=False),
        ],
    ),
    Method(
        "randlora",
        "RandLoRA",
        "RandLoraConfig",
        {"r": 3, "randlora_alpha": 6},
        kinds=MATRICES,
        exceptions={"randomness": "its numbers begin as constants, and A and B are of the config's own seed"},
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("sparse", "linear", {"sparse": True, "projection_prng_key": 3}, in_old=False),
            AgainstPeft("as it is", "transposed", {"r": 20, "fan_in_fan_out": True}, in_old=False),
        ],
    ),
    Method(
        "frod",
        "FRoD",
        "FrodConfig",
        {"sparse_rate": 0.1},
        kinds=MATRICES,
        exceptions={
            "randomness": "it begins as the base's own parts, whatever the generator",
            "alone": "a file lacks U, which is made of the base's weight and of V",
        },
        peft=[
            AgainstPeft("as it is", "linear", in_old=False, in_float32=True),
            AgainstPeft("as it is", "transposed", {"fan_in_fan_out": True}, in_old=False, in_float32=True),
        ],
        packed=False,  # it reads the weight when it starts
    ),
    Method(
        "vblora",
        "VB-LoRA",
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 5, "vector_length": 2},
        kinds=MATRICES,
        exceptions={"identity": "A and B begin as mixtures of random vectors, as in PEFT"},
        start=None,
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("three of a bank", "transposed", {"topk": 3, "r": 6, "fan_in_fan_out": True}, in_old=False),
        ],
    ),
    Method(
        "psoft",
        "PSOFT",
        "PsoftConfig",
        {"r": 4, "psoft_alpha": 6},  # against peft in a file of its own: there it has float32 alone
        kinds=("linear", "transposed-square"),
        others={"series": ("linear", {"use_cayley_neumann": True})},
        exceptions={"randomness": "it starts at no rotation, whatever the generator"},
    ),
    Method(
        "peanut",
        "PEANuT",
        "PeanutConfig",
        {"r": 4},
        kinds=("linear", "transposed-square"),
        others={"deep": ("linear", {"depth": 2, "act_fn": "silu"})},
        peft=[
            AgainstPeft("as it is", "linear", in_old=False),
            AgainstPeft("deep", "linear", {"depth": 2, "act_fn": "silu", "scaling": 2.5}, in_old=False),
        ],
    ),
    Method(
        "osf",
        "OSF",
        "OSFConfig",
        kinds=("linear", "transposed-square"),
        models={"llama": {}},
        exceptions={
            "randomness": "it starts at parts of the weight, whatever the generator",
            "slope": "gradients are projected off the parts that stay, as in peft",
        },
        peft=[
            AgainstPeft("half", "linear", in_old=False),
            AgainstPeft("a number", "linear", {"effective_rank": 3, "rank_pattern": {"2": 2}}, in_old=False),
        ],
    ),
    # Copies and rows of the base's own tensors: their laws are in files of their own, as aLoRA's, which needs ids.
    Method("ln-tuning", "LN tuning", "LNTuningConfig", {"target_modules": r".*([Nn]orm|ln_.)"}),
    Method("trainable-tokens", "trainable tokens", "TrainableTokensConfig", {"token_indices": [1, 3]}),
    # Prompts act on the call: their cases of the laws are in cases.py.
    Method("prompt", "prompt tuning", "PromptTuningConfig", TOKENS),
    Method("cpt", "CPT", "CPTConfig", {"cpt_token_ids": [3, 7, 5], "cpt_tokens_type_mask": [1, 2, 4]}),
    Method("multitask", "multitask prompt tuning", "MultitaskPromptTuningConfig", TOKENS),
    Method(
        "p-tuning",
        "P-tuning",
        "PromptEncoderConfig",
        TOKENS,
        variants={"P-tuning, MLP": {}, "P-tuning, LSTM": {"encoder_reparameterization_type": "LSTM"}},
    ),
    Method(
        "prefix",
        "prefix tuning",
        "PrefixTuningConfig",
        TOKENS,
        variants={"prefix tuning": {}, "prefix tuning, projected": {"prefix_projection": True}},
    ),
    Method("cartridge", "cartridge", "CartridgeConfig", TOKENS),
    Method("adaption", "LLaMA-Adapter", "AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2}),
]
BY_NAME = {method.name: method for method in METHODS}
