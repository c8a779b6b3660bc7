"""Starting a cartridge, or a prefix, from what a model keeps of a text; and joining several.

```python
ids = tokenizer.apply_chat_template([{"role": "system", "content": text}], return_tensors="pt")
adapter = pf.cartridge.of_text(model, adapter, ids)
```

It is then trained so that the model with it answers as the model that reads the text (Eyuboglu et al. 2025,
https://arxiv.org/abs/2506.06266).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Adapter, sorted_tree
from peftfn.methods.prompt import cartridge
from peftfn.methods.prompt.cartridge import CartridgeConfig
from peftfn.methods.prompt.prefix_tuning import PrefixTuningConfig
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf
from peftfn.runtime.apply import apply


def of_text(model: nn.Module, adapter: Adapter, ids: Tensor) -> Adapter:
    """The adapter with the keys and values that the base keeps of a text's first tokens.

    Of a text of as many tokens as the adapter has, the base with it computes what it computes after the text.

    Args:
        model: the base.
        adapter: one of `CartridgeConfig`, or of `PrefixTuningConfig` without a projection.
        ids: (1, tokens), at least as many as the adapter has.

    Raises:
        TypeError: the adapter is of another method, or has a projection.
        ValueError: there is more than one row, the text is too short, or its cache is of another shape.

    Example:
        >>> import peftfn as pf, torch, transformers
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        >>> adapter = pf.init(model, pf.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        >>> text, question = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
        >>> found = pf.apply(model, pf.cartridge.of_text(model, adapter, text), {"input_ids": question}).logits
        >>> torch.allclose(found, model(torch.cat([text, question], 1)).logits[:, 3:], atol=1e-5)
        True
    """
    _check(adapter)
    with torch.no_grad():
        output = apply(model, (), {hf.IDS: ids, hf.MASK: torch.ones_like(ids), hf.USE_CACHE: True})
    cache = next((one for one in output.values() if caches.is_cache(one)), None)
    if cache is None:
        raise ValueError(f"{type(model).__name__} gives no cache of keys and values, of which a cartridge is made.")
    return of_cache(adapter, cache)


def of_cache(adapter: Adapter, cache: Any) -> Adapter:
    """The adapter with the first keys and values of a cache.

    Args:
        adapter: one of `CartridgeConfig`, or of `PrefixTuningConfig` without a projection.
        cache: one of transformers' caches, with one row; or (keys, values) of each layer, (1, heads, tokens, width).

    Raises:
        TypeError: the adapter is of another method, or has a projection.
        ValueError: there is more than one row, the text is too short, or the cache is of another shape.

    Example:
        >>> import peftfn as pf, torch, transformers
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        >>> adapter = pf.init(model, pf.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        >>> cache = model(torch.tensor([[1, 2, 3, 4]]), use_cache=True).past_key_values
        >>> pf.cartridge.of_cache(adapter, cache).params[""]["trainable_embedding"].shape
        torch.Size([2, 16])
    """
    config, old = _check(adapter), _prefix(adapter)
    pairs = _pairs(cache)
    count, size = old.shape[0], old.shape[1] // (2 * max(1, len(pairs)))
    for keys in (one for pair in pairs for one in pair):
        if keys.dim() != 4 or keys.shape[0] != 1 or keys.shape[2] < count or keys.shape[1] * keys.shape[3] != size:
            raise ValueError(
                f"the cache has keys or values of shape {tuple(keys.shape)} in {len(pairs)} layers; expected one row, "
                f"at least {count} tokens, and heads of {size} numbers in all, (1, heads, tokens, width)."
            )
    if not pairs or size * 2 * len(pairs) != old.shape[1]:
        raise ValueError(f"the cache has {len(pairs)} layers, and a token of the adapter {old.shape[1]} numbers.")
    # (tokens, heads * width) of the keys and of the values of each layer, one after the other
    parts = [one[0, :, :count].transpose(0, 1).flatten(1) for pair in pairs for one in pair]
    return _with_prefix(adapter, config, torch.cat(parts, 1).detach().to(old))


def compose(adapters: Sequence[Adapter]) -> Adapter:
    """One cartridge of the tokens of several, one after the other; those that stay are the first one's.

    Args:
        adapters: cartridges for one base, at least one.

    Raises:
        ValueError: there is none, or they are for bases of unlike sizes.
        TypeError: one is no cartridge.

    Example:
        >>> import peftfn as pf, transformers
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        >>> config = pf.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        >>> pf.cartridge.compose([pf.init(model, config), pf.init(model, config)]).config.num_virtual_tokens
        6
    """
    if not adapters:
        raise ValueError("compose was given no adapter; expected at least one.")
    for one in adapters:
        if not isinstance(one.config, CartridgeConfig):
            raise TypeError(f"compose was given an adapter of {type(one.config).__name__}; expected CartridgeConfig's.")
    first = cast("CartridgeConfig", adapters[0].config)
    for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
        values = {getattr(one.config, name) for one in adapters}
        if len(values) > 1:
            raise ValueError(f"compose was given cartridges with {name} of {sorted(map(str, values))}; expected one.")
    prefix = torch.cat([_prefix(one) for one in adapters])
    config = dataclasses.replace(first, num_virtual_tokens=prefix.shape[0])
    return _with_prefix(adapters[0], config, prefix).replace(config=config)


def _check(adapter: Adapter) -> CartridgeConfig | PrefixTuningConfig:
    config = adapter.config
    if adapter.members is not None:
        raise TypeError("a stack was given; expected a single adapter: peftfn.unstack takes it apart.")
    if isinstance(config, CartridgeConfig) or (isinstance(config, PrefixTuningConfig) and not config.prefix_projection):
        return config
    raise TypeError(
        f"an adapter of {type(config).__name__} was given; expected one of CartridgeConfig, or of PrefixTuningConfig "
        "without a projection, which have keys and values themselves."
    )


def _prefix(adapter: Adapter) -> Tensor:
    leaf = {**adapter.params[""], **adapter.buffers.get("", {})}
    return leaf[cartridge.PROMPT] if cartridge.PROMPT in leaf else cartridge.whole(leaf)[cartridge.PROMPT]


def _with_prefix(adapter: Adapter, config: CartridgeConfig | PrefixTuningConfig, prefix: Tensor) -> Adapter:
    leaf = {cartridge.PROMPT: prefix}
    if isinstance(config, PrefixTuningConfig):
        return adapter.replace(params=sorted_tree({**adapter.params, "": leaf}))
    parts = cartridge.parted(config, leaf)
    params = sorted_tree({**adapter.params, "": {cartridge.TRAINED: parts[cartridge.TRAINED]}})
    buffers = sorted_tree({**adapter.buffers, "": {cartridge.FROZEN: parts[cartridge.FROZEN]}})
    return adapter.replace(params=params, buffers=buffers)


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer."""
    if isinstance(cache, (tuple, list)):
        return [(one[0], one[1]) for one in cast("Sequence[Any]", cache)]
    layers = caches.layers_of(cache)
    if layers is None:
        raise ValueError(
            f"the cache is a {type(cache).__name__}; expected one with a layer of keys and values for each."
        )
    return [(layer.keys, layer.values) for layer in layers]
