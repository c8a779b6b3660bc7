"""The typer app: what is typed, read into plain values and handed to plain functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

import peftfn as pf
from peftfn import methods
from peftfn.cli import options
from peftfn.cli.errors import UserError, one_sentence
from peftfn.cli.settings import EvalOptions, GenerateOptions, SweepSettings, TrainSettings
from peftfn.cli.sweep import grids

app: Any = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune a frozen transformers model with a small adapter, in PEFT's file format.",
    epilog="Start with `peftfn demo`. Wrong input ends with one sentence; PEFTFN_TRACEBACK=1 adds its origin.",
)

# Fields of the config that the command fills itself, or that only carry over from PEFT's files.
FILLED = (
    *("task_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "peft_version"),
    # The run says how many steps it has, files say which ranks are left, and the other three do nothing in AdaLoRA.
    *("adalora.total_step", "adalora.rank_pattern", "adalora.r", "adalora.use_rslora", "adalora.alpha_pattern"),
)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"peftfn {pf.__version__}")
        raise typer.Exit


@app.callback()
def about(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Fine-tune a frozen transformers model with a small adapter, in PEFT's file format."""


METHODS = {method.config.peft_type.lower().replace("_", "-"): method.config for method in methods.TABLE}
"""Every method's config, by the name that --method takes."""

AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Adapter folder or hub id.", show_default=False)
]
OutputArgument = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write.", show_default=False)]
SubfolderOption = Annotated[str | None, typer.Option(help="Folder of the adapter inside a repository or folder.")]
ModelOption = Annotated[
    str | None, typer.Option(metavar="FOLDER|ID", help="Base model, if not the one in the adapter's config.")
]


def train(settings: TrainSettings, config: pf.PeftConfig) -> None:
    """Train an adapter on a CSV, TSV, JSONL file or a `datasets` name.

    The base model stays as it is, to the bit. Into --output go the adapter, in PEFT's two files, a picture of
    the loss, and a line of numbers for each step. Killed and started again, the same command goes on where it
    was.

    Each method has its options in a panel of its own, beside those that it shares with the ones above it.

    Example: `peftfn train --model MODEL --data train.csv --eval-data test.csv --output out --r 8`

    Another: `peftfn train --method prompt-tuning --num-virtual-tokens 20 --lr 0.03 --model MODEL --data train.csv
    --output out`
    """
    from peftfn.cli.bases import quiet  # transformers takes seconds to import: not before --help
    from peftfn.cli.train.training import describe, fit, prepare

    quiet()
    job = prepare(settings, config)
    typer.echo(describe(job))
    fit(job, typer.echo)


app.command("train")(
    one_sentence(
        options.command(
            train,
            {TrainSettings: "Run"},
            fixed=FILLED,
            one_of=options.OneOf("method", METHODS, "What to train; its options are in the panels below."),
        )
    )
)


def sweep(settings: SweepSettings, config: pf.PeftConfig, values: dict[str, list[Any]]) -> None:
    """Train several adapters over one base at once, one for each combination of the values.

    --lr, --weight-decay, --warmup, --max-grad-norm, --seed and every number of the method's config take several
    values, by comma or by repeating the option. Each adapter is what `peftfn train` makes of its values, but for
    dropout, of which each draws its own; it goes into a folder of its own in --output, where summary.csv and a picture
    of all losses are too. Killed and started again, the same command goes on where it was.

    Example: `peftfn sweep --model MODEL --data train.csv --eval-data test.csv --lr 1e-3,3e-3 --r 4,8 --seed 0,1
    --output sweep`
    """
    from peftfn.cli.bases import quiet  # transformers takes seconds to import: not before --help
    from peftfn.cli.sweep.sweeping import describe, fit, prepare

    quiet()
    plan = prepare(settings, config, values)
    typer.echo(describe(plan))
    fit(plan, typer.echo)


app.command("sweep")(
    one_sentence(
        options.command(
            sweep,
            {SweepSettings: "Run"},
            fixed=(*FILLED, "resume"),
            one_of=options.OneOf("method", METHODS, "What to train; its options are in the panels below."),
            several=(*grids.OF_RUN, *options.numbers(METHODS.values())),
        )
    )
)


def evaluate(chosen: EvalOptions) -> None:
    """Measure the base, and the base with an adapter, on the same rows.

    Accuracy and loss for classification, perplexity and loss for a language model. What is not given is as in
    the adapter's training.

    Example: `peftfn eval --adapter out --data test.csv`

    Another, with the adapter that each row names in a column:
    `peftfn eval --adapter-column author --adapters ann=out/ann,bob=out/bob --data test.csv`
    """
    from peftfn.cli.measure import compare

    typer.echo(str(compare(chosen)))


app.command("eval")(one_sentence(options.command(evaluate, {EvalOptions: "Options"})))


def generate(chosen: GenerateOptions) -> None:
    """Write on after each text of a file, each row with the adapter that it names, in mixed batches.

    Prints the rows as JSON, one a line, with the written text as `generated`; or writes them to --output.

    Example: `peftfn generate --data prompts.csv --adapter-column author --adapters ann=out/ann,bob=out/bob`
    """
    from peftfn.cli import writing

    rows = writing.write(chosen)
    if chosen.output is None:
        for line in writing.lines(rows):
            typer.echo(line)
    else:
        writing.save(rows, chosen.output)
        typer.echo(f"{len(rows):,} rows in {chosen.output}")


app.command("generate")(one_sentence(options.command(generate, {GenerateOptions: "Options"})))


def _filled(named: Mapping[str, str | None], places: Sequence[str]) -> list[str]:
    """The values of options that may be typed without their names: those without one take `places` in order.

    Raises:
        UserError: there are more places than options that have no value, or fewer.
    """
    open_ones = [name for name, value in named.items() if value is None]
    if len(open_ones) != len(places):
        given = ", ".join([*(f"{name} {value}" for name, value in named.items() if value is not None), *places])
        raise UserError(f"given: {given or 'nothing'}; expected {' and '.join(named)}, each once")
    by_place = dict(zip(open_ones, places, strict=True))
    return [by_place[name] if value is None else value for name, value in named.items()]


@app.command("merge")
@one_sentence
def merge(
    places: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER OUTPUT", help="The same two, without their options.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="FOLDER|ID", help="Adapter folder or hub id.")] = None,
    output: Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder to write.")] = None,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as the base's files have it.")] = "auto",
    *,
    safe: Annotated[bool, typer.Option("--safe", help="Refuse weights that NaN or infinity gets into.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT, once the new one is whole.")] = False,
    device: Annotated[str, typer.Option(help="For a base that has to be loaded (quantized, no safetensors).")] = "cpu",
) -> None:
    """Write a plain model folder with the adapter merged in, for `from_pretrained` and nothing else.

    The weights go from file to file, three tensors in memory at a time. Killed and started again, the same command
    goes on where it was.

    Example: `peftfn merge --adapter out --output merged`

    The same: `peftfn merge out merged`
    """
    source, into = _filled({"--adapter": adapter, "--output": output}, places or ())
    from peftfn.cli import folders
    from peftfn.cli.bases import device_of

    target = folders.merge(source, into, model, dtype, device_of(device), safe=safe, overwrite=overwrite)
    typer.echo(f"merged model in {target}")


@app.command("convert")
@one_sentence
def convert(
    adapter: AdapterArgument,
    output: OutputArgument,
    subfolder: SubfolderOption = None,
    adapter_name: Annotated[str | None, typer.Option(help="Name of the adapter, if not `default`.")] = None,
) -> None:
    """Write an adapter of any PEFT version since 0.5.0, `.bin` or safetensors, in today's layout.

    Example: `peftfn convert old-adapter new-adapter`
    """
    from peftfn.cli import folders
    from peftfn.core import files

    found = folders.convert(adapter, output, subfolder, adapter_name)
    typer.echo(
        f"{found.config.peft_type} adapter with {len(found.params)} sites written to {output}: "
        f"{files.CONFIG}, {files.WEIGHTS}"
    )


@app.command("inspect")
@one_sentence
def inspect(adapter: AdapterArgument, model: ModelOption = None, subfolder: SubfolderOption = None) -> None:
    """Show what an adapter is: method, config, sites, number of parameters, shapes. The base is not needed.

    Example: `peftfn inspect out`
    """
    from peftfn.cli import folders

    typer.echo(folders.inspect(adapter, model, subfolder))


@app.command("demo")
@one_sentence
def demo(
    output: Annotated[str, typer.Option(help="Folder for the adapter and the picture.")] = "peftfn-demo",
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch decides if not given.")] = None,
) -> None:
    """Fine-tune a real model on real news within three minutes on a CPU, and prove what was left alone.

    Example: `peftfn demo`
    """
    from peftfn.cli.demo import run

    run(output, threads, typer.echo)
