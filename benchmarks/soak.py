"""Many adapters over one base for minutes: threads answer random mixed batches while adapters are loaded and dropped.

Half of the threads route LoRA adapters of unlike rank, half prompts of unlike length. Each answer is held against what
the same adapter gave alone before; the base is held against its bits; memory, against what it was after the first
quarter. The registry is a plain dictionary of adapters that are mapped from disk.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lib import harness, setting
from torch import Tensor
from tqdm import tqdm

import peftfn as pf

TOLERANCE = 1e-5  # of the largest logit: sums are taken in another order
GROWTH = 0.05  # threads have arenas of their own, which fill up at their own pace
TEXTS, LENGTH = 8, 12
SIZES = setting.Sizes(layers=2, hidden=128, intermediate=256, rows=TEXTS, tokens=LENGTH)


class Shelf(NamedTuple):
    """Adapters of one method: their folders by name, those that are loaded, and what each gives alone.

    Attributes:
        folders: every adapter's.
        loaded: the registry.
        alone: each adapter's logits for every text, (texts, length, words); of the bare base under the name "".
    """

    folders: Mapping[str, Path]
    loaded: dict[str, pf.Adapter]
    alone: Mapping[str, Tensor]


class Report(NamedTuple):
    """What a run found.

    Attributes:
        batches: how many were answered.
        rows: how many rows they had.
        wrong: rows that were not what the adapter gives alone.
        furthest: the largest distance of a row, as a share of its largest logit.
        changes: adapters loaded and dropped.
        before: MiB of memory after the first quarter, the median of that time.
        after: the same in the last quarter.
        errors: what threads raised.
        base_changed: whether the base has other bits than before.
    """

    batches: int
    rows: int
    wrong: int
    furthest: float
    changes: int
    before: float
    after: float
    errors: list[str]
    base_changed: bool

    def __str__(self) -> str:
        lines = [
            f"{self.batches:,} batches, {self.rows:,} rows; {self.changes:,} adapters loaded or dropped meanwhile",
            f"{self.wrong} rows differ from the adapter alone; the furthest by {self.furthest:.1e} of a row's largest",
            f"memory {self.before:.0f} MiB in the second quarter, {self.after:.0f} MiB in the last ({self.grown:+.1%})",
            f"the base has {'CHANGED' if self.base_changed else 'not changed'}",
        ]
        return "\n".join([*lines, *(self.errors or ["no thread raised anything"])])

    @property
    def grown(self) -> float:
        """By which share memory has grown between the second quarter and the last."""
        return self.after / self.before - 1


def shelves(base: Any, texts: Tensor, count: int, folder: Path) -> list[Shelf]:
    """LoRA adapters and prompts, `count` in all, saved, with what each gives alone."""
    draw = random.Random(0)
    made: list[Shelf] = []
    for kind in ("lora", "prompt"):
        folders, alone = dict[str, Path](), {"": pf.apply(base, (), {"input_ids": texts}).logits}
        for number in tqdm(range(count // 2), desc=f"{kind} adapters", leave=False, disable=not sys.stderr.isatty()):
            config: pf.PeftConfig = (
                pf.LoraConfig(
                    r=draw.choice((2, 4, 8)), lora_alpha=1, target_modules="all-linear", init_lora_weights=False
                )
                if kind == "lora"
                else pf.PromptTuningConfig(num_virtual_tokens=draw.randint(1, 5), task_type="CAUSAL_LM")
            )
            adapter = pf.init(base, config, torch.Generator().manual_seed(number))
            name = f"{kind}-{number}"
            folders[name] = pf.save(adapter, folder / name)
            alone[name] = pf.apply(base, adapter, {"input_ids": texts}).logits[:, -LENGTH:]
        made.append(Shelf(folders, {}, alone))
    return made


class Worker(threading.Thread):
    """Answers random batches until it is told to stop."""

    def __init__(self, base: Any, shelf: Shelf, texts: Tensor, seed: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._base, self._shelf, self._texts, self._stop_event = base, shelf, texts, stop
        self._draw = random.Random(seed)
        self.batches = self.rows = self.wrong = 0
        self.furthest = 0.0
        self.error: str | None = None

    def run(self) -> None:
        """Answer batches; a thread that raises keeps what it raised."""
        try:
            with torch.no_grad():
                while not self._stop_event.is_set():
                    self._answer()
        except Exception as error:  # noqa: BLE001  # the report says what it was
            self.error = f"{type(error).__name__}: {error}"

    def _answer(self) -> None:
        registry = dict(self._shelf.loaded)  # adapters may be dropped meanwhile: this batch keeps those that it has
        names = self._draw.sample(sorted(registry), min(self._draw.randint(1, 8), len(registry)))
        index = [self._draw.randint(-1, len(names) - 1) for _ in range(self._draw.randint(1, 16))]
        rows = [self._draw.randrange(TEXTS) for _ in index]
        stacked = pf.stack([registry[name] for name in names])
        logits = pf.apply(self._base, stacked, {"input_ids": self._texts[rows]}, index=index).logits[:, -LENGTH:]
        for found, number, row in zip(logits, index, rows, strict=True):
            expected = self._shelf.alone[names[number] if number >= 0 else ""][row]
            apart = float((found - expected).abs().max() / expected.abs().max())
            self.furthest = max(self.furthest, apart)
            self.wrong += not apart <= TOLERANCE
        self.batches += 1
        self.rows += len(index)


def turn_over(shelf: Shelf, draw: random.Random) -> None:
    """Load one adapter more, or drop one, so that about half of them are there."""
    missing = sorted(set(shelf.folders) - set(shelf.loaded))
    if missing and (len(shelf.loaded) < 2 or draw.random() < len(missing) / len(shelf.folders)):
        name = draw.choice(missing)
        shelf.loaded[name] = pf.load(shelf.folders[name], mmap=True)
    else:
        del shelf.loaded[draw.choice(sorted(shelf.loaded))]


def memory() -> float:
    """MiB that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def soak(minutes: float, adapters: int = 200, threads: int = 8) -> Report:
    """Answer random batches from `threads` threads for so long."""
    torch.set_num_threads(1)
    base = setting.llama(SIZES).eval()
    texts = torch.randint(0, setting.VOCABULARY, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(1))
    bits = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    stop, draw = threading.Event(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made = shelves(base, texts, adapters, Path(folder))
        for shelf in made:
            for name in sorted(shelf.folders)[: len(shelf.folders) // 2]:
                shelf.loaded[name] = pf.load(shelf.folders[name], mmap=True)
        workers = [Worker(base, made[n % len(made)], texts, n, stop) for n in range(threads)]
        for worker in workers:
            worker.start()
        changes, held = _watch(made, workers, 60 * minutes, draw)
        stop.set()
        for worker in workers:
            worker.join()
    quarter = max(1, len(held) // 4)
    return Report(
        batches=sum(worker.batches for worker in workers),
        rows=sum(worker.rows for worker in workers),
        wrong=sum(worker.wrong for worker in workers),
        furthest=max(worker.furthest for worker in workers),
        changes=changes,
        before=statistics.median(held[quarter : 2 * quarter] or held),
        after=statistics.median(held[-quarter:]),
        errors=[worker.error for worker in workers if worker.error],
        base_changed=any(not torch.equal(bits[name], tensor) for name, tensor in base.state_dict().items()),
    )


def _watch(made: list[Shelf], workers: list[Worker], seconds: float, draw: random.Random) -> tuple[int, list[float]]:
    """Load and drop adapters for so long; how many, and the memory at each time."""
    changes, held = 0, list[float]()
    start = time.monotonic()
    with tqdm(total=round(seconds), unit="s", desc="soak", disable=not sys.stderr.isatty()) as bar:
        while (gone := time.monotonic() - start) < seconds and not any(worker.error for worker in workers):
            for shelf in made:
                turn_over(shelf, draw)
                changes += 1
            gc.collect()
            held.append(memory())
            bar.update(round(gone) - bar.n)
            time.sleep(0.05)
    return changes, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    given = parser.parse_args()
    report = soak(given.minutes, given.adapters, given.threads)
    print(f"{given.adapters} adapters, {given.threads} threads, {given.minutes:g} minutes, {harness.machine(1)['cpu']}")
    print(report)
    if report.wrong or report.errors or report.base_changed or report.grown > GROWTH:
        raise SystemExit("the soak found what it should not")


if __name__ == "__main__":
    main()
