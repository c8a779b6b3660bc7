"""transformers' Trainer on bound models: small bases on disk, what is trained there, and runs that are cut short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from bases import WIDE
from torch import Tensor

import peftfn as pf

WORDS = 40
STEPS = 6
EVERY = 2  # steps between two checkpoints
TARGETS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


class Case(NamedTuple):
    """What is trained.

    Attributes:
        config: makes the adapter's config.
        quantized: whether the base is loaded in nf4.
    """

    config: Callable[[], Any]
    quantized: bool = False


def lora(**options: Any) -> Any:
    return pf.LoraConfig(**TARGETS, task_type="CAUSAL_LM", **options)


CASES: dict[str, Case] = {
    "lora": Case(lora),
    "prompt": Case(lambda: pf.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "lora and a head": Case(lambda: lora(modules_to_save=["lm_head"])),
    "lora on nf4": Case(lora, quantized=True),
    "p-tuning": Case(
        lambda: pf.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
    ),
    "ia3": Case(lambda: pf.IA3Config(task_type="CAUSAL_LM")),
}
FOUR = list(CASES)[:4]


def write_base(folder: Path) -> Path:
    """A small Llama; its layers are as wide as one block of nf4."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": WORDS}
    sizes |= {"num_attention_heads": 4, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | WIDE)).save_pretrained(folder)
    return folder


def base(folder: Path, case: Case) -> Any:
    """The base from its folder."""
    options: dict[str, Any] = {}
    if case.quantized:
        how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"quantization_config": how, "device_map": "cpu"}
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def bound(folder: Path, case: Case, seed: int = 0) -> Any:
    """A fresh adapter on the base, bound."""
    model = base(folder, case)
    return pf.bind(model, pf.init(model, case.config(), generator=torch.Generator().manual_seed(seed)))


def rows(count: int = 10) -> list[dict[str, Any]]:
    """Sentences of ids, each its own label."""
    drawn = torch.randint(2, WORDS, (count, 5), generator=torch.Generator().manual_seed(3)).tolist()
    return [{"input_ids": row, "labels": row} for row in drawn]


def trainer(model: Any, folder: Path, *callbacks: Any, cls: Any = None, data: Any = None, **options: Any) -> Any:
    """A Trainer that writes a checkpoint and evaluates every two steps."""
    kind = "Seq2SeqTrainingArguments" if cls is transformers.Seq2SeqTrainer else "TrainingArguments"
    given: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 0.01}
    given |= {"logging_steps": 1, "save_steps": EVERY, "eval_steps": EVERY, "eval_strategy": "steps"}
    given |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, **options}
    arguments = getattr(transformers, kind)(output_dir=str(folder), **given)
    data = cast("Any", rows() if data is None else data)
    make = cls or transformers.Trainer
    return make(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks))


class Cut(transformers.TrainerCallback):
    """Ends the run in the middle of it, as a person would who presses Ctrl-C."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_given: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def losses(run: Any) -> dict[int, float]:
    """The training loss of each step."""
    return {row["step"]: row["loss"] for row in run.state.log_history if "loss" in row}


def evaluated(run: Any) -> dict[int, float]:
    """The evaluation loss at each step that has one."""
    return {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}


def logits(model: Any) -> Tensor:
    """What the module makes of a few sentences, in evaluation."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([row["input_ids"] for row in rows(3)])).logits
