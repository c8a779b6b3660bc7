"""Training context-aware prompt tuning as PEFT does: after each step the changes go back into their balls.

An adapter is a value, so no forward writes to it; what is outside of a ball counts as its projection. Without this the
trained changes go on growing outside, and a step turns them less and less.

```python
params, state = pf.optimizers.ADAMW.update(adapter.params, grads, state, lr=1e-3)
adapter = pf.cpt.projected(adapter.replace(params=params))
```
"""

from __future__ import annotations

from peftfn.core.adapter import Adapter, sorted_tree
from peftfn.methods.prompt import cpt


def projected(adapter: Adapter) -> Adapter:
    """The adapter, or the stack, that computes the same, with every change inside its ball.

    Args:
        adapter: one of `CPTConfig`.

    Raises:
        TypeError: it is of another method.

    Example:
        >>> import peftfn as pf, transformers
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        >>> adapter = pf.init(model, pf.CPTConfig(cpt_token_ids=[1, 2], task_type="CAUSAL_LM"))
        >>> far = adapter.replace(params={"": {"delta_embedding": adapter.params[""]["delta_embedding"] + 1}})
        >>> [round(float(row.norm()), 5) for row in pf.cpt.projected(far).params[""]["delta_embedding"]]
        [0.00625, 0.00625]
    """
    if not isinstance(adapter.config, cpt.CPTConfig):
        raise TypeError(f"projected was given an adapter of {type(adapter.config).__name__}; expected CPTConfig's.")
    inside = cpt.projected({**adapter.params[""], **adapter.buffers[""]})
    return adapter.replace(params=sorted_tree({**adapter.params, "": {**adapter.params[""], cpt.DELTA: inside}}))
