"""Which site a key of PEFT's files is about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import PeftConfig
from peftfn.methods import Method
from peftfn.models import layers, matching

_BASE = ".base_layer"
_WRAPPERS = ("modules_to_save", "original_module")
_METHODS = (
    *("lora_", "ia3_", "hada_", "lokr_", "vera_", "oft_", "fourierft_", "c3a_", "gralora_", "shira_", "waveft_"),
    *("supertuning_", *_WRAPPERS),
    *("boft_", "deft_", "delora_", "glora_", "hira_", "hra_", "miss_", "road_"),
    *("ln_tuning_", "trainable_tokens_", "beft_", "psoft_", "peanut_", "osf_", "vblora_", "pvera_", "randlora_"),
    "frod_",
)


def parameter_names(config: PeftConfig) -> Sequence[str]:
    """The bare parameters that a config names."""
    return cast("Sequence[str]", getattr(config, "target_parameters", None) or ())


def split(method: Method, config: PeftConfig, key: str, prefix: str, source: str) -> tuple[str, str]:
    """The site of a key and the name of the tensor there.

    Raises:
        KeyError: it is no key of this method.
    """
    if not key.startswith(prefix):
        raise KeyError(f"{source} has the key {key!r}; expected keys that start with {prefix!r}, as PEFT writes them.")
    rest, known = key.removeprefix(prefix), _parts_named(config)
    rest = rest if "_orig_mod" in known else rest.removeprefix("_orig_mod.")
    for name, ending in method.in_files(config).items():
        if rest.endswith(f".{ending}"):
            return rest.removesuffix(f".{ending}"), name
    site, _, name = rest.rpartition(".")
    known |= {method.files.copies}
    saved: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    is_inside = any(f".{head}." in f".{rest}" for head in saved)
    for part in rest.split(".")[-3:]:
        if part.startswith(_WRAPPERS if is_inside else _METHODS) and part not in known:
            raise KeyError(
                f"{source} has the key {key!r}, which {method.config.__name__} does not know: the file is another "
                "config's, or was not written by save_pretrained."
            )
    return site, name


def _parts_named(config: Any) -> set[str]:
    """The parts of the module names in a config: a module may be called as PEFT calls something of its own."""
    found: set[str] = set()
    for field in ("target_modules", "modules_to_save", "feedforward_modules", "target_parameters"):
        given: Any = getattr(config, field, None) or ()
        found.update(part for one in ([given] if isinstance(given, str) else given) for part in re.findall(r"\w+", one))
    return found


def refuse_other_tensor(method: Method, name: str, tensor: Tensor, key: str, source: str) -> None:
    """Refuse a trained tensor that is not in one of the dtypes that layers compute in, or one number for a matrix."""
    slot = method.slots.get(name)
    is_number = tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize > 1)
    if slot is not None and slot.trained and not is_number:
        raise ValueError(
            f"{source} has {key!r} in {str(tensor.dtype).removeprefix('torch.')}; expected float16, bfloat16, float32 "
            "or float64: convert the file."
        )
    if slot is not None and not tensor.dim() and (slot.rank, slot.outputs, slot.inputs) != (None, None, None):
        raise ValueError(f"{source} has one number as {key!r}; expected a tensor with the sizes of its layer.")


def paths(config: Any, own: Mapping[str, Leaf], source: str, ordered: bool, model: nn.Module | None) -> dict[str, str]:
    """The site path of each key: attention's output projection and bare parameters are nested in PEFT's keys."""
    found: dict[str, str] = {}
    together: dict[str, list[str]] = {}
    for site in own:
        together.setdefault(owner(config, site), []).append(site)
    for site in own:
        if site.endswith(f"{_BASE}.out_proj"):
            found[site] = owner(config, site)
            continue
        home = owner(config, site)
        nested = sorted(together[home], key=len, reverse=True)  # in the module's order
        names = [name for name in parameter_names(config) if layers.may_own(model, home, name)]
        if nested == [home] and (not names or matching.is_target(config, home)):
            found[site] = home
        elif len(names) != len(nested) or (len(nested) > 1 and not ordered and model is None):
            raise ValueError(
                f"{source}: {home!r} has {len(nested)} adapted parameters of {names or 'unknown names'}, and PEFT's "
                "keys do not say which is which without the model; pass it: peftfn.load(folder, model=model)."
            )
        else:
            found[site] = f"{home}.{names[nested.index(site)].rpartition('.')[2]}"
    return found


def owner(config: Any, site: str) -> str:
    """The module of a key, without the wrappers that PEFT puts around it."""
    while site.endswith(_BASE):
        inside = site.removesuffix(_BASE)
        if not parameter_names(config) and matching.is_target(config, site) and not matching.is_target(config, inside):
            break  # a module that is called so
        site = inside
    attention = site.removesuffix(f"{_BASE}.out_proj")
    return site if attention == site else f"{attention}.out_proj"
