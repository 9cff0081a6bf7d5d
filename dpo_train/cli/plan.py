"""`dpo plan`: memory, time and cost of a run before anything is started."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_train import launch
from dpo_train.cli.quiet import quiet
from dpo_train.config import RunConfig, load_config
from dpo_train.errors import ConfigError, DpoError

if TYPE_CHECKING:
    from dpo_train.planning.gpus import Device
    from dpo_train.planning.plan import Plan
    from dpo_train.planning.workload import Given

HELP = "what a run would take: memory per GPU, time and cost, from the model's config alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument("--gpu", metavar="NAME", help="type of the GPUs, such as H100, A100-80, L4; or cpu")
    parser.add_argument("--gpu-memory", type=_positive, metavar="GB", help="memory of one GPU instead of the maker's")
    parser.add_argument("--gpu-tflops", type=_positive, metavar="N", help="dense bf16 TFLOP/s instead of the maker's")
    parser.add_argument("--price", type=_positive, metavar="N", help="price of a GPU hour, in any currency")
    parser.add_argument("--mfu", type=_share, metavar="N", help="share of the peak speed reached (assumed: 0.4)")
    parser.add_argument("--pairs", type=_count, metavar="N", help="pairs of the data set, all splits together")
    parser.add_argument("--prompt-tokens", type=_count, metavar="N", help="mean tokens of a prompt")
    parser.add_argument("--answer-tokens", type=_count, metavar="N", help="mean tokens of one answer")
    parser.add_argument("--shape", metavar="NAME", help="a well-known shape instead of model.path, such as llama-8b")
    parser.add_argument("--check", action="store_true", help="exit with 2 if it does not fit")
    parser.add_argument("--json", action="store_true", help="the same numbers for machines")


def plan(arguments: argparse.Namespace) -> int:
    """Prints the plan; nothing is created."""
    found = _plan(arguments)
    if arguments.json:
        from dpo_train.planning.plan import to_json

        print(json.dumps(to_json(found), indent=2))
    else:
        show(found, Console(highlight=False))
    return 2 if arguments.check and found.fits is False else 0


def check_fit(config: RunConfig) -> str:
    """One line on whether the run fits the GPUs that ``cluster.workers.gpu_type`` asks for, or why that is not known.

    Raises:
        ConfigError: it does not.
    """
    from dpo_train.planning.gpus import device_of_label
    from dpo_train.planning.workload import Given

    label = config.cluster.workers.gpu_type
    device = None if label is None else device_of_label(label)
    if device is None:
        return f"memory is not planned: cluster.workers.gpu_type={label} names no GPU that is known here"
    try:
        found = _made(config, device, Given(pairs=None, prompt_tokens=None, answer_tokens=None))
    except DpoError as error:
        return f"memory is not planned: {error}"
    if found.fits is False:
        changes = [" ".join(advice.changes) for advice in found.advice]
        raise ConfigError(
            f"The run does not fit on {device.name}",
            got=f"{found.fullest.stage} takes {_gb(found.fullest.total)} GB of a GPU",
            fix=f"any of: {'; '.join(changes)}" if changes else "a larger GPU and more workers; see `dpo plan`",
        )
    return f"fits on {device.name}: {found.fullest.stage} takes {_gb(found.fullest.total)} GB of a GPU"


def _plan(arguments: argparse.Namespace) -> Plan:
    from dpo_train.planning.gpus import CPU, find_device
    from dpo_train.planning.workload import Given

    config = load_config(arguments.config, arguments.overrides)
    on_cpu = arguments.gpu is None and config.compute.device == CPU
    # An unknown name is told before torch is imported.
    device = find_device(CPU if on_cpu else arguments.gpu, memory_gb=arguments.gpu_memory, tflops=arguments.gpu_tflops)
    if config.compute.device == CPU and device.is_gpu:
        raise ConfigError("--gpu names a GPU, and compute.device is cpu", fix="set compute.device=cuda, or --gpu cpu")
    given = Given(pairs=arguments.pairs, prompt_tokens=arguments.prompt_tokens, answer_tokens=arguments.answer_tokens)
    return _made(config, device, given, shape_name=arguments.shape, mfu=arguments.mfu, price=arguments.price)


def _made(
    config: RunConfig,
    device: Device,
    given: Given,
    *,
    shape_name: str | None = None,
    mfu: float | None = None,
    price: float | None = None,
) -> Plan:
    launch.use_storage(config)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        from dpo_train.model.outline import read_config
        from dpo_train.planning.memory import Outline
        from dpo_train.planning.plan import make_plan
        from dpo_train.planning.shapes import shape
        from dpo_train.planning.work import DEFAULT_MFU
        from dpo_train.planning.workload import workload_of

        trust = config.model.trust_remote_code
        model = shape(shape_name) if shape_name else read_config(config.model.path, trust_remote_code=trust)
        outline = Outline(config=model, trust=trust)
        return make_plan(config, outline, device, workload_of(config, given), mfu=mfu or DEFAULT_MFU, price=price)


def show(found: Plan, console: Console) -> None:
    """Memory by part, one line of verdict, then time and cost by stage."""
    from dpo_train.planning.work import DECODE_BANDWIDTH

    data, trained = found.workload, found.trained / found.weights
    console.print(
        f"{found.weights:,} weights, {found.trained:,} trained ({trained:.2%}); {data.train_pairs:,} training pairs of "
        f"{data.prompt_tokens:.0f} + 2 x {data.answer_tokens:.0f} tokens ({escape(data.origin)})"
    )
    console.print(_memory_table(found))
    console.print(_verdict(found))
    for advice in found.advice:
        console.print(f"  {escape(' '.join(advice.changes))}  [dim]{_gb(advice.bytes)} GB[/]", soft_wrap=True)
    console.print()
    console.print(_time_table(found))
    for note in (*found.notes, *_assumptions(found, DECODE_BANDWIDTH)):
        console.print(f"[dim]note: {escape(note)}[/]", soft_wrap=True)


def _memory_table(found: Plan) -> Table:
    from dpo_train.planning.memory import PARTS

    unit = "GPU" if found.device.is_gpu else "process"
    table = Table(title=f"memory per {unit}, GB", title_justify="left")
    table.add_column("part")
    for stage in found.memory:
        table.add_column(stage.stage, justify="right")
    for part, text in PARTS.items():
        if any(part in stage.parts for stage in found.memory):
            table.add_row(text, *(_gb(stage.parts[part]) if part in stage.parts else "" for stage in found.memory))
    table.add_section()
    table.add_row("[bold]total[/]", *(f"[bold]{_gb(stage.total)}[/]" for stage in found.memory))
    table.add_row("[dim]highest at[/]", *(f"[dim]{stage.when}[/]" for stage in found.memory))
    table.add_row("[dim]tokens of a row[/]", *(f"[dim]{stage.tokens:,}[/]" for stage in found.memory))
    return table


def _verdict(found: Plan) -> str:
    device, fullest = found.device, found.fullest
    if device.memory_bytes is None:
        return f"{fullest.stage} takes most: {_gb(fullest.total)} GB; give --gpu-memory to see whether that fits."
    share = fullest.total / device.memory_bytes
    numbers = f"{fullest.stage} takes {_gb(fullest.total)} of {_gb(device.memory_bytes)} GB ({share:.0%})"
    if found.fits:
        return f"[bold green]Fits[/] on {device.name}: {numbers}."
    then = "Any of these would:" if found.advice else "No single change would; take a larger GPU and more workers."
    return f"[bold red]Does not fit[/] on {device.name}: {numbers}. {then}"


def _time_table(found: Plan) -> Table:
    table = Table(title="time and cost (estimates)", title_justify="left")
    for column in ("stage", "what", "GPUs" if found.device.is_gpu else "workers", "PFLOP", "time", "GPU hours", "cost"):
        table.add_column(column, justify="left" if column in {"stage", "what"} else "right")
    for stage in found.work:
        cost, hours = found.cost(stage), stage.gpu_hours
        table.add_row(
            stage.stage, stage.what, str(stage.num_gpus), _peta(stage.flops), _time(stage.seconds),
            "?" if hours is None else f"{hours:,.2f}", "" if cost is None else f"{cost:,.2f}",
        )  # fmt: skip
    all_seconds = [stage.seconds for stage in found.work if stage.seconds is not None]
    all_hours = [hours for stage in found.work if (hours := stage.gpu_hours) is not None]
    all_costs = [cost for stage in found.work if (cost := found.cost(stage)) is not None]
    total = _time(sum(all_seconds)) if all_seconds else "?"
    costs = f"{sum(all_costs):,.2f}" if all_costs else ""
    table.add_section()
    table.add_row("[bold]all[/]", "", "", "", total, f"{sum(all_hours):,.2f}" if all_hours else "?", costs)
    return table


def _assumptions(found: Plan, bandwidth: float) -> list[str]:
    if found.device.tflops is None:
        return ["the speed of this machine is not known: give --gpu-tflops (and --mfu) for times"]
    rate = found.pairs_per_second
    speed = "" if rate is None else f"the training does {rate:,.1f} pairs/s over all GPUs; "
    return [
        f"{speed}times assume {found.mfu:.0%} of {found.device.tflops:g} TFLOP/s, and answers sampled at "
        f"{bandwidth:.0%} of the memory's bandwidth. They are estimates until measured on the GPU itself; loading, "
        "compiling, checkpoints and a champion in the evaluation come on top"
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def _peta(flops: float) -> str:
    return f"{flops / 1e15:,.0f}" if flops >= 1e17 else f"{flops / 1e15:.3g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _share(text: str) -> float:
    if (value := _positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of at most 1")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
