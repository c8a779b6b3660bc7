"""Every method under every transform on every model: run, held against the plain loop, and written as a table.

`make transforms` writes docs/transforms.md. A cell says `ok` where the transform gives the same numbers as calls one
by one, and otherwise what was said or how far off it is.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import registry
import torch
import torch.utils._pytree as pytree
import transformers
from lib.limits import LIMITS, Limit
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftfn as pf

PAGE = Path(__file__).parent.parent / "docs" / "transforms.md"
TOLERANCE = 1e-5  # of the largest value: the same sums in another order, in float32
BACKEND = "aot_eager"  # Dynamo traces forward and backward whole; no kernels are generated, which takes minutes

METHODS = {
    title: functools.partial(method.make, **options)
    for method in registry.METHODS
    for title, options in (method.variants or {method.title: {}}).items()
}


def llama() -> nn.Module:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def bert() -> nn.Module:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 40, "max_position_embeddings": 32}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def gpt2() -> nn.Module:
    sizes: Any = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.loss_type = "ForCausalLM"  # without it the model logs, which Dynamo cannot trace (see limits.py)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Llama": (llama, "CAUSAL_LM"),
    "BERT": (bert, "SEQ_CLS"),
    "GPT-2": (gpt2, "CAUSAL_LM"),
}


def batch(task: str) -> dict[str, Tensor]:
    """Four rows, one padded on the right, one on the left, with labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 40, (4, 6), generator=generator)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = mask[1, :2] = 0
    labels = ids.masked_fill(mask == 0, -100) if task == "CAUSAL_LM" else torch.tensor([0, 1, 1, 0])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def moved(adapter: pf.Adapter, seed: int) -> pf.Adapter:
    """The adapter with noise everywhere, so that nothing is at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    noise = pytree.tree_map(lambda tensor: 0.3 * torch.randn(tensor.shape, generator=generator), adapter.params)
    return adapter.replace(params=pytree.tree_map(torch.add, adapter.params, noise))


class Setting:
    """One method on one model: its loss as a function of the adapter's parameters."""

    def __init__(self, method: str, model: str) -> None:
        make, task = MODELS[model]
        torch.manual_seed(0)
        self.model = make().eval()
        fresh = pf.init(self.model, METHODS[method](task_type=task))
        self.adapters = [moved(fresh, seed) for seed in range(3)]
        self.params = self.adapters[0].params
        self.batch = batch(task)

    def loss(self, params: Any, given: Mapping[str, Tensor]) -> Tensor:
        """The loss of the first adapter with these parameters."""
        return pf.apply(self.model, self.adapters[0].replace(params=params), given).loss

    def row(self, params: Any, row: Mapping[str, Tensor]) -> Tensor:
        """The same of one row."""
        return self.loss(params, {name: tensor[None] for name, tensor in row.items()})

    def plain_gradient(self, given: Mapping[str, Tensor]) -> Any:
        """The gradient by `loss.backward()`."""
        params = pytree.tree_map(lambda tensor: tensor.clone().requires_grad_(), self.params)
        self.loss(params, given).backward()
        return pytree.tree_map(lambda tensor: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, params)


def by_grad(at: Setting) -> tuple[Any, Any]:
    """The gradient, and the one of `backward()`."""
    return grad(at.loss)(at.params, at.batch), at.plain_gradient(at.batch)


def by_vmap(at: Setting) -> tuple[Any, Any]:
    """The logits of three adapters at once, and one by one."""
    together = vmap(lambda adapter: pf.apply(at.model, adapter, at.batch).logits)(pf.stack(at.adapters))
    return together, torch.stack([pf.apply(at.model, adapter, at.batch).logits for adapter in at.adapters])


def by_vmap_of_grad(at: Setting) -> tuple[Any, Any]:
    """The gradient of each row, padded ones too, at once, and one by one."""
    together = vmap(grad(at.row), in_dims=(None, 0))(at.params, at.batch)
    rows = [at.plain_gradient({name: tensor[n : n + 1] for name, tensor in at.batch.items()}) for n in range(4)]
    return together, pytree.tree_map(lambda *each: torch.stack(each), *rows)


def by_jvp(at: Setting) -> tuple[Any, Any]:
    """The slope along the plain gradient, and that gradient's square."""
    gradient = at.plain_gradient(at.batch)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels have no forward-mode derivative
        slope = jvp(lambda params: at.loss(params, at.batch), (at.params,), (gradient,))[1]
    return slope, torch.stack([one.square().sum() for one in pytree.tree_leaves(gradient)]).sum()


def by_compile(at: Setting) -> tuple[Any, Any]:
    """Loss and gradient as one graph, and as they are."""
    torch.compiler.reset()
    step = grad_and_value(at.loss)
    return torch.compile(step, fullgraph=True, backend=BACKEND)(at.params, at.batch), step(at.params, at.batch)


# What each one computes, and the same from calls one by one.
TRANSFORMS: dict[str, Callable[[Setting], tuple[Any, Any]]] = {
    "grad": by_grad,
    "vmap": by_vmap,
    "vmap(grad)": by_vmap_of_grad,
    "jvp": by_jvp,
    "compile(fullgraph=True)": by_compile,
}


def distance(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value expected."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    largest = max(float(other.abs().max()) for _, other in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


def said(error: Exception) -> str:
    """The first sentence of an error, for a cell."""
    text = " ".join(str(error).split()).replace("|", "\\|")
    return text.split(". ")[0].split(" Explanation:")[0].rstrip(".")


def cell(method: str, model: str, transform: str) -> str:
    """`ok`, or why not."""
    try:
        at = Setting(method, model)
        away = distance(*TRANSFORMS[transform](at))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return said(error)
    return "ok" if away < TOLERANCE else f"off by {away:.0e}"


def limit_row(limit: Limit) -> str:
    """One row of the second table: what torch or transformers says, and that the way round it works."""
    try:
        limit.fails()
        message = "works by now"
    except (RuntimeError, NotImplementedError) as error:
        message = said(error)
    limit.works()
    return f"| {limit.what} | {message} | {limit.instead} |"


HEAD = """# Methods under transforms

Written by `make transforms`, which runs each cell with torch {torch} and transformers {transformers}. `ok`: the
transform gave the same numbers as calls one by one, to {tolerance} of the largest. The batch has rows padded on
either side; `vmap` maps over three adapters, `vmap(grad)` over rows, and `compile` is of a whole training step
(`grad_and_value`, one graph).

"""
VERSIONS: dict[str, Any] = {
    "torch": torch.__version__.split("+")[0],
    "transformers": transformers.__version__,
    "tolerance": f"{TOLERANCE:.0e}",
}
TAIL = """
## What torch and transformers do not do

Each row was run too: the second column is what was said, the third is a way that works.

| | what is said | instead |
|---|---|---|
{limits}

Under `vmap`, torch's own fused attention on CPU is a loop with a warning. In `apply` the `sdpa` attention of
transformers is one call of the same kernel; in a model that calls torch's function itself it is that loop, and with
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` it is batched.
"""


def kept(page: str) -> dict[tuple[str, str], str]:
    """The table's lines by method and model, of a page that the same libraries made."""
    if HEAD.format(**VERSIONS) not in page:
        return {}
    lines = [line for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 1 + len(TRANSFORMS)]
    found = {tuple(line.strip("| ").split(" | ")[:2]): line for line in lines}
    return {(method, model): line for (method, model), line in found.items() if method in METHODS and model in MODELS}


def line(method: str, model: str) -> str:
    """One line of the table, from running its cells."""
    cells = [cell(method, model, transform) for transform in TRANSFORMS]
    print(f"{method:25}{model:8}" + "  ".join(f"{one:24.60}" for one in cells), flush=True)
    if len(set(cells)) == 1 and cells[0] != "ok":
        cells = [cells[0], *[""] * (len(cells) - 1)]
    return f"| {method} | {model} | {' | '.join(cells)} |"


def write(output: Path, lines: dict[tuple[str, str], str]) -> None:
    """Write the page, after each line that is run: one that was stopped goes on with `--missing`."""
    tail = TAIL.format(limits="\n".join(map(limit_row, LIMITS)))
    columns = f"| | | {' | '.join(TRANSFORMS)} |\n|---|---|{'---|' * len(TRANSFORMS)}\n"
    for place in itertools.product(METHODS, MODELS):
        if place not in lines:
            lines[place] = line(*place)
            there = [lines[one] for one in itertools.product(METHODS, MODELS) if one in lines]
            output.write_text(HEAD.format(**VERSIONS) + columns + "\n".join(there) + "\n" + tail, encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", type=Path, default=PAGE)
    arguments.add_argument("--missing", action="store_true", help="run the lines that the page lacks")
    asked = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    write(asked.output, kept(asked.output.read_text(encoding="utf-8")) if asked.missing else {})
    print(f"written to {asked.output}")
