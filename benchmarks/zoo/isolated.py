"""A class's checks in a process of its own, with limits of time and memory: whatever it does, the others go on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import time
from typing import Any

from zoo.classes import Entry
from zoo.verdicts import CRASH, NOT_APPLICABLE, Verdict

SECONDS = 40  # of one check, of its own processor time: another load on the machine changes no verdict
TOTAL = 240  # of a class
GIGABYTES = 5  # of memory that it asks for beyond what the parent has


# Of files on this machine; addresses stay.
FOLDERS = re.compile(r"(?<![:/\w.])/(?:[\w.+-]+/)+")


class TooLong(BaseException):
    """The time of a check is over. No Exception: a check that tries things out does not catch it."""


def warm_up() -> None:
    """Imports what every class needs, once, before the forks."""
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers.generation  # noqa: F401
    from transformers import (  # noqa: F401
        BartForConditionalGeneration,
        BertForSequenceClassification,
        DetrForObjectDetection,
        LlamaForCausalLM,
        Qwen2VLForConditionalGeneration,
        ViTForImageClassification,
        WhisperForConditionalGeneration,
    )

    from zoo import checks  # noqa: F401


def findings(entry: Entry, checks: list[str]) -> dict[str, dict[str, Any]]:
    """What each check found on the class; under `build` why it could not be built, if so."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _limit()
        with os.fdopen(write, "w") as pipe:
            _run(entry, checks, pipe)
            pipe.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = [json.loads(line) for line in pipe if line.endswith("\n")]
    _, status = os.waitpid(child, 0)
    found = {one.pop("check"): one for one in lines}
    if "build" in found:
        return found
    for missing in (check for check in checks if check not in found):
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        found[missing] = {"verdict": CRASH, "reason": f"the process ended: {how}", "numbers": {}}
        break  # those after it were not run
    return found


def _run(entry: Entry, checks: list[str], pipe: Any) -> None:
    from zoo.case import Case
    from zoo.checks import CHECKS
    from zoo.verdicts import of_error

    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        try:
            with _timed():
                case = Case(entry)
        except TooLong:
            _say(pipe, "build", Verdict(NOT_APPLICABLE, f"not built: no end within {SECONDS} s"), SECONDS)
            return
        except Exception as error:  # noqa: BLE001  # the class has no tiny model here
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
            _say(pipe, "build", Verdict(NOT_APPLICABLE, f"not built: {reason}"), 0.0)
            return
        for name in checks:
            started = time.process_time()
            try:
                with _timed():
                    verdict = CHECKS[name](case)
            except TooLong:
                verdict = Verdict(CRASH, f"no end within {SECONDS} s")
            except Exception as error:  # noqa: BLE001  # what a check raises is its finding
                verdict = of_error(error)
            _say(pipe, name, verdict, time.process_time() - started)


def _say(pipe: Any, check: str, verdict: Verdict, seconds: float) -> None:
    numbers = {name: float(f"{value:.2e}") for name, value in verdict.numbers.items()}
    reason = FOLDERS.sub("", verdict.reason)
    line = {"check": check, "verdict": verdict.verdict, "reason": reason, "numbers": numbers}
    pipe.write(json.dumps(line | {"seconds": round(seconds, 2)}) + "\n")
    pipe.flush()


@contextlib.contextmanager
def _timed() -> Any:
    def over(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit() -> None:
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: PTH123, SIM115
    size = pages * os.sysconf("SC_PAGE_SIZE") + (GIGABYTES << 30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (TOTAL, TOTAL + 5))
