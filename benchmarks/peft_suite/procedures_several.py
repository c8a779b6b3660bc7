"""Several adapters: rows with their own, weighted combinations, and generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import peft
import torch
from torch import Tensor

import peftfn as pf
from peft_suite import by_hand, compare, models
from peft_suite.procedures_training import double
from peft_suite.subject import Subject, cast, first, quiet, saved
from peft_suite.table import procedure
from peft_suite.verdicts import WrongError, is_refusal

WEIGHTS = ([0.5, 1.5, 1.5], [-0.5, -0.8, -1.2])
EXACT = ("linear", "ties", "magnitude_prune")
OF_DELTAS = ("svd", "ties_svd", "magnitude_prune_svd")
RANDOM = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")


@procedure("mixed_adapter_batches")
def mixed(subject: Subject, _: Mapping[str, Any]) -> None:
    """Row n of a routed batch is row n of the base, of adapter 0 or of adapter 1, as its index says.

    Where peft refuses it (bare parameters), a refusal is as right as the rows.
    """
    with _may_refuse(subject):
        mixed_rows(subject, subject.with_(seed=1))


@contextlib.contextmanager
def _may_refuse(subject: Subject) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not (subject.kwargs.get("target_parameters") and is_refusal(error)):
            raise


def mixed_rows(subject: Subject, other: Subject) -> None:
    """Raise where a row of a batch is not that of its own adapter."""
    rows = {name: torch.cat([value] * 3) for name, value in subject.inputs.items()}
    count = len(next(iter(rows.values())))
    index = [row % 3 - 1 for row in range(count)]
    stacked = pf.stack([subject.adapter, other.adapter])
    with torch.no_grad(), quiet():
        ours = first(pf.apply(subject.model, stacked, rows, index=index))
        singles = [first(subject.base(torch.float64)(**rows)), *(first(one.exact(**rows)) for one in (subject, other))]
    wanted = torch.stack([singles[which + 1][row] for row, which in enumerate(index)])
    compare.close("routed output", ours, wanted)
    compare.differ("routing", singles[1], singles[2])


@procedure("generate_with_mixed_adapter_batches_and_beam_search")
def mixed_beams(subject: Subject, _: Mapping[str, Any]) -> None:
    """Beams of rows with their own adapters are the beams of each adapter alone."""
    with _may_refuse(subject):
        _mixed_beams(subject)


def _mixed_beams(subject: Subject) -> None:
    other = subject.with_(seed=1)
    base = subject.base(torch.float64)
    rows = {name: torch.cat([value] * 3) for name, value in subject.inputs.items()}
    index = [row % 3 - 1 for row in range(len(rows["input_ids"]))]
    adapters = [pf.load(saved(_stronger(one)), base) for one in (subject, other)]
    options = {"max_length": 15, "num_beams": 4, "early_stopping": True}
    with torch.no_grad(), quiet():
        ours = pf.bind(base, pf.stack(adapters), index=index).generate(**rows, **options)
        singles = [base.generate(**rows, **options)]
        singles += [_stronger(one).generate(**rows, **options) for one in (subject, other)]
    for row, which in enumerate(index):
        compare.equal(f"tokens of row {row}", _trimmed(ours[row]), _trimmed(singles[which + 1][row]))


def _stronger(subject: Subject) -> Any:
    model = cast(subject.peft_model(), torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(3.0)
    return model


def _trimmed(row: Tensor) -> list[int]:
    tokens = row.tolist()
    while tokens and tokens[-1] >= 60:
        tokens.pop()
    return tokens


@procedure("generate", "generate_pos_args")
def generation(subject: Subject, extra: Mapping[str, Any]) -> None:
    """Greedy tokens of a bound model are peft's, in float64; without names where peft takes them so."""
    with torch.no_grad(), quiet():
        theirs = subject.exact.generate(**_prompt(subject, extra))
        base = subject.base(torch.float64)
        bound = pf.bind(base, _same(subject, base))
        ours = (
            bound.generate(subject.inputs["input_ids"]) if "raises_err" in extra else bound.generate(**subject.inputs)
        )
    wanted = theirs.tolist()
    if subject.config.peft_type in {"PROMPT_TUNING", "P_TUNING"} and ours.tolist() != wanted:
        # peft counts positions past a masked token inside a row, where the base's `generate` does not.
        wanted = by_hand.greedy(base, _same(subject, base).params[""]["prompt_embeddings"], subject.inputs, ours)
    compare.equal("tokens", *[[_to_end(row) for row in rows] for rows in (ours.tolist(), wanted)])
    if ours.shape[1] <= 1:
        raise WrongError("nothing was generated")


def _to_end(row: list[int]) -> list[int]:
    end = models.TOKENS["eos_token_id"]
    return row[: row.index(end)] if end in row else row


def _prompt(subject: Subject, extra: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"input_ids": subject.inputs["input_ids"]} if "raises_err" in extra else subject.inputs


def _same(subject: Subject, base: Any) -> pf.Adapter:
    """peft's adapter in float64."""
    subject.config  # noqa: B018
    return pf.load(saved(subject.exact), base)


@procedure("generate_half_prec")
def generation_half(subject: Subject, _: Mapping[str, Any]) -> None:
    """A bound bfloat16 model generates from padded rows, with first scores as near to float64 as peft's."""
    rows = {
        "input_ids": torch.tensor([[1, 1, 1], [2, 1, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
    }
    subject.config  # noqa: B018
    model, base = subject.peft_model(torch.bfloat16), subject.base(torch.bfloat16)
    bound = pf.bind(base, pf.load(saved(model), base))
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 3}
    with torch.no_grad(), quiet():
        ours = bound.generate(**rows, **options)
        theirs = model.generate(**rows, **options)
        exact = cast(subject.peft_model(torch.bfloat16), torch.float64).generate(**rows, **options)
    # peft counts positions past the masked token inside the second row, which a prompt does not put aside: see by_hand.
    rows_ = slice(0, 1) if subject.config.peft_type in {"PROMPT_TUNING", "P_TUNING"} else slice(None)
    scores = [one.scores[0][rows_] for one in (ours, exact, theirs)]
    # A few of its roundings apart, after a model of a few layers.
    compare.close("first scores", *scores, share=8 * 2**-8)
    compare.equal("shape of the tokens", ours.sequences.shape, theirs.sequences.shape)


@procedure("weighted_combination_of_adapters")
def combinations(subject: Subject, _: Mapping[str, Any]) -> None:
    """Every way to combine gives peft's weights, of either sign; unlike ranks are refused where peft does."""
    lora = subject.config_cls.__name__ == "LoraConfig"
    if subject.kwargs.get("target_parameters"):
        _summed(subject)  # peft refuses it
        return
    larger = subject.with_(seed=2, r=20) if lora else subject.with_(seed=2)
    parts = [subject, subject.with_(seed=1), larger]
    for weights in WEIGHTS:
        model = _together(parts)
        _one_way(parts, model, weights, [0], "linear" if not lora else "svd", 1.0)
        if not lora:
            _one_way(parts, model, weights, [1, 2], "linear", 1.0)
            continue
        for way in (*OF_DELTAS, "cat"):
            _one_way(parts, model, weights, [1, 2], way, 0.5)
        for way in EXACT:
            _one_way(parts, model, weights, [0, 1], way, 0.5)
        for way in RANDOM:
            _one_way(parts, model, weights, [1, 2] if "svd" in way else [0, 1], way, 1.0)
            pf.combine([one.adapter for one in parts[:2]], weights[:2], way, density=0.5)
        for way in (*EXACT, *RANDOM[:2]):
            _refused(parts, weights, way)


def _summed(subject: Subject) -> None:
    """`cat` of adapters of bare parameters is the weighted sum of what they add, or refused."""
    adapters = [double(one.adapter) for one in (subject, subject.with_(seed=1))]
    base = subject.base(torch.float64)
    with _may_refuse(subject):
        plain = base.state_dict()
        ours = pf.merge(plain, pf.combine(adapters, [0.5, -1.5], "cat"))
        parts = [pf.merge(plain, adapter) for adapter in adapters]
        for name, tensor in ours.items():
            if tensor is not plain[name]:
                wanted = plain[name] + 0.5 * (parts[0][name] - plain[name]) - 1.5 * (parts[1][name] - plain[name])
                compare.close(f"combined {name}", tensor, wanted, share=1e-9)


def _together(parts: Sequence[Subject]) -> Any:
    """peft's model in float64 with all of them, from their files."""
    model = cast(peft.PeftModel.from_pretrained(parts[0].base(), str(parts[0].folder), "a0"), torch.float64)
    for number, part in enumerate(parts[1:], 1):
        model.load_adapter(str(part.folder), f"a{number}")
    return cast(model, torch.float64).eval()


def _one_way(
    parts: Sequence[Subject], model: Any, weights: Sequence[float], which: Sequence[int], way: str, density: float
) -> None:
    """Combine some of them both ways and compare what comes out of the model."""
    given, name = [weights[number] for number in which], f"{way}-{len(model.peft_config)}"
    pruned = {"density": density} if any(word in way for word in ("ties", "dare", "prune")) else {}
    adapters = [double(parts[number].adapter) for number in which]
    ours = pf.combine(adapters, given, way, **pruned)
    kind = {} if parts[0].config_cls.__name__ == "IA3Config" else {"combination_type": way}
    with quiet():
        model.add_weighted_adapter([f"a{number}" for number in which], given, name, **kind, **pruned)
        model.set_adapter(name)
        truth = parts[0].run(model.eval())
        result = parts[0].apply(ours, parts[0].base(torch.float64))
    compare.close(f"output of {way}", result, truth, share=1e-5)


def _refused(parts: Sequence[Subject], weights: Sequence[float], way: str) -> None:
    pruned = {} if way == "linear" else {"density": 0.5}
    try:
        pf.combine([one.adapter for one in parts[1:]], weights[1:], way, **pruned)
    except ValueError:
        return
    raise WrongError(f"{way} of unlike ranks was combined without a word")
