"""What is to be reached, as a table: which case of which measurement, over what, and how far."""

from __future__ import annotations

from typing import NamedTuple

TIME, EXCESS, FLOOR, PEAK = ("to_peft",), ("excess",), ("to_floor",), ("peak_to_peft",)
"""Its time over peft's; what it takes beyond the base, over what peft takes beyond it; over the base's; memory."""


class Goal(NamedTuple):
    """A goal.

    Attributes:
        section: what it is about.
        what: what is compared.
        limit: how far to get.
        group: the measurement, as a pattern: of several, the worst counts.
        case: which of its cases.
        ratios: the case's ratios that are meant, of which the worst counts; `to.NAME` is the one over case NAME.
        times: the goal is how many times as fast as the other it is, at least; else the ratio, at most.
        device: where.
    """

    section: str
    what: str
    limit: float
    group: str
    case: str
    ratios: tuple[str, ...] = TIME
    times: bool = False
    device: str = "cpu"


def _goals(
    section: str,
    *rows: tuple[str, float, str, str],
    ratios: tuple[str, ...] = TIME,
    times: bool = False,
    device: str = "cpu",
) -> list[Goal]:
    return [Goal(section, what, limit, group, case, ratios, times, device) for what, limit, group, case in rows]


FLOAT, BFLOAT = "float32, dropout {}", "bfloat16 base, dropout {}"
PLAIN, DROPPED = f"training step, {FLOAT}".format(0), f"training step, {FLOAT}".format(0.1)
HALF, HALF_DROPPED = f"training step, {BFLOAT}".format(0), f"training step, {BFLOAT}".format(0.1)
STEP, OURS = "training step,", "apply + backward"

GOALS = (
    *_goals(
        "A training step",
        ("beyond the base, float32", 0.6, PLAIN, "bind + backward"),
        ("the same, dropout 0.1", 0.5, DROPPED, "bind + backward"),
        ("the same, bfloat16 base, dropout 0.1", 0.5, HALF_DROPPED, "bind + backward"),
        ratios=EXCESS,
    ),
    *_goals(
        "A training step",
        ("`torch.func.grad` to peft's `backward()`, float32", 1, PLAIN, "torch.func.grad"),
        ("the same, dropout 0.1", 1, DROPPED, "torch.func.grad"),
        ("the same, bfloat16 base", 1, HALF, "torch.func.grad"),
        ("the same, bfloat16 base, dropout 0.1", 1, HALF_DROPPED, "torch.func.grad"),
    ),
    *_goals(
        "Bytes kept for backward",
        ("beyond the base, float32", 1, f"kept, {FLOAT}".format(0), "peftfn"),
        ("the same, dropout 0.1", 0.5, f"kept, {FLOAT}".format(0.1), "peftfn"),
        ("the same, bfloat16 base", 0.5, f"kept, {BFLOAT}".format(0), "peftfn"),
        ("the same, bfloat16 base, dropout 0.1", 0.35, f"kept, {BFLOAT}".format(0.1), "peftfn"),
        ratios=EXCESS,
    ),
    *_goals(
        "On a quantized base",
        ("a training step, nf4, the slowest of two dtypes, with dropout or without", 1, f"{STEP} nf4, *", OURS),
        ("the same, 8 bits", 1, f"{STEP} 8-bit, *", OURS),
        ("bytes kept for backward, nf4, bfloat16, with dropout or without", 0.7, "kept, nf4, bfloat16, *", "peftfn"),
        ("the same, float32", 0.7, "kept, nf4, float32, *", "peftfn"),
    ),
    *_goals("A forward", ("convolution 3×3, 64 to 64", 0.7, "forward, 8×64→64 32×32, 3×3/1, r=16", "peftfn")),
    *_goals(
        "A forward",
        ("the worst convolution, to the better of apart and as one", 1.02, "forward, *", "peftfn"),
        ratios=("to.always apart", "to.always as one"),
    ),
    *_goals(
        "A forward",
        ("one token, 112 sites, to the bare base: `bind`", 1.35, "forward of one token", "bind"),
        ("the same: `apply`", 1.45, "forward of one token", "apply"),
        ratios=FLOOR,
    ),
    *_goals("A forward", ("each of four adapters in turn, one token", 0.8, "switching", "apply")),
    *_goals(
        "Graphs compiled",
        ("16 adapters of one rank and any alpha", 1, "graphs", "16 adapters of one rank"),
        ("16 adapters of mixed ranks", 2, "graphs", "16 adapters of mixed ranks"),
        ("16 assignments of rows", 1, "graphs", "16 assignments of rows"),
        ratios=("graphs",),
    ),
    *_goals(
        "Many adapters",
        ("32 rows of one token, an adapter each", 4.8, "one token, 32 rows, an adapter each", "apply(index=)"),
        ("the same, bound once", 4.8, "one token, 32 rows, an adapter each", "bind(index=)"),
        ("the same in another order", 4, "one token, 32 rows, in another order", "apply(index=)"),
        ("the same, bound once", 4, "one token, 32 rows, in another order", "bind(index=)"),
        ("ensemble of 8, one token, 8 loaded in peft", 8, "ensemble of 8, one token, 8 in peft", "apply(index=)"),
        ("the same, bound once", 8, "ensemble of 8, one token, 8 in peft", "bind(index=)"),
        ("the same, 32 loaded in peft", 12, "ensemble of 8, one token, 32 in peft", "apply(index=)"),
        ("ensemble of 8, top layers adapted, 4×64 tokens", 2.8, "ensemble of 8, adapted at the top*", "vmap"),
        ("gradients of 32 adapters, 16 tokens each", 5.5, "training 32 adapters, 16 tokens each", "apply(index=)"),
        ("gradients of 8 adapters, 32 tokens each", 1.9, "training 8 adapters, 32 tokens each", "apply(index=)"),
        ("200 adapters from disk, then one batch", 20, "200 adapters from disk, then one batch", "load_stack"),
        times=True,
    ),
    *_goals(
        "Many adapters",
        (
            "gradients of each sample, to one batched gradient",
            1.1,
            "gradients of 8 rows of 32 tokens, each",
            "each row",
        ),
    ),
    *_goals(
        "Files",
        ("merge of 2 GB from file to file: wall time", 0.3, "merge of 2 GB", "merge_folder"),
        ("merge of 10 GB: wall time", 0.3, "merge of 10 GB", "merge_folder"),
        ("from files to the first adapted output, 224 sites", 0.3, "files to first output, 224 sites", "peftfn"),
    ),
    *_goals(
        "Files",
        ("merge of 2 GB: peak memory", 0.15, "merge of 2 GB", "merge_folder"),
        ("merge of 10 GB: peak memory", 0.15, "merge of 10 GB", "merge_folder"),
        ratios=PEAK,
    ),
    *_goals(
        "Files",
        ("merge of 2 GB: wall time to a copy of the files", 1.25, "merge of 2 GB", "merge_folder"),
        ("merge of 10 GB: wall time to a copy of the files", 1.25, "merge of 10 GB", "merge_folder"),
        ratios=("to_copy",),
    ),
    *_goals(
        "On a GPU",
        ("training step, float32", 0.85, PLAIN, "bind + backward"),
        ("the same, dropout 0.1", 0.75, DROPPED, "bind + backward"),
        ("32 rows of one token, an adapter each", 0.1, "one token, 32 rows, an adapter each", "apply(index=)"),
        device="cuda",
    ),
    *_goals(
        "On a GPU", ("peak memory of a step, dropout 0.1", 0.8, DROPPED, "bind + backward"), ratios=PEAK, device="cuda"
    ),
)
