"""`bind`: the same class, paths and outputs as `apply`; only the adapter trains; nothing reaches the base."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
import transformers
from bases import BASES, WORDS, Base, ids, randn, text
from oracle import called, outputs, randomised
from snapshot import snapshot
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peftfn as pf

LLAMA = BASES["llama"]
ATTENTION: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


class Recurrent(nn.Module):
    """An embedding that renormalises, an LSTM that reads its weights from a list, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 6, padding_idx=0, max_norm=1.0)
        self.memory = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, 3)."""
        return self.head(self.memory(self.table(ids))[0])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def albert() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": WORDS, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 3}
    return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**sizes))


class Row(NamedTuple):
    """A base and what is adapted there."""

    base: Base
    options: dict[str, Any]


ROWS: dict[str, Row] = {
    "mlp": Row(BASES["mlp"], {"target_modules": ["0", "3"], "modules_to_save": ["5"]}),
    "convnet": Row(BASES["convnet"], {"target_modules": ["4", "8"], "bias": "lora_only"}),
    "conv1d": Row(BASES["words"], {"target_modules": ["0", "1", "3"], "lora_dropout": 0.1}),
    "lstm": Row(Base(Recurrent, lambda: ids(3, 5)), {"target_modules": ["table"], "modules_to_save": ["memory"]}),
    "encoder": Row(Base(encoder, randn(3, 4, 8)), {"target_modules": ["self_attn", "linear1"]}),
    "llama": Row(LLAMA, ATTENTION | {"modules_to_save": ["norm"]}),
    "llama tied": Row(BASES["llama tied"], {"target_modules": ["q_proj", "embed_tokens"]}),
    "bert": Row(BASES["bert"], {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "t5": Row(BASES["t5"], {"target_modules": ["q", "embed_tokens"]}),
    "vit": Row(BASES["vit"], {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "mixtral": Row(BASES["mixtral"], {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "albert": Row(Base(albert, text), {"target_modules": ["query", "value"], "bias": "all"}),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))


def adapter_for(model: nn.Module, options: dict[str, Any], seed: int = 0) -> pf.Adapter:
    return randomised(pf.init(model, pf.LoraConfig(**{"r": 2} | options)), seed)


def names_of(model: nn.Module, adapter: pf.Adapter) -> list[str]:
    """What a single adapter's trained tensors are called in a bound module, in the order of `pf.leaves`."""
    modules = dict(model.named_modules())
    joined = {path: f"{path}." if path in modules else f"{path}_" for path in adapter.params}
    return [joined[path] + name for path, leaf in adapter.params.items() for name in leaf]


def trained_names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return outputs(called(model, batch))


def applied(model: nn.Module, adapter: Any, batch: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return outputs(pf.apply(model, adapter, batch))


def flat(adapter: pf.Adapter) -> list[Tensor]:
    return [tensor for leaf in adapter.params.values() for tensor in leaf.values()]


# --- what it is ------------------------------------------------------------------------------------------------------


@rows
def test_a_bound_model_has_the_class_and_the_paths_of_the_base(row: Row) -> None:
    model = row.base.make()
    adapter = adapter_for(model, row.options)
    bound = pf.bind(model, adapter)
    assert type(bound) is type(model)
    ours, theirs = bound.state_dict(), model.state_dict()
    assert [name for name in ours if name in theirs] == list(theirs)
    assert set(ours) - set(theirs) == {name for name in ours if "lora" in name or "scaling" in name}
    own = set(names_of(model, adapter))
    assert all(ours[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters() if name not in own)


@rows
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_bound_model_computes_what_apply_does(row: Row, train: bool) -> None:
    model, batch = row.base.make().train(train), row.base.inputs()
    adapter = adapter_for(model, row.options)
    bound = pf.bind(model, adapter)
    before = snapshot(model)
    with torch.no_grad():  # where something requires grad, attention takes another kernel
        assert torch.equal(output(bound, batch), applied(model, adapter, batch))
        if not train:
            assert not torch.equal(output(bound, batch), applied(model, (), batch))
    assert snapshot(model) == before


@rows
def test_only_the_adapters_tensors_train_and_their_gradients_are_those_of_apply(row: Row) -> None:
    model, batch = row.base.make(), row.base.inputs()
    adapter = adapter_for(model, row.options)
    leaves = pf.leaves(adapter)
    expected = torch.autograd.grad(applied(model, adapter, batch).square().mean(), leaves, materialize_grads=True)
    for flag in (True, False):
        bound = pf.bind(model.requires_grad_(flag), adapter)
        parameters = dict(bound.named_parameters())
        assert trained_names(bound) == set(names_of(model, adapter))
        before = snapshot(model)
        output(bound, batch).square().mean().backward()
        assert snapshot(model) == before
        assert all(p.grad is None for p in bound.parameters() if not p.requires_grad)
        for name, grad in zip(names_of(model, adapter), expected, strict=True):
            found = parameters[name].grad
            torch.testing.assert_close(torch.zeros_like(grad) if found is None else found, grad)


def test_an_optimizer_on_a_bound_model_trains_the_adapter_in_place_and_nothing_else() -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    adapter = adapter_for(model, ATTENTION)
    start, before, bound = [t.clone() for t in flat(adapter)], snapshot(model), pf.bind(model, adapter)
    optimizer = torch.optim.AdamW(bound.parameters(), lr=0.1, weight_decay=0.5)
    output(bound, batch).square().mean().backward()
    optimizer.step()
    assert snapshot(model) == before
    assert not any(map(torch.equal, flat(adapter), start))
    assert all(map(torch.equal, flat(pf.unbind(bound)), flat(adapter)))
    with torch.no_grad():
        assert torch.equal(output(bound, batch), applied(model, pf.unbind(bound), batch))


def test_unbind_gives_the_adapter_as_the_module_has_it_after_it_was_moved() -> None:
    model = LLAMA.make()
    adapter = adapter_for(model, ATTENTION)
    bound = pf.bind(model, adapter).to(torch.float64)
    with torch.no_grad():
        bound.model.layers[0].self_attn.q_proj.lora_B.add_(1)
    now = pf.unbind(bound)
    assert now.config == adapter.config
    assert list(now.params) == list(adapter.params)
    site = "model.layers.0.self_attn.q_proj"
    assert torch.equal(now.params[site]["lora_B"], adapter.params[site]["lora_B"].double() + 1)
    assert flat(adapter)[0].dtype == torch.float32


def test_several_adapters_are_bound_together_and_none_is_a_plain_copy() -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    several = (adapter_for(model, ATTENTION), adapter_for(model, {"r": 3, "target_modules": ["q_proj", "o_proj"]}, 1))
    bound, bare = pf.bind(model, several), pf.bind(model, ())
    with torch.no_grad():
        assert torch.equal(output(bound, batch), applied(model, several, batch))
        assert torch.equal(output(bare, batch), output(model, batch))
    assert pf.unbind(bare) == ()
    assert trained_names(bare) == set()
    assert len(trained_names(bound)) == sum(len(flat(one)) for one in several)
    for one, other in zip(several, pf.unbind(bound), strict=True):
        assert one.config == other.config
        assert all(map(torch.equal, flat(one), flat(other)))


def test_an_adapter_that_is_bound_twice_over_has_each_tensor_once() -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    adapter = adapter_for(model, ATTENTION)
    bound = pf.bind(model, (adapter, adapter))
    assert len([p for p in bound.parameters() if p.requires_grad]) == len(flat(adapter))
    with torch.no_grad():
        assert torch.equal(output(bound, batch), applied(model, (adapter, adapter), batch))


# --- what never reaches the base -------------------------------------------------------------------------------------


def hooked(bound: Any) -> None:
    for module in bound.modules():
        module.register_forward_hook(lambda module, inputs, result: None)
        module.register_full_backward_hook(lambda module, grads, given: None)


def replaced(bound: Any) -> None:
    bound.lm_head = nn.Identity()
    bound.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(16, 16))


def set_config(bound: Any) -> None:
    bound.config.use_cache = False
    bound.model.layers[0].self_attn.config.hidden_size = 1
    bound.generation_config.max_new_tokens = 1


def checkpoint(bound: Any) -> None:
    # transformers 5 has renamed it
    getattr(bound, "activation_checkpointing_enable", bound.gradient_checkpointing_enable)()


def load(bound: Any, **options: Any) -> None:
    given = {name: tensor.clone() + ("lora" in name) for name, tensor in bound.state_dict().items()}
    assert str(bound.load_state_dict(given, **options)) == "<All keys matched successfully>"
    assert torch.equal(bound.model.layers[0].self_attn.q_proj.lora_A, given["model.layers.0.self_attn.q_proj.lora_A"])


def train(bound: Any) -> None:
    bound.train().requires_grad_(True).zero_grad()
    output(bound, LLAMA.inputs()).sum().backward()
    torch.optim.SGD(bound.parameters(), lr=1.0).step()


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "train": lambda bound: bound.train(),
    "to float64": lambda bound: bound.to(torch.float64),
    "half": lambda bound: bound.half(),
    "to meta": lambda bound: bound.to("meta"),
    "to_empty": lambda bound: bound.to_empty(device="cpu"),
    "requires_grad_ and a step": train,
    "requires_grad_ of a child and a step": lambda bound: (bound.model.requires_grad_(True), train(bound)),
    "checkpointing": checkpoint,
    "hooks": hooked,
    "other modules": replaced,
    "configs": set_config,
    "generate": lambda bound: bound.generate(ids(2, 3), max_new_tokens=3, do_sample=False, pad_token_id=0),
    "load_state_dict": load,
    "load_state_dict(assign=True)": functools.partial(load, assign=True),
    "init_weights": lambda bound: bound.init_weights(),
    "tie_weights": lambda bound: bound.tie_weights(),
    "apply that reads": lambda bound: bound.apply(lambda module: [p.sum() for p in module.parameters()]),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=list(ACTIONS))
def test_what_is_done_to_a_bound_model_leaves_the_base_as_it_was(action: Callable[[Any], Any]) -> None:
    model = LLAMA.make()
    bound, other = pf.bind(model, adapter_for(model, ATTENTION)), pf.bind(model, adapter_for(model, ATTENTION, 1))
    expected = output(other, LLAMA.inputs())
    before = snapshot(model)
    with torch.random.fork_rng():
        action(bound)
    assert snapshot(model) == before
    assert torch.equal(output(other, LLAMA.inputs()), expected)  # nor another module bound to the same base


def normal(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def through_data(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.view(-1)[0] = 5


@pytest.mark.parametrize("part", ["", "model"])
@pytest.mark.parametrize("fn", [normal, through_data])
def test_apply_fn_cannot_write_to_the_base(fn: Callable[[nn.Module], None], part: str) -> None:
    model = LLAMA.make()
    bound, before = pf.bind(model, adapter_for(model, ATTENTION)), snapshot(model)
    with pytest.raises(RuntimeError, match=r"fn writes to \w+\.weight, whose memory is the base's"):
        bound.get_submodule(part).apply(fn)
    assert snapshot(model) == before


def test_apply_fn_can_write_to_the_adapter() -> None:
    model = LLAMA.make()
    adapter = adapter_for(model, ATTENTION)
    pf.bind(model, adapter).apply(lambda module: hasattr(module, "lora_B") and nn.init.zeros_(module.lora_B))
    assert all(not leaf["lora_B"].any() and leaf["lora_A"].any() for leaf in adapter.params.values())


@pytest.mark.parametrize("part", ["", "model.norm"])
def test_other_weights_for_the_base_are_refused_by_load_state_dict(part: str) -> None:
    model = LLAMA.make()
    bound, before = pf.bind(model, adapter_for(model, ATTENTION)), snapshot(model)
    inner = bound.get_submodule(part)
    given = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    given["model.norm.weight" if not part else "weight"] += 1
    with pytest.raises(RuntimeError, match=r"weight is not what the base has\. A bound module shares"):
        inner.load_state_dict(given)
    assert snapshot(model) == before


def test_load_state_dict_still_says_what_is_missing_and_what_has_another_size() -> None:
    model = LLAMA.make()
    bound = pf.bind(model, adapter_for(model, ATTENTION))
    given = dict(bound.state_dict())
    del given["model.layers.0.self_attn.q_proj.lora_A"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*lora_A"):
        bound.load_state_dict(given)
    given["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.norm\.weight"):
        bound.load_state_dict(given, strict=False)


def test_a_norms_statistics_move_in_the_bound_model_only() -> None:
    model, batch = BASES["convnet"].make().train(), BASES["convnet"].inputs()
    bound, before = pf.bind(model, adapter_for(model, {"target_modules": ["4"]})), snapshot(model)
    called(bound, batch)
    assert snapshot(model) == before
    assert bound[2].num_batches_tracked == 1


# --- copies and wrappers ---------------------------------------------------------------------------------------------


def through_torch_save(bound: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(bound, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda bound: pickle.loads(pickle.dumps(bound)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("name", ["llama", "mixtral", "encoder", "lstm"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
def test_a_copy_of_a_bound_model_is_bound_and_stands_alone(copied: Callable[[Any], Any], name: str) -> None:
    base, options = ROWS[name]
    model, batch = base.make(), base.inputs()
    adapter = adapter_for(model, options)
    bound, before = pf.bind(model, adapter), snapshot(model)
    other = copied(bound)
    with torch.no_grad():
        expected = output(bound, batch)
        assert torch.equal(output(other, batch), expected)
        assert trained_names(other) == trained_names(bound)
        assert all(map(torch.equal, flat(pf.unbind(other)), flat(adapter)))
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(output(bound, batch), expected)
        assert not torch.equal(output(other, batch), expected)  # and its adapter is the one that it runs
    assert snapshot(model) == before


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_gives_the_same_gradients_and_does_not_write_to_the_base(one_process: None) -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    adapter = adapter_for(model, ATTENTION)
    alone, bound, before = pf.bind(model, adapter), pf.bind(model, adapter), snapshot(model)
    wrapped = DistributedDataParallel(bound)
    for module in (alone, wrapped):
        output(module, batch).square().mean().backward()
    wrapped.load_state_dict(wrapped.state_dict())
    assert snapshot(model) == before
    pairs = list(zip(alone.parameters(), bound.parameters(), strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs if p.requires_grad)
    assert all(map(torch.equal, flat(pf.unbind(wrapped)), flat(adapter)))


def test_a_bound_model_compiles_to_one_graph() -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    bound = pf.bind(model, adapter_for(model, ATTENTION | {"lora_dropout": 0.0}))
    compiled = torch.compile(bound, backend="eager", fullgraph=True)
    for mode in (False, True):
        bound.train(mode)
        assert torch.equal(output(compiled, batch), output(bound, batch))
    output(compiled, batch).square().mean().backward()
    assert all(p.grad is not None for p in bound.parameters() if p.requires_grad)
    assert pf.unbind(compiled).config == pf.unbind(bound).config


# --- bases that somebody else has changed ----------------------------------------------------------------------------


def wrap_in_closures(model: Any) -> Any:
    """What many patches do: a function that calls the old, bound, forward, in place of it."""

    def patched(module: nn.Module) -> None:
        old = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return old(*args, **kwargs)

        module.forward = functools.wraps(old)(forward)  # pyright: ignore[reportAttributeAccessIssue]

    for module in model.modules():
        patched(module)
    return model


def add_hooks(model: Any) -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    return model


def dispatch(model: Any) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("change", [wrap_in_closures, add_hooks, dispatch])
def test_a_base_whose_layers_have_a_forward_of_their_own_runs_adapted(change: Callable[[Any], Any]) -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    adapter = adapter_for(model, ATTENTION | {"modules_to_save": ["norm"]})
    with torch.no_grad():
        expected = applied(model, adapter, batch)
        changed = change(model)
        before = snapshot(changed)
        bound = pf.bind(changed, adapter)
        assert torch.equal(output(bound, batch), expected)
        assert torch.equal(applied(changed, adapter, batch), expected)
        bound.to(torch.float64)  # accelerate's own `to` would move the base
    assert next(bound.parameters()).dtype == torch.float64
    assert snapshot(changed) == before


def test_layers_that_accelerate_offloads_are_refused() -> None:
    from accelerate import cpu_offload

    model = LLAMA.make()
    adapter = adapter_for(model, ATTENTION)
    with pytest.raises(ValueError, match=r"offloads model\.layers\.0\.self_attn\.q_proj"):
        pf.bind(cpu_offload(model, execution_device=torch.device("cpu")), adapter)


class Odd(nn.Module):
    """A module that keeps what cannot be copied, and what leads back to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.lock, self.random = threading.Lock(), torch.Generator()
        self.layers = [self.first, self.second]
        self.run = self.step
        self.last = self.first(torch.ones(1, 4))  # a tensor with a history
        self.first.register_forward_hook(lambda module, inputs, result: result + self.second.bias)

    def step(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4) -> (rows, 4)."""
        return self.run(x)


def test_what_leads_back_to_the_base_leads_to_the_bound_model_and_what_cannot_be_copied_is_shared() -> None:
    model, x = Odd().eval(), torch.randn(3, 4)
    adapter = adapter_for(model, {"target_modules": ["first"], "bias": "all"})
    bound = pf.bind(model, adapter)
    assert (bound.lock, bound.layers[0], bound.run.__self__) == (model.lock, bound.first, bound)
    first, second = adapter.params["first"], adapter.params["second"]
    weight = model.first.weight + adapter.buffers["first"]["scaling"] * first["lora_B"] @ first["lora_A"]
    hidden = x @ weight.T + first["bias"] + second["bias"]
    torch.testing.assert_close(bound(x), hidden @ model.second.weight.T + second["bias"])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_bound_is_said() -> None:
    model = LLAMA.make()
    adapter = adapter_for(model, ATTENTION)
    bound = pf.bind(model, adapter)
    with pytest.raises(TypeError, match=r"bind was given a stack; bind one of its adapters"):
        pf.bind(model, pf.stack([adapter, adapter]))
    with pytest.raises(TypeError, match=r"bind was given a bound module; bind the base with a tuple"):
        pf.bind(bound, adapter)
    with pytest.raises(TypeError, match=r"unbind was given a LlamaForCausalLM that peftfn\.bind did not make"):
        pf.unbind(model)
    with pytest.raises(KeyError, match=r"has a site 'model\.layers\.0\.self_attn\.q_proj'"):
        pf.bind(nn.Linear(2, 2), adapter)
    model.model.layers[0].self_attn.q_proj.lora_A = 1
    with pytest.raises(ValueError, match=r"Linear already has an attribute 'lora_A'"):
        pf.bind(model, adapter)
