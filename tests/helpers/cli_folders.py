"""Small real model folders and data files for the tests of the command line."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

GOOD = ("sun", "warm", "flower", "spring")
BAD = ("rain", "cold", "mud", "winter")
OTHER = ("the", "a", "day", "was", "full", "of", "and", "in", "my", "garden")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>")


def call(*arguments: object, code: int = 0, columns: int = 200) -> str:
    """What a command prints, on a terminal that wide; its exit code has to be `code`."""
    from typer.testing import CliRunner

    from peftfn.cli.app import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == code, result.output
    return result.output


def words(folder: Path, closed: bool) -> None:
    """Write a tokenizer of the words below; a closed one puts special tokens around a text."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *GOOD, *BAD, *OTHER))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if closed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        names = {"unk_token": "[UNK]", "eos_token": "</s>"}  # as Llama's: nothing to pad with
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    fast.save_pretrained(folder)


def bert(folder: Path) -> Path:
    """A BERT encoder without a classifier, with dropout, of 2 layers and width 16."""
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    words(folder, closed=True)
    return folder


def llama(folder: Path) -> Path:
    """A Llama language model of 2 layers and width 16, whose tokenizer has no token for padding."""
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=64, bos_token_id=2, eos_token_id=4, initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words(folder, closed=False)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 4 to 9 words whose label is given by the words of weather in them."""
    draw = random.Random(seed)
    found: list[dict[str, str]] = []
    for _ in range(count):
        label = draw.choice(("good", "bad"))
        words = draw.choices(OTHER, k=draw.randint(1, 4)) + draw.choices(
            GOOD if label == "good" else BAD, k=draw.randint(3, 5)
        )
        draw.shuffle(words)
        found.append({"text": " ".join(words), "label": label})
    return found


def write_csv(path: Path, found: list[dict[str, str]], delimiter: str = ",") -> Path:
    """The rows as a CSV (or TSV) file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(found)
    return path


def write_jsonl(path: Path, found: list[dict[str, str]]) -> Path:
    """The rows as one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path
