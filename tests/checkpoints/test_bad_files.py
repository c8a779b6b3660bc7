"""Bad folders and files: `load` has its own clear error for each kind, runs no code, and leaves them as they are."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from same import adapter_of, assert_same, assert_says, mlp, on_disk
from torch import Tensor

import peftfn as pf
from peftfn.core.files import CONFIG, PICKLE, WEIGHTS

A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
OPTIONS: dict[str, Any] = {"target_modules": ["0"], "modules_to_save": ["2"], "bias": "lora_only"}


def folder_of(parent: Path) -> Path:
    return pf.save(adapter_of(mlp(), **OPTIONS), parent / "adapter")


# --- ways to spoil a folder


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


def fields(**changes: Any) -> Callable[[Path], object]:
    """Change fields of the config; `None` takes one away."""

    def spoil(folder: Path) -> None:
        data = {**json.loads((folder / CONFIG).read_text()), **changes}
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in data.items() if value is not None}))

    return spoil


def tensors(**changes: Tensor | None) -> Callable[[Path], object]:
    """Change tensors by key; `None` takes one away."""

    def spoil(folder: Path) -> None:
        found = {key: t for key, t in (load_file(folder / WEIGHTS) | changes).items() if t is not None}
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return spoil


def flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"  # the JSON header starts at byte 8
    (folder / WEIGHTS).write_bytes(content)


def pickled(value: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(value, folder / PICKLE)

    return spoil


def cut_pickle(folder: Path) -> None:
    pickled(load_file(folder / WEIGHTS))(folder)
    os.truncate(folder / PICKLE, (folder / PICKLE).stat().st_size // 2)


def move_down(folder: Path) -> None:
    (folder / "mine").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / "mine" / name)


Spoil = Callable[[Path], object]

FILES: dict[str, Spoil] = {
    "FileNotFoundError: no adapter_config.json in": remove(CONFIG, WEIGHTS),
    "FileNotFoundError: no adapter_model.safetensors or adapter_model.bin in": remove(WEIGHTS),
    "FileNotFoundError: Its sub-folders mine hold one: adapter_name='mine'": move_down,
    "ValueError: adapter_config.json is not valid JSON": cut(CONFIG, 40),
    "ValueError: adapter_config.json is not valid JSON (Expecting value: line 1 column 1 (char 0))": cut(CONFIG, 0),
    "ValueError: adapter_config.json is not valid JSON ('utf-8' codec": write(CONFIG, b'{"r": "\xff"}'),
    "ValueError: adapter_config.json holds a JSON list; expected an object": write(CONFIG, b'["LORA"]'),
    "ValueError: has peft_type=None, which this version": fields(peft_type=None),
    "ValueError: has peft_type='LORRA', which this version of peftfn does not read: ADALORA, ": fields(
        peft_type="LORRA"
    ),
    "ValueError: has peft_type='XLORA', which this version of peftfn does not read: ADALORA, ": fields(
        peft_type="XLORA"
    ),
    "ValueError: IA3Config has no field": fields(peft_type="IA3"),
    "ValueError: has no field 'lora_alfa'. Did you mean lora_alpha": fields(lora_alfa=3),
    "ValueError: (megatron_config={'a': 1}): peft has this field, peftfn does not support it yet": fields(
        megatron_config={"a": 1}
    ),
    "ValueError: LoraConfig(r='8'): expected int": fields(r="8"),
    "ValueError: init_lora_weights='pissa_niter_4' goes with a base": fields(init_lora_weights="pissa_niter_4"),
    "ValueError: has rank 2, and the config says 4 for '0'; expected a whole adapter": fields(r=4),
    "ValueError: has rank 2, and the config says 1 for '0'; expected a whole adapter": fields(r=1),
    "ValueError: is not a whole safetensors file (header too small": cut(WEIGHTS, 0),
    "ValueError: is not a whole safetensors file (incomplete: its header has": cut(WEIGHTS, 40),
    "ValueError: is not a whole safetensors file (incomplete: its": cut(WEIGHTS, 2000),
    "ValueError: is not a whole safetensors file (its header is no JSON: 'utf-8' codec": flip,
    "ValueError: is a git-lfs pointer, not the file itself": write(
        WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"
    ),
    "ValueError: holds no tensor; it is not the weights": lambda folder: save_file({}, folder / WEIGHTS),
    "KeyError: has ['lora_A'], but no lora_B for '0'; expected a whole adapter": tensors(**{B: None}),
    "KeyError: has ['lora_B'], but no lora_A for '0'; expected a whole adapter": tensors(**{A: None}),
    "KeyError: the key '0.lora_A.weight'; expected keys that start with 'base_model.model.'": tensors(
        **{"0.lora_A.weight": torch.ones(1)}
    ),
    "KeyError: 0.lora_A.default.weight', which LoraConfig does not know": tensors(
        **{"base_model.model.0.lora_A.default.weight": torch.ones(1)}
    ),
    "KeyError: 0.lora_magnitude_vector', which LoraConfig does not know": tensors(
        **{"base_model.model.0.lora_magnitude_vector": torch.ones(1)}
    ),
    "KeyError: 1.original_module.weight', which LoraConfig does not know": tensors(
        **{"base_model.model.1.original_module.weight": torch.ones(1)}
    ),
    "ValueError: holds no mapping from names to tensors alone": pickled([torch.ones(1)]),
    "ValueError: holds no mapping from names to tensors alone; it": pickled({"r": 8}),
    "ValueError: adapter_model.bin is not a whole PyTorch file": cut_pickle,
}

# With the model that it is for at hand.
MODELS: dict[str, Spoil] = {
    "KeyError: missing sites 1 (0), unexpected sites none": tensors(**{A: None, B: None}),
    "KeyError: missing sites 1 (2), unexpected sites none": tensors(**{"base_model.model.2.bias": None}),
    "KeyError: missing sites 1 (0), unexpected": tensors(**{"base_model.model.0.base_layer.bias": None}),
    "KeyError: missing sites none, unexpected sites 1 (9)": tensors(
        **{"base_model.model.9.lora_A.weight": torch.ones(2, 4), "base_model.model.9.lora_B.weight": torch.ones(6, 2)}
    ),
    "KeyError: missing sites none, unexpected sites 1 (2)": tensors(
        **{"base_model.model.2.lora_A.weight": torch.ones(2, 6), "base_model.model.2.lora_B.weight": torch.ones(3, 2)}
    ),
    "KeyError: the adapter has a site '7', which Sequential does not have": tensors(
        **{"base_model.model.7.weight": torch.ones(2, 4)}
    ),
    "ValueError: 0: the adapter has lora_A (2, 5) and lora_B (6, 2), expected lora_A (2, 4) and lora_B (6, 2)": tensors(
        **{A: torch.ones(2, 5)}
    ),
    "ValueError: 2.weight: the adapter has shape (4, 6), the model (3, 6)": tensors(
        **{"base_model.model.2.weight": torch.ones(4, 6)}
    ),
    "ValueError: does not fit this Sequential: target_modules=['query'] matched no module": fields(
        target_modules=["query"]
    ),
    "ValueError: does not fit this Sequential: modules_to_save names ['head'], which match no module": fields(
        modules_to_save=["head"]
    ),
    "ValueError: does not fit this Sequential: target_modules=['1'] names '1', a ReLU": fields(target_modules=["1"]),
}


@pytest.mark.parametrize(("said", "spoil"), FILES.items(), ids=FILES)
def test_a_bad_file_is_one_clear_error_and_stays_as_it_is(said: str, spoil: Spoil, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    spoil(folder)
    before = on_disk(folder)
    with pytest.raises((OSError, ValueError, KeyError)) as caught:
        pf.load(folder)
    assert_says(caught, said)
    assert str(folder) in caught.value.args[0]
    assert on_disk(folder) == before


@pytest.mark.parametrize(("said", "spoil"), MODELS.items(), ids=MODELS)
def test_an_adapter_that_does_not_fit_the_model_is_one_clear_error(said: str, spoil: Spoil, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    model = mlp()
    pf.load(folder, model=model)
    spoil(folder)
    before, state = on_disk(folder), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises((ValueError, KeyError)) as caught:
        pf.load(folder, model=model)
    assert_says(caught, said)
    assert on_disk(folder) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_on_the_meta_device_is_enough_to_check_against(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert_same(pf.load(folder, model=mlp().to("meta")), pf.load(folder))
    tensors(**{A: None, B: None})(folder)
    with pytest.raises(KeyError, match="missing sites"):
        pf.load(folder, model=mlp().to("meta"))


@pytest.mark.parametrize(
    ("given", "options", "error", "said"),
    [
        (None, {}, TypeError, "load was given a NoneType; expected a folder or a hub id"),
        (".", {"model": "bert"}, TypeError, "model is a str; expected the base, an nn.Module"),
        (WEIGHTS, {}, FileNotFoundError, f"{WEIGHTS} is a file; expected the folder of an adapter"),
        (".", {"adapter_name": "other"}, FileNotFoundError, r"no adapter_config.json in .*other; expected a folder"),
        ("absent", {}, FileNotFoundError, "absent' is neither a folder that exists nor a valid hub id"),
    ],
)
def test_a_bad_argument_of_load_is_one_clear_error(
    given: Any, options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(error, match=said):
        pf.load(given and folder / given, **options)


@dataclasses.dataclass
class Command:
    """Unpickled, it runs."""

    folder: str

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("force", ["0", "1"])
def test_a_pickle_that_would_run_code_is_an_error_and_does_not_run(
    how: str, force: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)  # torch's way to switch weights_only off
    folder, marker = folder_of(tmp_path), tmp_path / "ran"
    value = {"base_model.model.9": Command(str(marker))}
    (folder / WEIGHTS).unlink()
    if how == "plain":
        (folder / PICKLE).write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, folder / PICKLE, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"holds more than tensors \((posix|nt).mkdir\) and was not unpickled"):
        pf.load(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(value))
    assert marker.exists()  # it would have run


def test_a_pickled_module_is_an_error_that_names_its_class(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    pickled(mlp())(folder)
    with pytest.raises(ValueError, match=r"holds more than tensors \(torch.nn.modules.container.Sequential\)"):
        pf.load(folder)
