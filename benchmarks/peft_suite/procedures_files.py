"""Files and fresh adapters: PEFT's two files both ways, and what `init` makes of a config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor

import peftfn as pf
from peft_suite import compare
from peft_suite.subject import Subject, first, quiet, saved, temporary
from peft_suite.table import procedure
from peft_suite.verdicts import WrongError


def written(adapter: pf.Adapter) -> Path:
    """A folder with what `save` writes."""
    folder = temporary() / f"ours-{len(list(temporary().iterdir()))}"
    pf.save(adapter, folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, by PEFT's keys."""
    if (folder / "adapter_model.safetensors").exists():
        return safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return torch.load(folder / "adapter_model.bin", weights_only=True)


@procedure("save_pretrained", "save_pretrained_selected_adapters", "save_pretrained_adapter_name_substring")
def files(subject: Subject, extra: Mapping[str, Any]) -> None:
    """Of what peft wrote, `save(load(...))` writes the same keys and bits, which peft reads to the same output."""
    safe = extra.get("safe_serialization", True)
    folder = subject.folder if safe else saved(subject.reference, safe_serialization=False)
    adapter = subject.adapter if safe else pf.load(folder, subject.model)
    subject.config  # noqa: B018
    own = written(adapter)
    theirs, ours = weights(folder), weights(own)
    compare.equal("keys of the file", sorted(ours), sorted(theirs))
    for key, tensor in ours.items():
        compare.same(f"{key} in the file", tensor, theirs[key])
    compare.identical("loaded again", pf.load(own, subject.model), adapter)
    present = {path.name for path in own.iterdir()}
    if not {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= present or "config.json" in present:
        raise WrongError(f"files of a saved adapter: {sorted(present)}")
    compare.close("output of what peft read", subject.run(_read(subject, own)), subject.rounded.double())


def _read(subject: Subject, folder: Path) -> Any:
    """peft's model of a folder of ours; a key that is missing or not expected is wrong."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(subject.base(), str(folder))
    said = [str(one.message) for one in caught if "missing adapter keys" in str(one.message)]
    if said:
        raise WrongError(f"peft reads our file: {said[0][:200]}")
    return model.eval()


@procedure("save_load_roundtrip", "save_load_roundtrip_direct_injection")
def round_trip(subject: Subject, _: Mapping[str, Any]) -> None:
    """A fresh adapter of our own, moved and saved: peft reads it, and computes what `apply` does."""
    fresh = moved(pf.init(subject.model, subject.config, torch.Generator().manual_seed(3)))
    folder = written(fresh)
    compare.identical("loaded again", pf.load(folder, subject.model), fresh)
    theirs = subject.run(subject.widened(_read(subject, folder)))
    ours = subject.apply(fresh)
    compare.close("output of what peft read", ours, theirs)
    compare.differ("the adapter", ours, subject.run(subject.model))
    compare.equal("sites of a fresh adapter", compare.names(fresh), compare.names(subject.adapter))


def moved(adapter: pf.Adapter, seed: int = 5) -> pf.Adapter:
    """The adapter with all that is trained moved a little."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        path: {name: t + 0.05 * torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in leaf.items()}
        for path, leaf in adapter.params.items()
    }
    return adapter.replace(params=noise)


@procedure("load_multiple_adapters")
def several(subject: Subject, _: Mapping[str, Any]) -> None:
    """One folder loaded three times is three adapters of the same bits; a stack of them comes apart into them."""
    subject.config  # noqa: B018
    loaded = [pf.load(subject.folder, subject.model) for _ in range(3)]
    for one in loaded[1:]:
        compare.identical("loaded again", one, loaded[0])
    for one in pf.unstack(pf.stack(loaded)):
        compare.identical("out of a stack", one, loaded[0])


@procedure("from_pretrained_config_construction")
def config(subject: Subject, _: Mapping[str, Any]) -> None:
    """The config that comes with a loaded adapter says what the given one does, and so does its file."""
    given, loaded = subject.config.to_dict(), subject.adapter.config.to_dict()
    # What the model says in peft as well: the base's name, if it has one, and how its weights are stored.
    filled = (
        "base_model_name_or_path",
        "fan_in_fan_out",
        "auto_mapping",
        "inference_mode",
        "peft_version",
        "target_modules",
        "modules_to_save",
        "rank_pattern",
    )
    for name, value in given.items():
        if value is not None and name not in filled:
            compare.equal(f"config.{name}", *(sorted(v) if isinstance(v, list) else v for v in (loaded[name], value)))
    again = pf.PeftConfig.from_pretrained(written(subject.adapter))
    compare.equal("config in our file", again, subject.adapter.config)


@procedure("load_model_low_cpu_mem_usage", "peft_model_device_map")
def meta(subject: Subject, _: Mapping[str, Any]) -> None:
    """A base on the meta device is enough for `init` and `load`; its weights can be given to the call."""
    empty = subject.base().to("meta")
    compare.equal(
        "sites of a fresh adapter", *(sorted(one.params) for one in (pf.init(empty, subject.config), subject.adapter))
    )
    compare.identical("loaded for a base on meta", pf.load(subject.folder, empty, device="cpu"), subject.adapter)
    given = subject.model.state_dict()
    buffers = {name: buffer for name, buffer in subject.model.named_buffers() if name not in given}
    with torch.no_grad():
        ours = first(pf.apply(empty, subject.adapter, subject.inputs, params=given | buffers))
    compare.same("output of a base on meta", ours, subject.apply())


@procedure("adapter_dtype_autocast", "add_adapter_no_autocast_adapter_dtype")
def dtypes(subject: Subject, extra: Mapping[str, Any]) -> None:
    """A fresh adapter's dtypes are peft's: float32 over a half-precision base, or the base's where asked for."""
    dtype, widen = extra.get("dtype"), extra.get("autocast_adapter_dtype", False)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    torch.manual_seed(0)
    base = subject.base(dtype)
    with quiet():
        model = peft.get_peft_model(subject.base(dtype), subject.peft_config(), autocast_adapter_dtype=widen)
    subject.config  # noqa: B018
    fresh = pf.init(base, subject.config, dtype=None if widen else dtype)
    theirs = pf.load(saved(model), base)
    ours = {path: str(tensor.dtype) for path, tensor in compare.items(fresh)}
    compare.equal("dtypes", ours, {path: str(tensor.dtype) for path, tensor in compare.items(theirs)})


@procedure("modules_to_save_correctly_set")
def heads(subject: Subject, _: Mapping[str, Any]) -> None:
    """The task's head is trained and saved with the adapter, as peft does it."""
    fresh = pf.init(subject.model, subject.config)
    compare.equal("sites of a fresh adapter", sorted(fresh.params), sorted(subject.adapter.params))
    head = next(name for name in ("score", "classifier") if hasattr(subject.model, name))
    if not any(path.split(".")[0] == head for path in fresh.params):
        raise WrongError(f"{head} is not trained")
