"""The zoo's checks by name, in their groups."""

from __future__ import annotations

from collections.abc import Callable

from zoo import checks_files, checks_generate, checks_layers, checks_prompts, checks_transforms
from zoo.case import Case
from zoo.verdicts import Verdict

GROUPS: dict[str, dict[str, Callable[[Case], Verdict]]] = {
    "layers": {
        "lora": checks_layers.lora,
        "sites": checks_layers.sites,
        "default": checks_layers.default,
        "ia3": checks_layers.ia3,
        "convolutions": checks_layers.convolutions,
        "experts": checks_layers.experts,
        "bind": checks_layers.bind,
        "merge": checks_layers.merge,
    },
    "files": {"load": checks_files.load, "save": checks_files.save},
    "transforms": {
        "grad": checks_transforms.grad,
        "vmap": checks_transforms.vmap,
        "rows": checks_transforms.rows,
    },
    "generate": {"generate": checks_generate.generate},
    "prompts": {
        "prompt": checks_prompts.prompt,
        "prompt_grad": checks_prompts.prompt_grad,
        "prompt_generate": checks_prompts.prompt_generate,
        "prompt_rows": checks_prompts.prompt_rows,
        "prefix": checks_prompts.prefix,
        "prefix_generate": checks_prompts.prefix_generate,
        "prefix_rows": checks_prompts.prefix_rows,
    },
}
CHECKS = {name: check for group in GROUPS.values() for name, check in group.items()}


def chosen(names: list[str]) -> list[str]:
    """The checks that these names of checks and groups mean; all for none.

    Raises:
        ValueError: a name is neither.
    """
    if unknown := [name for name in names if name not in CHECKS and name not in GROUPS]:
        raise ValueError(f"{unknown} are no checks; expected some of {[*GROUPS, *CHECKS]}.")
    picked = {check for name in names for check in GROUPS.get(name, (name,))}
    return [name for name in CHECKS if name in picked or not names]
