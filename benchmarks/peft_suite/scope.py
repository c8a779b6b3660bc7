"""What peft's tests promise and no counterpart is run for, with the reason: the first line that fits a case counts.

Four words: `not offered` (a method or an operation that is not there), `no meaning` (the promise is about the state of
peft's wrappers, and an adapter here is a value without one), `not run` (it needs what is not at hand), and, where no
line fits, `no counterpart`: nobody has written one.
"""

from __future__ import annotations

import re

from peft_suite.inventory import Case
from peft_suite.verdicts import NOT_OFFERED, UNFIT, VALUES, Verdict

METHODS = {  # files, classes and tests that are about one method
    "adamss|asa": "ADAMSS",
    "frod": "FROD",
    "lily": "LILY",
    "poly": "POLY",
    "pvera": "PVERA",
    "randlora": "RANDLORA",
    "shadow": "SHADOW",
    "tinylora": "TINYLORA",
    "unilora": "UNILORA",
    "xlora": "XLORA",
}
FIELDS = {
    "arrow|gks|genknowsub": "arrow_config",
    "monteclora": "monteclora_config",
    "qalora": "use_qalora",
    "mica": "init_lora_weights mica",
    "corda": "init_lora_weights corda",
    "eva": "init_lora_weights eva",
    "incremental_pca": "init_lora_weights eva",
    "lora_ga": "init_lora_weights lora_ga",
    "orthogonal": "init_lora_weights orthogonal",
    "weight_tying|weight_tied|no_embed_lora": "ensure_weight_tying",
    "megatron": "megatron_config",
    "layer_replication": "layer_replication",
}
OPERATIONS = {
    "lora_conversion": "convert_to_lora, save_as_lora",
    "hotswap": "hotswap_adapter, prepare_model_for_compiled_hotswap",
    "lora_intruders": "reduce_intruder_dimension",
    "lorafa": "create_lorafa_optimizer",
    "riemannian": "create_riemannian_optimizer",
    "key_mapping": "load_adapter(key_mapping=)",
    "conversion_same_output": "save_pretrained(path_initial_model_for_weight_conversion=)",
    "model_and_?layer_?status|modelandlayerstatus": "get_layer_status, get_model_status",
    "get_no_split|getnosplit": "a model's _no_split_modules",
    "kappa": "find_kappa_target_modules",
    "unregistered_variant|unsorted_variant|variant_combination|string_variants": "registering variants of LoRA",
    "scalingadapters": "rescale_adapter_scale",
    "rescale_adapter|disable_lora_input|disable_input_dtype": "rescale_adapter_scale, disable_input_dtype_casting",
    "dynamic_?dispatch": "register_peft_method, LoraConfig._register_custom_module",
}
STATE = {
    "delete_|_delete": "deleting adapters: dropping a value is not keeping it",
    "adapter_name(?!_makes)|duplicate_name|name_same_as|adapter_name_substring": "names of adapters in a model",
    "active_adapter|add_and_set|set_adapter|does_not_change_active": "which adapter is active: an argument of a call",
    "requires_?grad": "requires_grad of parameters by active adapter: `bind` has exactly the adapter's",
    "repr": "the text of peft's wrapper layers",
    "bufferdict": "a container of peft's",
    "transient_attribute|kwargs_only_forward": "attributes of peft's wrapper modules",
    "exposes_attributes|test_attributes": "attributes of peft's wrapper modules",
    "low_cpu_mem": "low_cpu_mem_usage: `init` and `load` never make tensors twice",
    "unmerge|delete_merged|already_merged|add_merge": "merging in place and back: `merge` makes new tensors",
    "check_if_peft_model|get_model_config|state_?dict_?key_?prefix": "helpers on peft's wrappers",
    "scaling_(simple|multiple|with)": "the scaling kept in peft's layers, changed in place",
    "no_?infinite_?recursion|deepspeed": "peft's wrappers under DeepSpeed",
    "naming_?conflict|custom_?model_?config_?warning": "warnings about peft's wrapping",
    "peft_version_(is_dev|warn)": "how peft finds its own version",
    "r_warning|warning_num_layers|still_works": "warnings about fields that are not used",
    "find_minimal_target|suffix_is_substring": "how peft shortens a list of targets",
    "checkispeftmodel|check_if": "helpers on peft's wrappers",
    "initemptyweights|auto_clear_cache": "memory while peft wraps a model",
    "pissa_olora|revision_warning|without_peft_wrapper": "warnings about peft's wrapping",
    "existing_model_card|non_existing": "merging a model card with one that is there",
}
NEEDS = {
    "test_gpu_examples|test_common_gpu|device_all_gpu|cpu_and_gpu": "an accelerator",
    "test_gptqmodel": "GPTQModel, which has its own environment (make test-gptqmodel)",
    "test_hub_features|test_config.*from_pretrained(_cache_dir)?$|with_runtime_config": "a model hub",
    "from_hub|offline_mode|loadadapteroffline|hub_then|_remote": "a model hub",
    "test_auto": "a model hub",
    "stable_?diffusion|diffusion|diffusers": "diffusers",
    "fsdp": "several processes",
    "test_seq_?2_?seq_trainer": "a model hub",
}
TABLES = (
    (METHODS, NOT_OFFERED, "method "),
    (FIELDS, NOT_OFFERED, "field "),
    (OPERATIONS, NOT_OFFERED, ""),
    (STATE, VALUES, ""),
)


def needs(case: Case) -> Verdict | None:
    """What a case needs that is not at hand, by its file, class and test."""
    name = f"{case.file}.{case.group}.{case.test}".lower()
    found = next((reason for pattern, reason in NEEDS.items() if re.search(pattern, name)), None)
    return Verdict(UNFIT, found) if found else None


def of(case: Case) -> Verdict | None:
    """Why the case has no counterpart, by its file, class and test."""
    if lacks := needs(case):
        return lacks
    name = f"{case.file}.{case.group}.{case.test}".lower()
    for table, word, prefix in TABLES:
        for pattern, reason in table.items():
            # A method's name counts where a word begins with it: `oft` is no part of `loftq`.
            if re.search(rf"(?<![a-z])(?:test)?(?:{pattern})" if table in (METHODS, FIELDS) else pattern, name):
                return Verdict(word, prefix + reason)
    return None
