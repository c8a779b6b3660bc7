"""What else people do with Trainer: generation, callbacks, other options of saving, wrappers around the model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
import transformers
from bases import BASES, bert, ids
from binding import adapter_for
from oracle import IS_TRANSFORMERS_4
from safetensors.torch import load_file
from same import assert_same_tensors, flat
from snapshot import snapshot
from test_trainer import folder, own_precision  # noqa: F401  # fixtures
from torch import Tensor, nn
from trainers import CASES, EVERY, STEPS

import peftfn as pf

# --- Seq2SeqTrainer --------------------------------------------------------------------------------------------------


def t5() -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    sizes |= {"tie_word_embeddings": False, "initializer_factor": 3.0, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


SEQ2SEQ: dict[str, Any] = {
    "lora": lambda: pf.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
    "prompt": lambda: pf.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq_trainer_generates_what_the_bound_model_does(name: str, half: bool, tmp_path: Path) -> None:
    model = t5()
    bound = pf.bind(model, pf.init(model, SEQ2SEQ[name]()))
    data = [{"input_ids": row, "attention_mask": [1] * 6, "labels": row[:4]} for row in ids(10, 6).tolist()]
    how: dict[str, Any] = {"predict_with_generate": True, "generation_max_length": 7, "bf16": half}
    how |= {"load_best_model_at_end": True, "metric_for_best_model": "starts"}
    given: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        given.append(found.predictions)
        return {"starts": float(found.predictions[:, 1].mean())}

    run = trainers.trainer(bound, tmp_path, cls=transformers.Seq2SeqTrainer, data=data, **how)
    run.compute_metrics = metrics
    run.train()
    assert len(given) == STEPS // EVERY
    predicted = torch.from_numpy(run.predict(data).predictions)
    batch = {key: torch.tensor([row[key] for row in data]) for key in ("input_ids", "attention_mask")}
    fresh = pf.bind(model, pf.unbind(bound)).eval()
    if half:  # accelerate's: the forward alone, and not the encoder's, which generate calls first
        fresh.forward = functools.wraps(fresh.forward)(torch.autocast("cpu", torch.bfloat16)(fresh.forward))
    alone = fresh.generate(**batch, max_length=7)
    assert torch.equal(predicted[:, : alone.shape[1]], alone)
    assert not predicted[:, alone.shape[1] :].any()  # Trainer pads them to the length that the config says
    again = pf.load(run.state.best_model_checkpoint, model)
    assert_same_tensors(flat(pf.unbind(bound)), flat(again))


# --- callbacks -------------------------------------------------------------------------------------------------------


class Looking(transformers.TrainerCallback):
    """Looks at the model as a callback does, and writes the adapter by itself."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.seen: list[pf.Adapter] = []

    def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any = None, **_given: Any) -> None:
        adapter = pf.unbind(model)
        model.save_pretrained(self.output / str(state.global_step))
        self.seen.append(
            adapter.replace(params={p: {n: t.clone() for n, t in leaf.items()} for p, leaf in adapter.params.items()})
        )
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pf.count(adapter)[0]


def test_a_callback_sees_the_adapter_as_it_is_then(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    look = Looking(tmp_path / "seen")
    trainers.trainer(trainers.bound(folder, CASES["lora"]), tmp_path / "run", look, max_steps=3).train()
    assert [path.name for path in sorted(look.output.iterdir())] == ["1", "2", "3"]
    for step, adapter in enumerate(look.seen, 1):
        assert_same_tensors(flat(pf.load(look.output / str(step))), flat(adapter))
        written = {path.name for path in (look.output / str(step)).iterdir()}
        assert written == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    first, *_, last = look.seen
    assert not torch.equal(*(one.params["model.layers.0.self_attn.q_proj"]["lora_B"] for one in (first, last)))


def test_early_stopping_stops_and_goes_back_to_the_best(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    model = trainers.bound(folder, CASES["lora and a head"])
    how: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    run = trainers.trainer(model, tmp_path, stop, max_steps=20, **how)
    run.train()
    assert run.state.global_step == 2 * EVERY
    assert_same_tensors(flat(pf.unbind(model)), flat(pf.load(tmp_path / f"checkpoint-{EVERY}")))


# --- options of saving -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")  # transformers 4, where checkpoints come fast
def test_old_checkpoints_go_and_the_last_one_is_gone_on_from(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    run = trainers.trainer(trainers.bound(folder, CASES["lora"]), tmp_path, save_total_limit=1)
    run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    run.save_model(str(tmp_path / "end"))
    assert_same_tensors(flat(pf.load(tmp_path / "end")), flat(pf.unbind(run.model)))
    assert "model.safetensors" in {path.name for path in (tmp_path / "end").iterdir()}
    assert "config.json" not in {path.name for path in (tmp_path / "end").iterdir()}


def test_a_checkpoint_of_the_model_alone_is_loaded(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    first = trainers.bound(folder, CASES["lora"])
    trainers.trainer(first, tmp_path, save_only_model=True, max_steps=EVERY).train()
    checkpoint = tmp_path / f"checkpoint-{EVERY}"
    assert not (checkpoint / "optimizer.pt").exists()
    model = trainers.bound(folder, CASES["lora"], seed=1)
    run = trainers.trainer(model, tmp_path, max_steps=EVERY, learning_rate=0.0)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert_same_tensors(flat(pf.unbind(model)), flat(pf.unbind(first)))


@pytest.mark.skipif(not IS_TRANSFORMERS_4, reason="transformers 5 writes safetensors alone")
def test_checkpoints_without_safetensors_are_gone_on_from(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = trainers.trainer(trainers.bound(folder, CASES["lora"]), tmp_path / "whole", save_safetensors=False)
    whole.train()
    cut = trainers.bound(folder, CASES["lora"])
    run = trainers.trainer(cut, tmp_path / "cut", trainers.Cut(EVERY + 1), save_safetensors=False)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    model = trainers.bound(folder, CASES["lora"], seed=1)
    trainers.trainer(model, tmp_path / "cut", save_safetensors=False).train(resume_from_checkpoint=True)
    assert_same_tensors(flat(pf.unbind(model)), flat(pf.unbind(whole.model)))


def test_trainers_file_never_takes_the_place_of_a_model(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    output = trainers.write_base(tmp_path / "base")
    before = (output / "model.safetensors").read_bytes()
    run = trainers.trainer(trainers.bound(output, CASES["lora"]), tmp_path / "run", max_steps=1)
    with pytest.raises(FileExistsError, match=r"model\.safetensors holds the weights of a model"):
        run.save_model(str(output))
    assert (output / "model.safetensors").read_bytes() == before
    assert not list(output.glob("adapter_*"))
    run.save_model(str(tmp_path / "run"))
    run.save_model(str(tmp_path / "run"))  # its own it replaces


def test_a_stack_is_not_saved_by_trainer(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    model = trainers.base(folder, CASES["lora"])
    adapters = [pf.init(model, CASES["lora"].config()) for _ in range(2)]
    run = trainers.trainer(pf.bind(model, pf.stack(adapters), index=[0, 1]), tmp_path, max_steps=EVERY)
    with pytest.raises(TypeError, match=r"bound to a stack.*peftfn\.save\(adapter, folder\)"):
        run.train()


def test_two_adapters_are_saved_in_a_folder_each_and_gone_on_from(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    model = trainers.base(folder, CASES["lora"])

    def two(seed: int) -> Any:
        drawn = torch.Generator().manual_seed(seed)
        return pf.bind(model, tuple(pf.init(model, CASES[name].config(), generator=drawn) for name in ("lora", "ia3")))

    whole = trainers.trainer(two(0), tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainers.trainer(two(0), tmp_path / "cut", trainers.Cut(EVERY + 1)).train()
    resumed = two(1)
    trainers.trainer(resumed, tmp_path / "cut").train(resume_from_checkpoint=True)
    for number, (one, other) in enumerate(zip(pf.unbind(resumed), pf.unbind(whole.model), strict=True)):
        assert_same_tensors(flat(one), flat(other))
        place = tmp_path / "cut" / f"checkpoint-{STEPS}"
        assert_same_tensors(flat(pf.load(place, model, adapter_name=f"adapter_{number}")), flat(one))
    with pytest.raises(FileNotFoundError, match=r"Its sub-folders adapter_0, adapter_1 hold one"):
        pf.load(place)


# --- what moves beside the adapter -----------------------------------------------------------------------------------


def test_the_statistics_of_a_batchnorm_are_gone_on_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 2}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type="basic", **sizes))
    adapter = adapter_for(model, {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"]})
    images, x = torch.randn(3, 3, 16, 16), torch.randn(2, 3, 16, 16)
    bound, again, before = pf.bind(model, adapter), pf.bind(model, pf.init(model, adapter.config)), snapshot(model)
    bound.train()(images)
    bound.save_pretrained(tmp_path, state_dict=None)
    result = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(again.eval()(x).logits, bound.eval()(x).logits)
    assert not torch.equal(bound(x).logits, pf.bind(model, adapter).eval()(x).logits)
    assert snapshot(model) == before


# --- modules inside --------------------------------------------------------------------------------------------------


class Sentences(nn.Module):
    """A transformers model inside another module, that is saved by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = model

    def forward(self, **batch: Any) -> Tensor:
        """A vector for each row."""
        return self.encoder(**batch).last_hidden_state.mean(1)


class Wrapper(Sentences):
    """The same, that passes on what it does not have."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.encoder, name)


@pytest.mark.parametrize("cls", [Sentences, Wrapper])
def test_a_module_inside_a_bound_one_writes_merged_weights(cls: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = cls(bert("Model")()).eval(), {"input_ids": ids(3, 5)}
    adapter = adapter_for(model, {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]})
    bound, before = pf.bind(model, adapter), snapshot(model)
    (bound if cls is Wrapper else bound.encoder).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again, seen = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(seen.values())
    expected = bound(**batch)
    torch.testing.assert_close(cls(again.eval())(**batch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, model(**batch), rtol=1e-3, atol=1e-3)
    assert snapshot(model) == before


def test_a_part_of_a_bound_transformers_model_writes_merged_weights(tmp_path: Path) -> None:
    base = BASES["llama tied"]
    model, batch = base.make(), base.inputs()
    bound = pf.bind(model, adapter_for(model, {"target_modules": ["q_proj", "embed_tokens"]}))
    bound.model.save_pretrained(tmp_path)
    again = type(model.model).from_pretrained(tmp_path).eval()
    states = (one(**batch).last_hidden_state for one in (again, bound.model))
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    prompt = pf.bind(model, pf.init(model, CASES["prompt"].config()))
    with pytest.raises(ValueError, match="cannot be merged"):
        prompt.model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


# --- options of save_pretrained --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"variant": "fp16"}, {"save_peft_format": False}, {"selected_adapters": ["default"]}]
)
def test_an_option_without_meaning_for_an_adapter_is_refused(option: dict[str, Any], tmp_path: Path) -> None:
    model = BASES["llama"].make()
    bound = pf.bind(model, adapter_for(model, {"target_modules": ["q_proj"]}))
    with pytest.raises(TypeError, match=rf"{next(iter(option))}=.* has no meaning there; with merge=True"):
        bound.save_pretrained(tmp_path, **option)
    assert not list(tmp_path.iterdir())


def test_only_the_main_process_writes_and_the_base_is_named(tmp_path: Path) -> None:
    made = trainers.write_base(tmp_path / "base")
    model = trainers.base(made, CASES["lora"])
    adapter = pf.init(model, CASES["lora"].config())
    unnamed = pf.LoraConfig.from_dict({**adapter.config.to_dict(), "base_model_name_or_path": None})
    bound = pf.bind(model, adapter.replace(config=unnamed))
    bound.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    bound.save_pretrained(tmp_path / "adapter", max_shard_size="1MB", safe_serialization=True)
    assert pf.load(tmp_path / "adapter").config.base_model_name_or_path == str(made)
    with pytest.raises(TypeError, match="bound to no adapter: merge=True writes the model"):
        pf.bind(model, ()).save_pretrained(tmp_path / "none")


@pytest.mark.parametrize("name", ["lora", "lora on nf4"])
def test_the_whole_state_and_the_adapters_alone_are_loaded(name: str, folder: Path) -> None:  # noqa: F811
    model = trainers.base(folder, CASES[name])
    bound, other = (pf.bind(model, pf.init(model, CASES[name].config())) for _ in range(2))
    before = snapshot(model)
    state = {key: tensor.clone() for key, tensor in bound.state_dict().items()}
    own = {key: tensor + 1 for key, tensor in state.items() if "lora_" in key}
    assert str(other.load_state_dict(state | own)) == "<All keys matched successfully>"
    assert torch.equal(
        flat(pf.unbind(other))["params model.layers.0.self_attn.q_proj lora_A"],
        own["model.layers.0.self_attn.q_proj.lora_A"],
    )
    result = bound.load_state_dict(own, strict=False)
    assert all(key.endswith(".scaling") for key in result.missing_keys)
    assert result.unexpected_keys == []
    assert_same_tensors(flat(pf.unbind(bound)), flat(pf.unbind(other)))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        bound.load_state_dict(own)
    spoilt = "model.layers.0.mlp.up_proj.weight" + (".absmax" if "nf4" in name else "")
    with pytest.raises(RuntimeError, match=r"up_proj\.weight is not what the base has"):
        bound.load_state_dict(state | {spoilt: state[spoilt] + 1})
    assert snapshot(model) == before


def test_a_merged_model_of_a_quantized_base_is_dense_and_exact(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    model = trainers.base(folder, CASES["lora on nf4"])
    bound = pf.bind(model, adapter_for(model, {"target_modules": ["q_proj", "up_proj"]}))
    before, expected = snapshot(model), trainers.logits(bound)
    bound.save_pretrained(tmp_path, merge=True)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not getattr(again, "is_quantized", False)
    assert all(type(module) is not type(model.model.layers[0].mlp.up_proj) for module in again.modules())
    assert bound.config.quantization_config is not None
    assert snapshot(model) == before
    # W + BA in one product, where the bound model adds two.
    torch.testing.assert_close(trainers.logits(again), expected, rtol=1e-4, atol=1e-5)
