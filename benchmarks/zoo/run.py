"""Every architecture of transformers through every check: one process each, a line of JSON for each check that ran.

    make zoo                          all classes, in the environment's transformers; goes on where it stopped
    make zoo ARGS="--shard 1/2"       every second class, for two machines or cores
    make zoo ARGS="--only prompts"    these checks again: their old lines are dropped first
    make zoo ARGS="--classes GPT2LMHeadModel --only rows vmap"
    make zoo ARGS="--sample"          25 classes, held against the kept table; fails where one is worse

Lines are kept in runs/zoo/; when all classes are through, the tables in benchmarks/results/ are written from them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse
import json
import multiprocessing
import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
import transformers
from tqdm import tqdm

from zoo import report
from zoo.checks import chosen
from zoo.classes import Entry, entries
from zoo.isolated import findings, warm_up
from zoo.sample import SAMPLE, worse

LINES = Path(__file__).parent.parent.parent / "runs" / "zoo"


def lines_of(version: str, shard: str = "") -> Path:
    return LINES / f"{version}{shard and '-' + shard.replace('/', 'of')}.jsonl"


def kept(version: str) -> dict[str, dict[str, Any]]:
    """What was found so far: class to check to its finding, of all shards."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(LINES.glob(f"{version}*.jsonl")):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            found.setdefault(one["class"], {})[one["check"]] = one
    for checks in found.values():
        if len(checks) > 1:
            checks.pop("build", None)  # it could not be built then
    return found


def main() -> int:
    given = arguments()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    version, checks = transformers.__version__, chosen(given.only)
    classes = [
        one for one in entries() if not given.classes or one.name in given.classes or one.family in given.classes
    ]
    if given.sample:
        classes = [one for one in classes if one.name in SAMPLE]
    number, count = (int(part) for part in given.shard.split("/"))
    classes = classes[number - 1 :: count]
    if given.sample:
        warm_up()
        found = {one.name: checked for one, checked in each([(one, checks) for one in classes], given.jobs)}
        return worse(found, version)
    work(classes, checks, version, given)
    report.write(kept(version), version, [one.name for one in entries()])
    return 0


def work(classes: list[Entry], checks: list[str], version: str, given: argparse.Namespace) -> None:
    """Runs what is not yet in the lines, and adds it there as it comes."""
    done: dict[str, dict[str, Any]] = {} if given.again else kept(version)
    if given.only and not given.resume:
        done = {
            name: {check: one for check, one in found.items() if check not in checks} for name, found in done.items()
        }
    todo = [(one, [check for check in checks if check not in done.get(one.name, {})]) for one in classes]
    todo = [(one, missing) for one, missing in todo if missing]
    random.Random(0).shuffle(todo)  # families last unlike times: so the bar's guess is fair
    warm_up()
    LINES.mkdir(parents=True, exist_ok=True)
    with lines_of(version, given.shard if given.shard != "1/1" else "").open("a") as lines:
        for one, found in each(todo, given.jobs):
            for check, finding in found.items():
                lines.write(json.dumps({"class": one.name, "family": one.family, "check": check, **finding}) + "\n")
            lines.flush()


def each(todo: list[tuple[Entry, list[str]]], jobs: int) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Each class with what was found, as they come, with a bar that says which one came last."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        running = {pool.submit(findings, one, checks): one for one, checks in todo}
        bar = tqdm(as_completed(running), total=len(running), unit="class", dynamic_ncols=True, mininterval=1)
        for future in bar:
            bar.set_postfix_str(running[future].name)
            yield running[future], future.result()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shard", default="1/1", help="which part of how many, such as 1/2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="classes at a time")
    parser.add_argument("--only", nargs="+", default=[], help="checks or groups of checks to run again")
    parser.add_argument("--resume", action="store_true", help="with --only: go on instead of starting again")
    parser.add_argument("--classes", nargs="+", default=[], help="classes or families; all by default")
    parser.add_argument("--again", action="store_true", help="run all again")
    parser.add_argument("--sample", action="store_true", help="a few classes, held against the kept table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
