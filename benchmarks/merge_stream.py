"""Time and memory of a streamed merge of a large folder, beside peft's and beside copying the files.

Each sample is a process of its own, so that peak memory is its own; the cases take turns. The clock starts when the
libraries are imported. The results of both libraries are compared, bit for bit, before anything is timed.

    python benchmarks/merge_stream.py --gb 2 --repeats 3
    python benchmarks/merge_stream.py --gb 10 --without peft
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import torch

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OURS, PEFT, COPY, SYNCED = "merge_folder", "peft", "copy", "copy, on disk"
RESULTS = Path(__file__).parent / "results"
SHARD = 1 << 30  # bytes


class Sizes(NamedTuple):
    """A Llama."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 32_000

    @staticmethod
    def of(gigabytes: float) -> Sizes:
        """One whose weights in bfloat16 take about that much."""
        hidden, intermediate, vocabulary = (4096, 11_008, 32_000) if gigabytes > 5 else (2048, 5632, 32_000)
        if gigabytes < 1:
            hidden, intermediate, vocabulary = 512, 1408, 4000
        each = 2 * (4 * hidden**2 + 3 * hidden * intermediate)
        return Sizes(hidden, intermediate, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / each), vocabulary)


def make_folder(folder: Path, sizes: Sizes) -> int:
    """Write a model of random weights, file by file; its bytes."""
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        vocab_size=sizes.vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shards: list[dict[str, torch.Size]] = [{}]
    held = 0
    for name, parameter in model.named_parameters():
        size = 2 * parameter.numel()
        if shards[-1] and held + size > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = parameter.shape
        held += size
    where: dict[str, str] = {}
    numbers = 0.02 * torch.randn(1 << 22).bfloat16()  # the same ones again and again: quick, and as good here
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        made = {name: _filled(shape, numbers) for name, shape in shard.items()}
        save_file(made, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _filled(shape: torch.Size, numbers: torch.Tensor) -> torch.Tensor:
    return numbers.repeat(-(-shape.numel() // len(numbers)))[: shape.numel()].clone().view(shape)


def make_adapter(folder: Path, base: Path, r: int) -> None:
    """Write a LoRA adapter for all linear layers of the folder, none of whose factors is zero."""
    import transformers

    import peftfn as pf

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(base))
    config = pf.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=list(LINEAR), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    pf.save(pf.init(model, config), folder)


def _ours(base: Path, adapter: Path, output: Path) -> Callable[[], object]:
    import peftfn as pf

    return lambda: pf.merge_folder(base, pf.load(adapter), output, progress=False)


def _peft(base: Path, adapter: Path, output: Path) -> Callable[[], object]:
    import peft
    import transformers

    def run() -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        merged: Any = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(output)

    return run


def _copy(sync: bool) -> Callable[[Path, Path, Path], Callable[[], object]]:
    def prepare(base: Path, adapter: Path, output: Path) -> Callable[[], object]:
        del adapter

        def run() -> None:
            output.mkdir()
            for path in base.iterdir():
                with path.open("rb", buffering=0) as source, (output / path.name).open("wb", buffering=0) as target:
                    while block := source.read(1 << 23):
                        target.write(block)
                    if sync:
                        os.fsync(target.fileno())

        return run

    return prepare


CASES = {OURS: _ours, PEFT: _peft, COPY: _copy(False), SYNCED: _copy(True)}


def child(case: str, base: Path, adapter: Path, output: Path, threads: int) -> None:
    """One sample: what it took, as JSON on stdout."""
    torch.set_num_threads(threads)
    run = CASES[case](base, adapter, output)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    print(json.dumps({**took, "peak": peak}))


def sample(case: str, place: Path, threads: int) -> dict[str, float]:
    """What one run of a case took, in a process of its own."""
    output = place / "output"
    shutil.rmtree(output, ignore_errors=True)
    arguments = [__file__, "--child", case, str(place / "base"), str(place / "adapter"), str(output), str(threads)]
    done = subprocess.run([sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{case} failed: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


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


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | wall, s | CPU, s | peak memory, GB | wall to peft | peak to peft | wall to the copy |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        numbers = (row["wall"], row["cpu"], row["peak"] / 1e9, row["to_peft"], row["peak_to_peft"], row["to_copy"])
        lines.append(f"| {row['what']} | " + " | ".join("–" if one is None else f"{one:.2f}" for one in numbers) + " |")
    return "\n".join(lines)


def measure(place: Path, cases: Sequence[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """The medians of each case, and of its ratios within a round. The files were read before, by `check`."""
    taken: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    order, shuffle = list(cases), random.Random(0).shuffle
    for turn in range(repeats):
        shuffle(order)
        for case in order:
            taken[case].append(sample(case, place, threads))
            print(f"{turn} {case}: {taken[case][-1]}", file=sys.stderr, flush=True)

    def ratio(case: str, other: str, what: str) -> float | None:
        if other not in taken:
            return None
        return statistics.median(one[what] / two[what] for one, two in zip(taken[case], taken[other], strict=True))

    return [
        {
            "what": case,
            **{what: statistics.median(one[what] for one in found) for what in ("wall", "cpu", "peak")},
            "to_peft": ratio(case, PEFT, "wall"),
            "peak_to_peft": ratio(case, PEFT, "peak"),
            "cpu_to_peft": ratio(case, PEFT, "cpu"),
            "to_copy": ratio(case, SYNCED, "wall"),
            "samples": found,
        }
        for case, found in taken.items()
    ]


def main() -> None:
    """Make the folder, compare, measure, write the rows and the table."""
    if sys.argv[1:2] == ["--child"]:
        case, base, adapter, output, threads = sys.argv[2:]
        child(case, Path(base), Path(adapter), Path(output), int(threads))
        return
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
        rows = measure(place, cases, chosen.repeats, chosen.threads)
    text = (
        f"{total / 1e9:.2f} GB in bfloat16, rank {chosen.rank}, {chosen.threads} threads, {chosen.repeats} rounds\n\n"
    )
    text += table(rows)
    print(text)
    if not chosen.quick:
        RESULTS.mkdir(exist_ok=True)
        about = {"bytes": total, "rank": chosen.rank, "threads": chosen.threads, "torch": torch.__version__}
        (RESULTS / f"merge-{chosen.gb:g}gb.json").write_text(
            json.dumps([{**about, **row} for row in rows], indent=1) + "\n"
        )
        (RESULTS / f"merge-{chosen.gb:g}gb.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
