"""What the command line says: words, numbers for people, tables and progress.

Results go to standard output, progress and messages to standard error. Text from a store or a file name is made
`visible` before it is printed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .tiles import OUTCOMES, RECUT

Progress = Callable[[int, int], None]

_PLAIN_SECONDS = 5.0
_CLASSES_SHOWN = 50
_ENDS_SHOWN = 10


def say(message: str) -> None:
    """Tell the person something on standard error."""
    print(f"fastload: {visible(message)}", file=sys.stderr)


def visible(text: str) -> str:
    """Text from a store or a file name, safe to print: control characters and stray bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number_of(number: int, noun: str, plural: str = "s") -> str:
    """`1 sample`, `2 samples`."""
    return f"{number} {noun}" + ("" if number == 1 else plural)


def size_text(size: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def print_table(table: Table) -> None:
    """Print a table, as wide as the terminal; without one, as wide as a line of a log may be."""
    width = None if sys.stdout.isatty() else 160
    Console(markup=False, highlight=False, width=width).print(table)


@contextlib.contextmanager
def show_progress(what: str) -> Iterator[Progress]:
    """A bar with rate and time left on a terminal, a line every five seconds elsewhere; on standard error."""
    if not sys.stderr.isatty():
        yield _plain_progress(what)
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn(what),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TaskProgressColumn(text_format="", show_speed=True),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress(what: str) -> Progress:
    last = time.monotonic()
    first: tuple[float, int] | None = None

    def show(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (now, done)  # what comes before it, compiling say, tells nothing of the rate
        if now - last >= _PLAIN_SECONDS:
            last = now
            rate = (done - first[1]) / max(now - first[0], 1e-9)
            left = f", {rate:.0f}/s, {(total - done) / rate:.0f} s left" if rate else ""
            say(f"{what}: {done} of {total}{left}")

    return show


def info_tables(facts: dict[str, Any]) -> list[Table]:
    """What `info` says of a store, the sizes of its images, and its classes where `stats` has counted them."""
    changed = {k: v for k, v in facts["options"].items() if v is not None}
    rows: dict[str, Any] = {
        "store": f"{facts['path']}, format {facts['format_version']}, {size_text(facts['bytes'])}",
        "packed": f"{facts['created']} from {facts['source']}, " + ", ".join(f"{k}={v}" for k, v in changed.items()),
        "samples": str(facts["samples"]) + _stored_images(facts),
        **({"bits": f"{facts['bits']} ({facts['dtype']})"} if "bits" in facts else {}),
        "fields": ", ".join(f"{field['name']} ({field['kind']})" for field in facts["fields"]),
        "classes": f"{facts['classes']}, {facts['labelled']} samples with a label",
        "per class": _range(facts["samples_per_class"]) if facts["samples_per_class"] else "-",
        "left out": f"{facts['quarantined']}" + (" (--quarantine lists them)" if facts["quarantined"] else ""),
        **({"tiles": _outcomes(facts["tiles"])} if facts["tiles"] else {}),
        **{name: f"values up to {largest}" for name, largest in facts["masks"].items()},
        **{name: _range(spread) for name, spread in facts.get("size", {}).items()},
        "digest": facts["digest"],
        **(_figures(facts["stats"]) if "stats" in facts else {}),
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, visible(str(value)))
    tables = [table]
    if "shorter_side" in facts:
        tables.append(_histogram(facts["shorter_side"]))
    if "stats" in facts and facts["stats"]["class_counts"]:
        tables.append(_class_table(facts["stats"]["class_counts"], facts["stats"]["counted"]))
    return tables


def _stored_images(facts: dict[str, Any]) -> str:
    return f", {size_text(facts['image_bytes'])} of images in {facts['stored']}" if "image_bytes" in facts else ""


def _range(spread: Sequence[float]) -> str:
    return f"{spread[0]:g} to {spread[2]:g}, median {spread[1]:g}"


def _outcomes(counts: dict[str, int]) -> str:
    """The re-cut images, then the reasons of the others, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (item[0] != OUTCOMES[RECUT], -item[1]))
    return ", ".join(f"{count} {text}" for text, count in ordered)


def _figures(stats: dict[str, Any]) -> dict[str, str]:
    """Rows of the table; mean and std as Normalize and DevicePrefetcher take them."""
    digits = {name: [f"{value:.4f}" for value in stats[name]] for name in ("mean", "std")}
    return {
        "pixels": f"{stats['pixels']} of {number_of(stats['samples'], 'image')}",
        "normalize": ", ".join(f"{name}=({', '.join(d)}{',' * (len(d) == 1)})" for name, d in digits.items()),
        "min": str(tuple(stats["min"])),
        "max": str(tuple(stats["max"])),
    }


def _histogram(bins: Sequence[tuple[int, int, int]]) -> Table:
    table = Table("shorter side, pixels", "samples", "", box=None)
    most = max(count for _, _, count in bins)
    for low, high, count in bins:
        table.add_row(f"{low}-{high}" if high > low else str(low), str(count), "█" * round(40 * count / most))
    return table


def _class_table(counts: dict[str | int, int], counted: str) -> Table:
    """All classes, or the most frequent and the rarest where there are many."""
    table = Table("class", counted, box=None)
    rows = [(str(name), str(count)) for name, count in counts.items()]
    if len(rows) > _CLASSES_SHOWN:
        rows.sort(key=lambda row: -int(row[1]))
        between = f"({len(rows) - 2 * _ENDS_SHOWN} classes between; --json has them all)"
        rows[_ENDS_SHOWN:-_ENDS_SHOWN] = [(between, "")]
    for name, count in rows:
        table.add_row(visible(name), count)
    return table
