"""peftfn: parameter-efficient fine-tuning as pure functions on `torch.func`."""

from peftfn import adalora
from peftfn.adapter import Adapter, Count, count, leaves
from peftfn.apply import apply, init
from peftfn.bound import bind, unbind
from peftfn.checkpoint import load, push_to_hub, save
from peftfn.config import PeftConfig
from peftfn.merge import merge
from peftfn.methods.adalora_config import AdaLoraConfig
from peftfn.methods.ia3 import IA3Config
from peftfn.methods.lora import LoraConfig
from peftfn.stacking import stack, unstack

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "Adapter",
    "Count",
    "IA3Config",
    "LoraConfig",
    "PeftConfig",
    "adalora",
    "apply",
    "bind",
    "count",
    "init",
    "leaves",
    "load",
    "merge",
    "push_to_hub",
    "save",
    "stack",
    "unbind",
    "unstack",
]
