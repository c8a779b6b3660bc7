"""The model classes of the zoo: every one that transformers names for these families, by family."""

from __future__ import annotations

import dataclasses

import transformers
from transformers.models.auto import modeling_auto

# A class that several mappings name belongs to the first of these families.
FAMILIES = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "classification": "SEQUENCE_CLASSIFICATION",
    "image": "IMAGE_CLASSIFICATION",
    "audio": "AUDIO_CLASSIFICATION",
    "ctc": "CTC",
    "speech": "SPEECH_SEQ_2_SEQ",
    "image-text": "IMAGE_TEXT_TO_TEXT",
    "detection": "OBJECT_DETECTION",
    "semantic": "SEMANTIC_SEGMENTATION",
    "universal": "UNIVERSAL_SEGMENTATION",
    "instance": "INSTANCE_SEGMENTATION",
}
WRITES = {"causal", "seq2seq", "speech", "image-text"}
"""The families whose classes write tokens."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One class of the zoo."""

    name: str
    family: str
    model_type: str

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        """The class itself."""
        return getattr(transformers, self.name)


def entries() -> list[Entry]:
    """The zoo's classes in the order of their families, each once."""
    found: dict[str, Entry] = {}
    for family, mapping in FAMILIES.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for model_type, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(name, Entry(name, family, model_type))
    return list(found.values())


def entry(name: str) -> Entry:
    """The one of that class name."""
    return next(one for one in entries() if one.name == name)
