"""Writes the adapter folders under tests/files with the real peft, old and new; run by hand.

tests/files/peft-0.5.0, in an environment with tests/requirements-peft050.txt installed:

    PYTHONHASHSEED=0 python tests/make_peft_files.py tests/files

tests/files/peft-0.21.2, in the project's own environment with peft==0.21.2 and transformers==5.23.0:

    PYTHONHASHSEED=0 python tests/make_peft_files.py tests/files

The command is the same: the folder is named after the peft that runs. PYTHONHASHSEED only fixes the order in
which peft writes its sets into adapter_config.json; the tensors are the same without it. Each folder holds

    case.json                 how to build the base model, and which sub-folder holds which adapter
    base.safetensors          the base model's state dict, a tied tensor under each of its names
    adapter_config.json, adapter_model.safetensors or adapter_model.bin, as peft wrote them
    expected.safetensors      input.<name or position>, base_output, output, grad.<key in the adapter file>

A model's second adapter has its adapter_* and expected.safetensors in a sub-folder, as peft lays it out.
The loss behind grad.* is output.float().square().mean(); every model is in eval mode.
"""

import argparse
import json
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
OLD, NEW = "0.5.0", "0.21.2"

TEXT = {"vocab_size": 40, "max_position_embeddings": 16, "attn_implementation": "eager"}
LLAMA = TEXT | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
BERT = TEXT | {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24}
GPT2 |= {"attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2}
MIXTRAL = LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}


def transformer(name: str, config_name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"class": f"transformers.{name}", "config_class": f"transformers.{config_name}", "config": config}


def linear(n_in: int, n_out: int) -> tuple[str, dict[str, int]]:
    return "torch.nn.Linear", {"in_features": n_in, "out_features": n_out}


def conv(axes: int, n_in: int, n_out: int) -> tuple[str, dict[str, int]]:
    kwargs = {"in_channels": n_in, "out_channels": n_out, "kernel_size": 3, "stride": 2, "padding": 1}
    return f"torch.nn.Conv{axes}d", kwargs


RELU = ("relu", "torch.nn.ReLU", {})
FLATTEN = ("flatten", "torch.nn.Flatten", {})
NORM = ("norm", "torch.nn.LayerNorm", {"normalized_shape": 20})
ENCODER = {"d_model": 16, "nhead": 2, "dim_feedforward": 20, "dropout": 0.0, "batch_first": True}
ATTENTION = ("encoder", "torch.nn.TransformerEncoderLayer", ENCODER)

# What case.json says under "model": a transformers class and its config, or the layers of an nn.Sequential.
MODELS: dict[str, dict[str, Any]] = {
    "bert": transformer("BertForSequenceClassification", "BertConfig", BERT | {"num_labels": 3}),
    "gpt2": transformer("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": transformer("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mixtral": transformer("MixtralForCausalLM", "MixtralConfig", MIXTRAL),
    "mlp": {"layers": [("lin0", *linear(10, 20)), RELU, NORM, ("lin1", *linear(20, 3))]},
    "embedding": {
        "layers": [
            ("emb", "torch.nn.Embedding", {"num_embeddings": 12, "embedding_dim": 5}),
            ("conv1d", "transformers.pytorch_utils.Conv1D", {"nf": 7, "nx": 5}),
            RELU,
            FLATTEN,
            ("lin0", *linear(28, 3)),
        ]
    },
    "conv1d": {"layers": [("conv", *conv(1, 3, 5)), RELU, FLATTEN, ("lin0", *linear(20, 3))]},
    "conv2d": {"layers": [("conv", *conv(2, 3, 5)), RELU, FLATTEN, ("lin0", *linear(45, 3))]},
    "conv3d": {"layers": [("conv", *conv(3, 2, 4)), RELU, FLATTEN, ("lin0", *linear(32, 3))]},
    "attention": {"layers": [ATTENTION, FLATTEN, ("lin0", *linear(80, 3))]},
}

# The shape of the input of each model that is no transformers model; "embedding" takes integers.
INPUTS = {
    "mlp": (4, 10),
    "embedding": (3, 4),
    "conv1d": (2, 3, 7),
    "conv2d": (2, 3, 5, 6),
    "conv3d": (2, 2, 4, 3, 3),
    "attention": (2, 5, 16),
}


class Case(NamedTuple):
    """One folder. `config` is for peft's class `kind`; so is `other`, for a second adapter of that name."""

    name: str
    model: str
    config: dict[str, Any]
    kind: str = "LoraConfig"
    other: dict[str, Any] | None = None
    versions: tuple[str, ...] = (OLD, NEW)
    safetensors: bool = True
    dtype: str = "float32"


def lora(*targets: str, r: int = 4, **kwargs: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": 6, "target_modules": list(targets), **kwargs}


def on_mlp(name: str, kind: str, **options: Any) -> Case:
    return Case(name, "mlp", {"target_modules": ["lin0"], **options}, kind, versions=(NEW,))


SEQ_CLS: dict[str, Any] = {"task_type": "SEQ_CLS"}
CAUSAL_LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
PATTERNS = {"rank_pattern": {"layer.0.attention.self.query": 2, "value": 3}}
PATTERNS |= {"alpha_pattern": {r"layer\.1\..*query": 9}}
EXPERTS = lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], **CAUSAL_LM)
BERT_LORA = lora("query", "value", lora_dropout=0.1, **SEQ_CLS)
PROMPT = {"num_virtual_tokens": 3, **CAUSAL_LM}
P_TUNING = PROMPT | {"encoder_hidden_size": 8}
PREFIX = P_TUNING | {"prefix_projection": True}
ADAPTION = {"adapter_len": 3, "adapter_layers": 2, **CAUSAL_LM}
ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9, "target_modules": ["query", "value"]}
IA3_CONV = {"target_modules": ["conv", "lin0"], "feedforward_modules": ["conv"]}
ONLY_OLD, ONLY_NEW = (OLD,), (NEW,)

CASES = [
    Case("bert-seqcls", "bert", BERT_LORA),
    Case("bert-seqcls-bin", "bert", BERT_LORA, safetensors=False),
    Case("gpt2-fan-in-fan-out", "gpt2", lora("c_attn", fan_in_fan_out=True, **CAUSAL_LM)),
    Case("llama-causal", "llama", lora("q_proj", "v_proj", **CAUSAL_LM)),
    Case("llama-layers-to-transform", "llama", lora("q_proj", layers_to_transform=[1], **CAUSAL_LM)),
    Case("mlp-bias-lora-only", "mlp", lora("lin0", bias="lora_only")),
    Case("mlp-bias-all", "mlp", lora("lin0", bias="all")),
    Case("mlp-modules-to-save", "mlp", lora("lin0", modules_to_save=["lin1"])),
    Case("mlp-two-adapters", "mlp", lora("lin0"), other=lora("lin0", "lin1", r=2)),
    Case("embedding-conv1d", "embedding", lora("emb", "conv1d", "lin0")),
    Case("conv2d", "conv2d", lora("conv", "lin0")),
    Case("conv1d", "conv1d", lora("conv", "lin0"), versions=ONLY_NEW),
    Case("conv3d", "conv3d", lora("conv", "lin0"), versions=ONLY_NEW),
    Case("mlp-rslora", "mlp", lora("lin0", "lin1", use_rslora=True), versions=ONLY_NEW),
    Case("bert-rank-alpha-pattern", "bert", BERT_LORA | PATTERNS, versions=ONLY_NEW),
    Case("mixtral-target-parameters", "mixtral", EXPERTS, versions=ONLY_NEW),
    Case("attention", "attention", lora("self_attn"), versions=ONLY_NEW),
    Case("mlp-bf16", "mlp", lora("lin0", "lin1"), dtype="bfloat16", versions=ONLY_NEW),
    Case("llama-bf16", "llama", lora("q_proj", "v_proj", **CAUSAL_LM), dtype="bfloat16", versions=ONLY_NEW),
    Case("llama-embedding", "llama", lora("embed_tokens", "q_proj", **CAUSAL_LM), versions=ONLY_NEW),
    Case("ia3-gpt2", "gpt2", CAUSAL_LM, "IA3Config"),
    Case("ia3-bert", "bert", SEQ_CLS, "IA3Config"),
    Case("ia3-conv2d", "conv2d", IA3_CONV, "IA3Config", versions=ONLY_NEW),
    Case("adalora-bert", "bert", ADALORA | SEQ_CLS, "AdaLoraConfig"),
    Case(
        "adalora-conv2d", "conv2d", ADALORA | {"target_modules": ["conv", "lin0"]}, "AdaLoraConfig", versions=ONLY_NEW
    ),
    Case(
        "lokr-bert",
        "bert",
        {"r": 2, "alpha": 3, "target_modules": ["query", "value"]} | SEQ_CLS,
        "LoKrConfig",
        versions=ONLY_NEW,
    ),
    on_mlp("loha-mlp", "LoHaConfig", r=2, alpha=3),
    on_mlp("c3a-mlp", "C3AConfig", block_size=5),
    on_mlp("fourierft-mlp", "FourierFTConfig", n_frequency=30),
    on_mlp("gralora-mlp", "GraloraConfig", r=4, hybrid_r=2, gralora_k=2),
    on_mlp("shira-mlp", "ShiraConfig", r=2),
    on_mlp("supertuning-mlp", "SupertuningConfig", sparsity=0.8, r=2),
    on_mlp("waveft-mlp", "WaveFTConfig", n_frequency=30, wavelet_family="db2"),
    on_mlp("boft-mlp", "BOFTConfig", boft_block_size=5),
    on_mlp("deft-mlp", "DeftConfig", r=3, decomposition_method="qr", alpha=6),
    on_mlp("delora-mlp", "DeloraConfig", r=2, delora_lambda=4),
    on_mlp("glora-mlp", "GloraConfig", r=2, config_A_B="vector", config_D_E="none"),
    on_mlp("hira-mlp", "HiraConfig", r=2),
    on_mlp("hra-mlp", "HRAConfig", r=2),
    on_mlp("miss-mlp", "MissConfig", r=4),
    on_mlp("road-mlp", "RoadConfig", variant="road_2", group_size=4),
    on_mlp("beft-mlp", "BeftConfig"),
    on_mlp("lora-bias-mlp", "LoraConfig", r=2, lora_bias=True),
    on_mlp("osf-mlp", "OSFConfig", effective_rank=3),
    on_mlp("peanut-mlp", "PeanutConfig", r=2, depth=1),
    on_mlp("psoft-mlp", "PsoftConfig", r=3),
    Case("vera-mlp", "mlp", {"r": 3, "target_modules": ["lin0", "lin1"]}, "VeraConfig", versions=ONLY_NEW),
    on_mlp("vblora-mlp", "VBLoRAConfig", r=2, num_vectors=6, vector_length=5),
    Case("ln-tuning-llama", "llama", CAUSAL_LM, "LNTuningConfig", versions=ONLY_NEW),
    Case(
        "tokens-llama",
        "llama",
        {"token_indices": [*range(0, 40, 3)]} | CAUSAL_LM,
        "TrainableTokensConfig",
        versions=ONLY_NEW,
    ),
    Case(
        "lora-tokens-llama",
        "llama",
        lora("q_proj", trainable_token_indices=[3, 7], **CAUSAL_LM),
        versions=ONLY_NEW,
    ),
    Case("dora-bert", "bert", BERT_LORA | {"use_dora": True}, versions=ONLY_NEW),
    Case("dora-conv2d", "conv2d", lora("conv", "lin0", use_dora=True), versions=ONLY_NEW),
    Case(
        "oft-bert", "bert", {"oft_block_size": 8, "target_modules": ["query"]} | SEQ_CLS, "OFTConfig", versions=ONLY_NEW
    ),
    Case("prompt-tuning-gpt2", "gpt2", PROMPT, "PromptTuningConfig"),
    Case("prompt-tuning-bert", "bert", PROMPT | SEQ_CLS, "PromptTuningConfig"),
    Case("p-tuning-gpt2", "gpt2", P_TUNING, "PromptEncoderConfig"),
    Case("prefix-tuning-gpt2", "gpt2", PROMPT, "PrefixTuningConfig"),
    Case("prefix-projected-llama", "llama", PREFIX, "PrefixTuningConfig", versions=ONLY_NEW),
    Case("adaption-prompt-llama", "llama", ADAPTION, "AdaptionPromptConfig", versions=ONLY_NEW),
    Case("adaption-prompt-gpt2", "gpt2", ADAPTION, "AdaptionPromptConfig", versions=ONLY_NEW),
]


def find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def fill(named: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Writes seeded noise into each tensor, around 1 where it scales: the same whatever the environment."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        scales = "ia3_" in name or (name.endswith("weight") and tensor.ndim == 1)
        with torch.no_grad():
            tensor.copy_(0.25 * torch.randn(tensor.shape, generator=generator) + float(scales))


def build(spec: dict[str, Any], dtype: str) -> nn.Module:
    if "layers" in spec:
        layers = [(name, find(path)(**kwargs)) for name, path, kwargs in spec["layers"]]
        model = nn.Sequential(OrderedDict(layers))
    else:
        model = find(spec["class"])(find(spec["config_class"])(**spec["config"]))
    fill(model.named_parameters(), seed=0)
    return model.eval().to(getattr(torch, dtype))


def make_input(case: Case) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    if case.model == "embedding":
        return {"0": torch.randint(12, INPUTS[case.model], generator=generator)}
    if case.model in INPUTS:
        return {"0": torch.randn(INPUTS[case.model], generator=generator).to(getattr(torch, case.dtype))}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(40, (2, 7), generator=generator), "attention_mask": mask}


def call(model: nn.Module, inputs: Tensors) -> Tensor:
    return model(inputs["0"]) if "0" in inputs else model(**inputs).logits


def trained(model: Any, adapter: str) -> Tensors:
    """The parameters that belong to one adapter; peft 0.5.0 leaves the copy of a saved module trainable."""
    others = {"original_module", *model.peft_config} - {adapter}
    found = model.named_parameters()
    return {name: p for name, p in found if p.requires_grad and not others & set(name.split("."))}


def adapted(case: Case, model: Any, adapter: str, folder: Path, inputs: Tensors) -> tuple[Tensor, Tensors]:
    """peft's output and its gradients by the keys of the file."""
    prompt = model.active_peft_config.is_prompt_learning
    if prompt:  # what is saved is the encoder's output, so the gradient is that of the file's own tensor
        model = peft.PeftModel.from_pretrained(build(MODELS[case.model], case.dtype), str(folder)).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(adapter in name.split("."))
    output = call(model, inputs)
    output.float().square().mean().backward()
    grads = {name: p.grad for name, p in trained(model, adapter).items() if p.grad is not None}
    every = model.named_parameters(remove_duplicate=False)  # what all layers share has several names
    grads |= {name: p.grad for name, p in every if name.startswith("base_model.vblora_") and p.grad is not None}
    if not prompt:
        buffers = dict(model.named_buffers(remove_duplicate=False))
        fixed = {name: one for name, one in buffers.items() if name.startswith("base_model.vera_")}  # it asks for them
        named = peft.get_peft_model_state_dict(model, state_dict=grads | fixed, adapter_name=adapter)
        # SHiRA's has its places.
        found = {key: grad for key, grad in named.items() if grad.is_floating_point()}
        return output, {key: grad for key, grad in found.items() if f"{key}.{adapter}" not in fixed}
    names = {name: name.replace(f".modules_to_save.{adapter}", "") for name in grads}
    return output, {"prompt_embeddings" if "prompt_" in n else names[n]: grad for n, grad in grads.items()}


def attention_by_hand(case: Case, folder: Path, inputs: Tensors) -> tuple[Tensor, Tensors]:
    """W + scaling·BA in the base: peft 0.21.2 adds the delta of out_proj twice in its forward."""
    model = build(MODELS[case.model], case.dtype)
    saved = load_file(folder / "adapter_model.safetensors")
    leaves = {key: leaf.requires_grad_() for key, leaf in saved.items()}
    weights: Tensors = dict(model.named_parameters())
    for path, weight in {"": "in_proj_weight", ".base_layer.out_proj": "out_proj.weight"}.items():
        a, b = (leaves[f"base_model.model.encoder.self_attn{path}.lora_{side}.weight"] for side in "AB")
        name = f"encoder.self_attn.{weight}"
        weights[name] = weights[name] + case.config["lora_alpha"] / case.config["r"] * b @ a
    output = torch.func.functional_call(model, weights, (inputs["0"],))
    output.float().square().mean().backward()
    return output, {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def save_expected(path: Path, inputs: Tensors, base_output: Tensor, output: Tensor, grads: Tensors) -> None:
    tensors = {f"input.{name}": value for name, value in inputs.items()}
    tensors |= {"base_output": base_output, "output": output}
    tensors |= {f"grad.{key}": grad for key, grad in grads.items()}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def adapters_of(case: Case) -> dict[str, str]:
    return {"default": "."} if case.other is None else {"default": ".", "other": "other"}


def describe(case: Case) -> str:
    made_by = {module.__name__: module.__version__.split("+")[0] for module in (peft, torch, transformers)}
    about = {"made_by": made_by, "adapters": adapters_of(case), "dtype": case.dtype}
    return json.dumps(about | {"model": MODELS[case.model]}, indent=2) + "\n"


def make(case: Case, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = build(MODELS[case.model], case.dtype)
    inputs = make_input(case)
    base_output = call(base, inputs)
    (folder / "case.json").write_text(describe(case))
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    save_file(state, folder / "base.safetensors")

    config_class = getattr(peft, case.kind)
    model = peft.get_peft_model(base, config_class(**case.config))
    if case.other is not None:
        model.add_adapter("other", config_class(**case.other))
    for seed, adapter in enumerate(adapters_of(case), start=2):
        model.set_adapter(adapter)
        fill(trained(model, adapter).items(), seed)
    model.eval().save_pretrained(str(folder), safe_serialization=case.safetensors)
    (folder / "README.md").unlink()

    for adapter, sub in adapters_of(case).items():
        model.set_adapter(adapter)
        if case.model == "attention":
            output, grads = attention_by_hand(case, folder, inputs)
        else:
            output, grads = adapted(case, model, adapter, folder, inputs)
        save_expected(folder / sub / "expected.safetensors", inputs, base_output, output, grads)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes adapter folders with the peft that is installed.")
    parser.add_argument("folder", type=Path, help="where peft-<version>/<case> goes: tests/files")
    folder = parser.parse_args().folder / f"peft-{peft.__version__}"
    if peft.__version__ not in (OLD, NEW):
        raise SystemExit(f"peft {peft.__version__} is installed; the cases are for peft {OLD} or {NEW}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for case in CASES:
        if peft.__version__ in case.versions:
            make(case, folder / case.name)
            size = sum(path.stat().st_size for path in (folder / case.name).rglob("*") if path.is_file())
            print(f"{folder / case.name}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
