"""Time and memory of a streamed merge of a large folder, beside peft's and beside copying the files.

Each sample is a process of its own, so that peak memory is its own; the cases take turns, and each finds the base's
files in the kernel's memory and the disk idle. The clock starts when the libraries are imported, and peak memory counts
them. The results of both libraries are compared, bit for bit, before anything is timed.

`merge_folder` ends with its files on disk, and peft with them in the kernel's memory; so there are two plain copies,
by reading and writing 1 MiB at a time, one with an fsync of each file and one without, and the kernel's own copy
without. A merge is held against the copy that ends as it does.

    python benchmarks/merge_stream.py --gb 2 --repeats 3
    python benchmarks/merge_stream.py --gb 10 --repeats 3
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import torch
from lib import harness
from lib.records import PEFT, RESULTS, Quartiles, quartiles, save
from lib.timing import in_child, peak

OURS = "merge_folder"
COPY, SYNCED, KERNEL = "read and write", "read and write, fsync", "copy in the kernel"


def _ours(base: Path, adapter: Path, output: Path) -> Callable[[], object]:
    import peftfn as pf

    return lambda: pf.merge_folder(base, pf.load(adapter, mmap=True), output, progress=False)


def _peft(base: Path, adapter: Path, output: Path) -> Callable[[], object]:
    import peft
    import transformers

    def run() -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        merged: Any = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(output)

    return run


def _copy(copied: Callable[[Path, Path], object]) -> Callable[[Path, Path, Path], Callable[[], object]]:
    def prepare(base: Path, adapter: Path, output: Path) -> Callable[[], object]:
        del adapter

        def run() -> None:
            output.mkdir()
            for path in base.iterdir():
                copied(path, output / path.name)

        return run

    return prepare


def _read_and_write(source: Path, target: Path, *, sync: bool) -> None:
    room = memoryview(bytearray(1 << 20))  # one piece of memory throughout: the fastest of the sizes that were tried
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        while count := old.readinto(room):
            new.write(room[:count])
        if sync:
            os.fsync(new.fileno())


CASES = {
    OURS: _ours,
    PEFT: _peft,
    COPY: _copy(functools.partial(_read_and_write, sync=False)),
    SYNCED: _copy(functools.partial(_read_and_write, sync=True)),
    KERNEL: _copy(shutil.copyfile),
}


def child(case: str, base: Path, adapter: Path, output: Path, threads: int) -> None:
    """One sample: what it took, as JSON on stdout."""
    torch.set_num_threads(threads)
    run = CASES[case](base, adapter, output)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps({**took, "peak": peak()}))


def sample(case: str, place: Path, threads: int) -> dict[str, float]:
    """What one run of a case took, in a process of its own, with the base's files in the kernel's memory."""
    output = place / "output"
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    room = bytearray(1 << 20)
    for path in (place / "base").iterdir():  # the case before may have pushed them out
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return in_child(__file__, case, place / "base", place / "adapter", output, threads)


def check(place: Path, threads: int) -> None:
    """Both libraries write the same bits."""
    from safetensors import safe_open

    sample(PEFT, place, threads)
    (place / "output").rename(place / "expected")
    sample(OURS, place, threads)
    found, expected = (_opened(place / name, safe_open) for name in ("output", "expected"))
    assert found.keys() == expected.keys()
    for key, file in expected.items():
        assert torch.equal(found[key].get_tensor(key), file.get_tensor(key)), f"{key} differs from peft's"
    shutil.rmtree(place / "expected")


def _opened(folder: Path, safe_open: Any) -> dict[str, Any]:
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    return {key: file for file in files for key in file.keys()}  # noqa: SIM118  # no mapping


UNITS = {"wall": 1.0, "cpu": 1.0, "peak": 1e-9}  # seconds, seconds, GB
RATIOS = {"to_peft": (PEFT, "wall"), "peak_to_peft": (PEFT, "peak"), "to_copy": (SYNCED, "wall")}


def measure(place: Path, cases: Sequence[str], repeats: int, threads: int, group: str) -> list[dict[str, Any]]:
    """The quartiles of each case, and of its ratios within a round."""
    taken: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    order, shuffle = list(cases), random.Random(0).shuffle
    for turn in range(repeats):
        shuffle(order)
        for case in order:
            taken[case].append(sample(case, place, threads))
            print(f"{turn} {case}: {taken[case][-1]}", file=sys.stderr, flush=True)

    def row(case: str) -> dict[str, Any]:
        found = taken[case]
        own = {what: quartiles([unit * one[what] for one in found]) for what, unit in UNITS.items()}
        others = {
            name: quartiles([one[what] / two[what] for one, two in zip(found, taken[other], strict=True)])
            for name, (other, what) in RATIOS.items()
            if other in taken
        }
        return {"group": group, "what": case, **own, **others, "repeats": repeats}

    return [row(case) for case in cases]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table: medians, and quartiles of the times."""
    lines = ["| what | wall, s | CPU, s | peak memory, GB | wall to peft | peak to peft | wall to the copy on disk |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        spread = "{0.median:.2f} ({0.low:.2f}–{0.high:.2f})".format
        cells = [spread(row["wall"]), spread(row["cpu"]), f"{row['peak'].median:.2f}"]
        cells += [f"{row[name].median:.3f}" if name in row else "–" for name in RATIOS]
        lines.append(f"| {row['what']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a chart of wall time, CPU time and peak memory: medians, with quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")  # a server has no display
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(UNITS), figsize=(3.6 * len(UNITS), 2.8), sharey=True)
    colors = [{OURS: "tab:blue", PEFT: "tab:orange"}.get(row["what"], "tab:gray") for row in rows]
    labels = {"wall": "wall, s", "cpu": "CPU, s", "peak": "peak memory, GB"}
    for axes, what in zip(panels, UNITS, strict=True):
        found: list[Quartiles] = [row[what] for row in rows]
        medians = [one.median for one in found]
        whiskers = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
        names = [row["what"] for row in rows]
        drawn = axes.barh(names, medians, xerr=whiskers, color=colors, ecolor="black", capsize=2)
        axes.bar_label(drawn, [f" {median:.2f}" for median in medians], padding=4, fontsize=8)
        axes.set(xlabel=labels[what], xlim=(0, 1.3 * max(one.high for one in found)))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(f"{title}\nmedians and quartiles; blue: peftfn", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Make the folder, compare, measure, write the rows and the table."""
    if sys.argv[1:2] == ["--child"]:
        case, base, adapter, output, threads = sys.argv[2:]
        child(case, Path(base), Path(adapter), Path(output), int(threads))
        return
    from lib.large_folder import Sizes, make_adapter, make_folder  # not in a child, whose memory is measured

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2, help="size of the weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--without", choices=list(CASES), action="append", default=[], help="a case to leave out")
    parser.add_argument("--quick", action="store_true", help="a small folder, once: to see that it runs")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.gb, chosen.repeats = 0.05, 1
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        total = make_folder(place / "base", Sizes.of(chosen.gb))
        make_adapter(place / "adapter", place / "base", chosen.rank)
        cases = [case for case in CASES if case not in chosen.without]
        if PEFT in cases:
            check(place, chosen.threads)
        rows = measure(place, cases, chosen.repeats, chosen.threads, f"merge of {chosen.gb:g} GB")
    title = f"A merge of {total / 1e9:.2f} GB in bfloat16 from file to file, rank {chosen.rank}"
    text = f"{title}; {chosen.threads} threads, {chosen.repeats} rounds\n\n{table(rows)}"
    print(text)
    if not chosen.quick:
        about = {
            "bytes": total,
            "rank": chosen.rank,
            "machine": harness.machine(chosen.threads) | {"clock": "wall"},
        }
        about["versions"] = harness.versions("torch", "transformers", "peft", "safetensors")
        save(rows, RESULTS / f"merge-{chosen.gb:g}gb.json", **about)
        (RESULTS / f"merge-{chosen.gb:g}gb.md").write_text(text + "\n")
        draw(rows, RESULTS / f"merge-{chosen.gb:g}gb.png", title)


if __name__ == "__main__":
    main()
