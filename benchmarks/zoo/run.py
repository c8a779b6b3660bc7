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
import random
import warnings
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
    classes = [one for one in entries() if not given.classes or one.name in given.classes or one.family in given.classes]
    if given.sample:
        classes = [one for one in classes if one.name in SAMPLE]
    number, count = (int(part) for part in given.shard.split("/"))
    classes = classes[number - 1 :: count]
    if given.sample:
        found = {one.name: findings(one, checks) for one in progress(classes)}
        return worse(found, version)
    work(classes, checks, version, given)
    report.write(kept(version), version, [one.name for one in entries()])
    return 0


def work(classes: list[Entry], checks: list[str], version: str, given: argparse.Namespace) -> None:
    """Runs what is not yet in the lines, and adds it there as it comes."""
    done: dict[str, dict[str, Any]] = {} if given.again else kept(version)
    if given.only and not given.resume:
        done = {name: {check: one for check, one in found.items() if check not in checks} for name, found in done.items()}
    todo = [(one, [check for check in checks if check not in done.get(one.name, {})]) for one in classes]
    todo = [(one, missing) for one, missing in todo if missing]
    random.Random(0).shuffle(todo)  # families last unlike times: so the bar's guess is fair
    warm_up()
    LINES.mkdir(parents=True, exist_ok=True)
    with lines_of(version, given.shard if given.shard != "1/1" else "").open("a") as lines:
        for one, missing in progress(todo, key=lambda pair: pair[0].name):
            for check, finding in findings(one, missing).items():
                lines.write(json.dumps({"class": one.name, "family": one.family, "check": check, **finding}) + "\n")
            lines.flush()


def progress(items: list[Any], key: Any = lambda one: one.name) -> Any:
    """The items, with a bar that says which one is on."""
    bar = tqdm(items, unit="class", dynamic_ncols=True, disable=None)
    for item in bar:
        bar.set_postfix_str(key(item))
        yield item


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shard", default="1/1", help="which part of how many, such as 1/2")
    parser.add_argument("--only", nargs="+", default=[], help="checks or groups of checks to run again")
    parser.add_argument("--resume", action="store_true", help="with --only: go on instead of starting again")
    parser.add_argument("--classes", nargs="+", default=[], help="classes or families; all by default")
    parser.add_argument("--again", action="store_true", help="run all again")
    parser.add_argument("--sample", action="store_true", help="a few classes, held against the kept table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
