"""Runs peft's test tables through peftfn: `make test-peft-suite`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from peft_suite import (  # noqa: F401  # procedures enter themselves in the table
    battery,
    checks,
    fetch,
    imported,
    inventory,
    judge,
    kept,
    pool,
    report,
    sample,
    verdicts,
)


def main() -> int:
    """Run what is asked for; the exit status is 1 where a sample's verdict is worse than the kept one."""
    options = _options()
    torch.set_num_threads(1)
    modules = imported.modules(fetch.tests())
    cases = inventory.cases(modules)
    chosen = [case for case in cases if re.search(options.only, case.name)]
    if options.sample:
        chosen = sample.of(chosen, options.sample, kept.read(kept.RESULTS))
    store = fetch.BUILD / ("sample.jsonl" if options.sample or options.only else "verdicts.jsonl")
    if options.fresh or options.sample or options.only:
        store.unlink(missing_ok=True)
    # What was not right is tried again: it is what changes.
    again = (verdicts.UNWRITTEN, *verdicts.BAD)
    known = {name: verdict for name, verdict in kept.lines(store).items() if verdict.word not in again}
    waiting = [case for case in chosen if case.name not in known]
    decided = {case.name: judge.at_once(case, modules[case.file]) for case in waiting}
    known |= {name: verdict for name, verdict in decided.items() if verdict}
    waiting = [case for case in waiting if case.name not in known]
    groups = inventory.groups(waiting)

    def make() -> pool.Judge:
        memory = judge.Memory()
        return lambda case: judge.verdict(case, modules[case.file], memory, battery.verdict)

    with tqdm(total=len(chosen), initial=len(chosen) - len(waiting), unit="case", disable=options.quiet) as bar:
        for case, verdict in pool.verdicts(groups, make, fetch.BUILD / "running", options.jobs, options.limit):
            known[case.name] = verdict
            kept.append(store, case, verdict)
            bar.update()
    found = [(case, known[case.name]) for case in chosen]
    if options.sample or options.only:
        return report.against(found, kept.read(kept.RESULTS), whole=bool(options.only))
    kept.write(kept.RESULTS, found)
    report.write(found, kept.RESULTS.with_suffix(".md"))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m peft_suite", description=__doc__)
    parser.add_argument("--jobs", type=int, default=max(1, min(4, os.cpu_count() or 1)), help="processes at once")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a group of 20 cases")
    parser.add_argument("--only", default="", help="a regex: only cases whose name it is found in; nothing is kept")
    parser.add_argument(
        "--sample", type=int, nargs="?", const=300, default=0, help="at most so many cases, of each kind some"
    )
    parser.add_argument("--fresh", action="store_true", help="start anew, not where the last run stopped")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
