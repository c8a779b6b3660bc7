"""The table of methods. A method is a tuple of functions: to add one, write a file here and a line below."""

from __future__ import annotations

from collections.abc import Sequence

from peftfn.core.config import PeftConfig
from peftfn.methods import (
    adalora,
    adaption_prompt,
    bdlora,
    beft,
    boft,
    c3a,
    deft,
    delora,
    dora,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    kasa,
    ln_tuning,
    loha,
    lokr,
    lora,
    lora_bias,
    miss,
    oft,
    osf,
    peanut,
    psoft,
    pvera,
    qalora,
    randlora,
    road,
    shira,
    supertuning,
    trainable_tokens,
    vblora,
    velora,
    vera,
    waveft,
)
from peftfn.methods.method import Method
from peftfn.methods.prompt import cartridge, cpt, multitask_prompt_tuning, p_tuning, prefix_tuning, prompt_tuning

TABLE: tuple[Method, ...] = (
    dora.METHOD,  # this and the next five are of a LoraConfig that asks for them, so they come before plain LoRA
    lora_bias.METHOD,
    bdlora.METHOD,
    qalora.METHOD,
    kasa.METHOD,
    velora.METHOD,
    lora.METHOD,
    ia3.METHOD,
    beft.METHOD,
    adalora.METHOD,
    loha.METHOD,
    lokr.METHOD,
    oft.METHOD,
    fourierft.METHOD,
    c3a.METHOD,
    gralora.METHOD,
    shira.METHOD,
    supertuning.METHOD,
    waveft.METHOD,
    boft.METHOD,
    deft.METHOD,
    delora.METHOD,
    glora.METHOD,
    hira.METHOD,
    hra.METHOD,
    miss.METHOD,
    road.METHOD,
    ln_tuning.METHOD,
    osf.METHOD,
    peanut.METHOD,
    psoft.METHOD,
    trainable_tokens.METHOD,
    vera.METHOD,
    pvera.METHOD,
    randlora.METHOD,
    frod.METHOD,
    vblora.METHOD,
    prompt_tuning.METHOD,
    multitask_prompt_tuning.METHOD,
    cpt.METHOD,
    p_tuning.METHOD,
    prefix_tuning.METHOD,
    cartridge.METHOD,
    adaption_prompt.METHOD,
)


def of(config: PeftConfig) -> Method:
    """The method of a config, by its class and what it asks for."""
    for method in TABLE:
        if method.config is type(config) and (not method.variant or getattr(config, method.variant)):
            return method
    known = ", ".join(dict.fromkeys(method.config.__name__ for method in TABLE))
    given = type(config)
    if given.__module__.partition(".")[0] == "peft":
        raise TypeError(
            f"config is peft's {given.__name__}; expected one of peftfn's ({known}), which "
            "peftfn.PeftConfig.from_dict(config.to_dict()) makes of it."
        )
    raise TypeError(f"config is a {given.__name__}; expected one of: {known}.")


def companion_configs(config: PeftConfig) -> Sequence[PeftConfig]:
    """The configs of the companions that a config asks for: adapters of other methods, such as trained tokens."""
    asked = of(config).companions
    return () if asked is None or not getattr(config, asked.field) else asked.configs(config)


__all__ = ["TABLE", "Method", "companion_configs", "of"]
