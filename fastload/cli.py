"""The command line: arguments in, words and exit codes out. All work is done elsewhere.

A command is two functions: `_add_pack` says what its arguments are, and `_pack` what becomes of them.

Exit status: 0 done; 1 failed, or `verify` found damage; 2 wrong usage or input; 3 packed, but some files were left out.
Results go to standard output, progress and messages to standard error, so that `--json` can be piped.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, get_args

from rich.table import Table

from .arguments import (
    FACTORY,
    add_json,
    add_loading,
    add_max_pixels,
    add_transform,
    chosen_dataset,
    chosen_transform,
    importing_from_here,
    made_by,
    parse_colour,
    parse_indices,
    parse_kind,
    parse_names,
    parse_shape,
    parse_window,
)
from .errors import FastloadError, SourceError, StoreFormatError, writing
from .options import Encode, Exif
from .pack import pack, pack_splits
from .printing import info_tables, number_of, print_table, say, show_progress, size_text, visible
from .sources import Format
from .store import Store

_WRONG_INPUT = (SourceError, StoreFormatError, FileNotFoundError, FileExistsError, NotADirectoryError, ValueError)
_NO_OPTIONS = frozenset(("source", "destination", "kind", "split", "seed", "stratify", "json", "run"))  # of `pack`


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastload` with these arguments (the process's own by default) and return the exit status."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # file names may hold what a terminal can't show
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("interrupted; a pack goes on where it stopped when it is run again")
        return 1
    except BrokenPipeError:  # whoever read the output has gone; what is still buffered must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _WRONG_INPUT as error:
        say(str(error))
        return 2
    except (FastloadError, OSError, ImportError, RuntimeError) as error:
        text = str(error).strip() or type(error).__name__
        say(text.splitlines()[-1] if "Original Traceback" in text else text)  # without a worker's traceback
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastload", description="Pack images once, load them fast ever after.")
    parser.add_argument("--version", action="version", version=f"fastload {version('fastload')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_pack(commands.add_parser("pack", help="pack images and labels into a store"))
    _add_info(commands.add_parser("info", help="what is in a store"))
    _add_verify(commands.add_parser("verify", help="check every checksum of a store"))
    _add_show(commands.add_parser("show", help="draw samples of a store"))
    _add_unpack(commands.add_parser("unpack", help="give the files of a store back"))
    _add_bench(commands.add_parser("bench", help="measure what a loader gives a consumer"))
    _add_tune(commands.add_parser("tune", help="measure how many workers are of use"))
    _add_doctor(commands.add_parser("doctor", help="what this machine has, and what to do about what is missing"))
    _add_memory(commands.add_parser("memory", help="how much memory a training step takes"))
    return parser


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Pack images and what goes with them into one file: class folders, a folder without labels, a list of names "
        "and labels (text, CSV, TSV, JSON Lines), pairs of image and mask, labelme's files, MNIST, CIFAR, a store, or "
        "any dataset that a function of yours makes."
    )
    parser.add_argument("source", metavar="SRC", help="a folder, a list, a store, or module:function for a dataset")
    parser.add_argument("destination", metavar="DST", help="the store to write, db.lmdb say")
    parser.add_argument("--format", choices=get_args(Format), default="auto", help="insist on a kind of source")
    parser.add_argument("--masks", metavar="FOLDER", help="a mask for each image, of the same name")
    parser.add_argument("--labels", metavar="FILE", help="names of the values of masks, a line each")
    parser.add_argument("--root", help="where the names of a list start (default: the list's folder)")
    parser.add_argument("--image-column", metavar="NAME", help="of a list with a header: the files")
    parser.add_argument(
        "--label-columns", type=parse_names, metavar="NAME,NAME", help="of a list with a header: the labels"
    )
    parser.add_argument("--label-from", metavar="TAG", help="of DICOM: the labels, Modality say, or 0008,0060")
    parser.add_argument("--header", type=parse_names, default=(), metavar="NAME,NAME", help="of DICOM: values to keep")
    parser.add_argument(
        "--window", type=parse_window, metavar="auto|C,W", help="of DICOM: center and width, for 8 bits"
    )
    parser.add_argument("--rescale", action="store_true", help="of DICOM: Hounsfield units and the like")
    parser.add_argument(
        "--kind",
        action="append",
        type=parse_kind,
        metavar="FIELD=KIND",
        help="what a field of a dataset or a shard is: 1=mask say",
    )
    parser.add_argument(
        "--split",
        metavar="PARTS",
        help="train=0.8,val=0.2: a store for each; of MNIST, CIFAR, Parquet also train, or test",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split (default: %(default)s)")
    parser.add_argument("--no-stratify", dest="stratify", action="store_false", help="split all classes as one")
    parser.add_argument("--short-side", type=int, metavar="N", help="shrink images whose shorter side is larger")
    parser.add_argument("--max-side", type=int, metavar="N", help="shrink images whose longer side is larger")
    parser.add_argument("--quality", type=int, metavar="Q", help="re-encode as JPEG of this quality, 1 to 100")
    parser.add_argument(
        "--encode", choices=get_args(Encode), default="keep", help="what to store (default: %(default)s)"
    )
    parser.add_argument(
        "--exif", choices=get_args(Exif), default="apply", help="EXIF orientation (default: %(default)s)"
    )
    add_max_pixels(parser)
    parser.add_argument("--no-tiles", dest="tiles", action="store_false", help="keep JPEGs' own bytes")
    parser.add_argument("--strip", action="store_true", help="drop EXIF, ICC profiles and comments of re-cut JPEGs")
    parser.add_argument(
        "--background", type=parse_colour, metavar="R,G,B", help="lay transparent images on a colour, 255,255,255 say"
    )
    parser.add_argument("--depth", type=int, choices=(8, 16), help="bits of a value (default: the first image's)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads (default: all usable cores); of a dataset, processes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing store")
    add_json(parser)
    parser.set_defaults(run=_pack)


def _pack(arguments: argparse.Namespace) -> int:
    with importing_from_here():
        return _packed(arguments)


def _packed(arguments: argparse.Namespace) -> int:
    options = {name: value for name, value in vars(arguments).items() if name not in _NO_OPTIONS}
    source = arguments.source
    if FACTORY.fullmatch(source) and not os.path.exists(source):
        source = made_by(source)
        if not hasattr(source, "__getitem__") and not hasattr(source, "__iter__"):
            raise ValueError(f"{arguments.source} gives {source!r}; name a function that returns a dataset, or a class")
    options["kinds"] = dict(arguments.kind or ())
    with show_progress("packing") as progress:
        if arguments.split is not None and "=" in arguments.split:
            dividing = {"seed": arguments.seed, "stratify": arguments.stratify}
            reports = pack_splits(
                source, arguments.destination, arguments.split, progress=progress, **dividing, **options
            )
        else:
            options["part"] = arguments.split
            reports = {"": pack(source, arguments.destination, progress=progress, **options)}
    for note in dict.fromkeys(note for report in reports.values() for note in report.notes):
        say(note)
    figures = {part: {k: v for k, v in asdict(report).items() if k != "notes"} for part, report in reports.items()}
    if arguments.json:
        print(json.dumps(figures.get("", figures)))
    stem, suffix = os.path.splitext(arguments.destination)
    left_out, what = 0, "file" if isinstance(source, str) else "sample"
    for part, report in reports.items():
        store = f"{stem}-{part}{suffix}" if part else arguments.destination
        if not arguments.json:
            rate = f" ({report.samples / report.seconds:.0f} samples/s)" if report.seconds else ", from before"
            print(
                f"{store}: {number_of(report.samples, 'sample')}, {number_of(report.classes, 'class', 'es')}, "
                f"{size_text(report.bytes)}, {report.seconds:.1f} s{rate}"
            )
        if report.quarantined:
            left_out += report.quarantined
            where = shlex.quote(store)
            say(f"left out: {number_of(report.quarantined, what)}; `fastload info --quarantine {where}` says why")
    return 3 if left_out else 0


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="DB")
    also = parser.add_mutually_exclusive_group()
    also.add_argument("--quarantine", action="store_true", help="list what was left out while packing, and why")
    also.add_argument("--stats", action="store_true", help="also read all images: mean and std, samples of each class")
    parser.add_argument("--workers", type=int, metavar="N", help="threads for --stats (default: all usable cores)")
    add_max_pixels(parser)
    add_json(parser)
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from .info import info

    if arguments.quarantine:
        left_out = Store(arguments.store).quarantine()
        if arguments.json:
            print(json.dumps(left_out))
        for entry in () if arguments.json else left_out:
            print(f"{visible(entry['name'])}\t{visible(entry['reason'])}")
        return 0
    facts = info(arguments.store)
    if arguments.stats:
        facts["stats"] = _statistics(arguments)
    if arguments.json:
        print(json.dumps(facts))
    else:
        for table in info_tables(facts):
            print_table(table)
    return 0


def _statistics(arguments: argparse.Namespace) -> dict[str, Any]:
    from .stats import statistics

    with show_progress("reading") as progress:
        options = {"workers": arguments.workers, "max_pixels": arguments.max_pixels}
        found = statistics(arguments.store, **options, progress=progress)
    if found.failures:
        where = shlex.quote(arguments.store)
        names = f"`fastload verify --decode {where}` names {'it' if found.failures == 1 else 'them'}"
        say(f"left out: {number_of(found.failures, 'sample')} that can't be decoded; {names}")
    return asdict(found)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="DB")
    parser.add_argument("--decode", action="store_true", help="also decode every image")
    add_max_pixels(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: all usable cores)")
    add_json(parser)
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from .verify import verify

    with show_progress("verifying") as progress:
        report = verify(
            arguments.store,
            decode_images=arguments.decode,
            workers=arguments.workers,
            max_pixels=arguments.max_pixels,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(asdict(report)))
    else:
        for damage in report.damaged:
            place = "column" if damage.index is None else f"sample {damage.index}"
            print(f"{place} {visible(damage.name)}: {visible(damage.reason)}")
        print(f"{arguments.store}: {number_of(report.samples, 'sample')} checked, {len(report.damaged)} damaged")
    return 1 if report.damaged else 0


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw samples on a contact sheet, with labels, and masks over them."
    parser.add_argument("store", metavar="DB")
    parser.add_argument("-o", "--output", required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--index", type=parse_indices, metavar="I[,J-K]", help="these samples, 0,5,10-19 say")
    parser.add_argument("--class", dest="of_class", metavar="NAME", help="samples of a class, by its name or number")
    parser.add_argument("--failures", action="store_true", help="samples that can't be decoded")
    parser.add_argument("--count", type=int, default=32, metavar="N", help="at most so many (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=8, metavar="N", help="default: %(default)s")
    add_max_pixels(parser)
    add_transform(parser, "none")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> int:
    from .dataset import ImageDataset
    from .info import find, spread

    folder = os.path.dirname(os.path.abspath(arguments.output))
    if not os.path.isdir(folder):
        raise ValueError(f"the folder {folder} does not exist; make it first")
    if os.path.splitext(arguments.output)[1].lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"{arguments.output} is no name of a picture; end it in .png")
    limit = {"max_pixels": arguments.max_pixels}
    found = find(arguments.store, arguments.index, of_class=arguments.of_class, damaged=arguments.failures, **limit)
    if arguments.count < 1:
        raise ValueError(f"count is {arguments.count}; a sheet shows at least 1 sample")
    chosen = spread(found, arguments.count)
    if not chosen:
        raise ValueError(f"{arguments.store} has no such samples; nothing is drawn")
    dataset = ImageDataset(arguments.store, chosen_transform(arguments), **limit)
    sheet = dataset.show(chosen, columns=arguments.columns)
    with writing(arguments.output):
        sheet.save(arguments.output)
    print(f"{arguments.output}: {len(chosen)} of {number_of(len(found), 'sample')}")
    return 0


def _add_unpack(parser: argparse.ArgumentParser) -> None:
    from .unpack import Target

    parser.description = "Write a store's samples as files, or as the tar shards that WebDataset reads."
    parser.add_argument("store", metavar="DB")
    parser.add_argument("target", metavar="OUT", help="a new or empty folder, or a new file, out.tar say")
    parser.add_argument(
        "--format", choices=get_args(Target), default="folder", help="what OUT is (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-size", type=int, metavar="N", help="samples in each of out-000000.tar, ... (default: all in one)"
    )
    add_max_pixels(parser)
    parser.set_defaults(run=_unpack)


def _unpack(arguments: argparse.Namespace) -> int:
    from .unpack import CLASSES, LABELS, shard_names, unpack

    target, size = arguments.target, arguments.shard_size
    with show_progress("unpacking") as progress:
        options = {"format": arguments.format, "shard_size": size, "max_pixels": arguments.max_pixels}
        count = unpack(arguments.store, target, **options, progress=progress)
    if size is not None:
        shards = shard_names(target, max(1, -(-count // size)))
        target = shards[0] if len(shards) == 1 else f"{shards[0]} to {os.path.basename(shards[-1])}"
    print(f"{target}: {number_of(count, 'sample')}")
    for name, again in ((LABELS, "{}"), (CLASSES, "{folder} --labels {}")):
        path = os.path.join(target, name)
        if os.path.exists(path):
            source = again.format(shlex.quote(path), folder=shlex.quote(target))
            say(f"`fastload pack {source} DST` packs it again")
    return 0


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from .bench import Consumer

    add_loading(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: measured)")
    parser.add_argument("--consumer", choices=get_args(Consumer), help="default: none, or simulated with --step-ms")
    parser.add_argument("--step-ms", type=float, metavar="MS", help="a simulated accelerator's time for a batch")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="default: %(default)s")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is some)")
    parser.add_argument("--plot", metavar="PNG", help="draw rate and waiting over time")
    add_json(parser)
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import bench
    from .monitor import plot
    from .tune import default_workers

    if arguments.plot and not os.path.isdir(os.path.dirname(os.path.abspath(arguments.plot))):
        raise ValueError(f"the folder of {arguments.plot} does not exist; make it first")
    dataset = chosen_dataset(arguments)
    workers = arguments.workers if arguments.workers is not None else default_workers(dataset)
    result = bench(
        dataset,
        batch_size=arguments.batch_size,
        num_workers=workers,
        consumer=arguments.consumer or ("none" if arguments.step_ms is None else "simulated"),
        step_ms=arguments.step_ms,
        seconds=arguments.seconds,
        device=arguments.device,
    )
    if arguments.plot:
        plot(result.report, arguments.plot)
    figures = {"workers": workers, "batch_size": arguments.batch_size, **result.as_dict()}
    if arguments.json:
        print(json.dumps(figures))
        return 0
    table = Table(show_header=False, box=None)
    for name, value in figures.items():
        shown = "-" if value is None else f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
        table.add_row(name.replace("_", " "), shown)
    print_table(table)
    if arguments.plot:
        print(arguments.plot)
    return 0


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add_loading(parser)
    parser.add_argument("--pace", type=float, metavar="RATE", help="samples per second that your model takes")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="per row (default: %(default)s)")
    add_json(parser)
    parser.set_defaults(run=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    from .tune import measure, recommend

    rates = measure(chosen_dataset(arguments), arguments.batch_size, seconds=arguments.seconds)
    chosen = recommend(rates, arguments.pace)
    if arguments.json:
        print(json.dumps({"rates": [rate._asdict() for rate in rates], "num_workers": chosen}))
        return 0
    table = Table("threads", "samples/s", "CPU %", "", box=None)
    for rate in rates:
        marker = "← num_workers" if rate.workers == chosen else ""
        table.add_row(str(rate.workers), f"{rate.samples_per_second:,.0f}", f"{rate.cpu_percent:.0f}", marker)
    print_table(table)
    return 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import diagnose

    findings = diagnose()
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        table = Table("", "", "", "what to do", box=None)
        for finding in findings:
            table.add_row(finding.name, finding.value, "" if finding.status == "ok" else finding.status, finding.advice)
        print_table(table)
    return 1 if any(finding.status == "missing" for finding in findings) else 0


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.description = "How much memory a training step of a model takes, without taking it."
    parser.add_argument("model", metavar="MODEL", help="MODULE:FACTORY, which is called without arguments")
    parser.add_argument(
        "--input", type=parse_shape, required=True, metavar="SHAPE", help="of one sample, 3x224x224 say"
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64], metavar="N", help="default: 64")
    parser.add_argument("--optimizer", default="sgd", metavar="NAME", help="momentum, adam, ... or none (default: sgd)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16, ... (default: the model's own)")
    parser.add_argument("--plot", metavar="PNG", help="draw a stacked bar for each batch size")
    add_json(parser)
    parser.set_defaults(run=_memory)


def _memory(arguments: argparse.Namespace) -> int:
    from torch import nn

    from .memory import KINDS, check_plot, estimate_memory, plot

    if arguments.plot:
        check_plot(arguments.plot)
    with importing_from_here():
        model = made_by(arguments.model)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{arguments.model} gives {model!r}; name a function that returns a torch.nn.Module, or a class of them"
        )
    optimizer = None if arguments.optimizer == "none" else arguments.optimizer
    estimates = [
        estimate_memory(model, arguments.input, size, optimizer, arguments.dtype) for size in arguments.batch_size
    ]
    if arguments.plot:
        plot(estimates, arguments.plot)
    if arguments.json:
        print(json.dumps([estimate.as_dict() for estimate in estimates]))
        return 0
    table = Table(f"{estimates[0].parameter_count:,} parameters", box=None)
    for estimate in estimates:
        table.add_column(f"batch of {estimate.batch_size:,}, bytes", justify="right")
    for kind in (*KINDS, "peak"):
        sizes = [getattr(estimate, kind) for estimate in estimates]
        table.add_row(kind.replace("_", " "), *(f"{size:,} ({size_text(size)})" for size in sizes))
    print_table(table)
    if arguments.plot:
        print(arguments.plot)
    return 0
