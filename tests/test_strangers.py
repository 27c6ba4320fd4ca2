"""Files of strangers, odd and hostile: each is packed and decodes, or is left out with a reason, in bounded memory.

Packing goes on in processes of its own, one for hundreds of files, whose peak of memory is the system's own word.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import strangers
from PIL import Image
from test_store import altered

import fastload
from fastload import headers, jpeg
from fastload.cli import main
from fastload.errors import DecodeError, SourceError
from fastload.prepare import _AtWork, _one_line
from fastload.unpack import unpack

SECONDS = 10
"""Of the processor, for a file."""
MEGABYTES = 1024
LIMIT = ("--max-pixels", str(strangers.MAX_PIXELS))
SECRET = "root:x:0:0:secret"

posix_only = pytest.mark.skipif(os.name != "posix", reason="links, pipes and sockets of POSIX")

PACK = """
import json, sys, time
import fastload

times = [time.process_time()]
report = fastload.pack(
    sys.argv[1], sys.argv[2], max_pixels=int(sys.argv[3]), workers=1,
    progress=lambda done, total: times.append(time.process_time()),
)
peak = 0
if sys.platform == "linux":  # getrusage would count what the process that started this one has in memory
    status = open("/proc/self/status").read()
    peak = int(status.partition("VmHWM:")[2].split()[0]) // 1024
slowest = max(later - earlier for earlier, later in zip(times[1:], times[2:]))
print(json.dumps({"samples": report.samples, "left_out": report.quarantined, "slowest": slowest, "peak": peak}))
"""


class Packed(NamedTuple):
    """A folder of strangers and what became of it."""

    folder: Path
    store: Path
    report: dict[str, Any]

    @property
    def reasons(self) -> dict[str, str]:
        return {entry["name"]: entry["reason"] for entry in fastload.Store(self.store).quarantine()}


def run(*arguments: str | os.PathLike[str], seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Python, with these arguments."""
    return subprocess.run(
        [sys.executable, *map(os.fspath, arguments)], capture_output=True, text=True, timeout=seconds, check=False
    )


def command(*arguments: str | os.PathLike[str], seconds: float = 100) -> subprocess.CompletedProcess[str]:
    """`fastload` with these arguments: it must not hang, nor end in a traceback."""
    done = run("-c", "import sys; from fastload.cli import main; sys.exit(main())", *arguments, seconds=seconds)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, 2, 3), done.stderr
    return done


def packed(folder: Path, files: Iterator[tuple[str, bytes]]) -> Packed:
    """Files in a folder, and beside it their store."""
    source, store = folder / "strangers", folder / "db.lmdb"
    source.mkdir()
    for name, data in files:
        (source / name).write_bytes(data)
    done = run("-c", PACK, source, store, str(strangers.MAX_PIXELS))
    assert done.returncode == 0, done.stderr
    return Packed(source, store, json.loads(done.stdout))


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packed]:
    """All strangers but the large ones."""
    folder = tmp_path_factory.mktemp("ordinary")
    yield packed(folder, strangers.files())
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packed]:
    """Small files of many pixels."""
    folder = tmp_path_factory.mktemp("large")
    yield packed(folder, strangers.large())
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["ordinary", "large"])
def test_time_and_memory_are_bounded(kind: str, request: pytest.FixtureRequest) -> None:
    """No file takes longer, nor all of them more memory, than is promised."""
    report = request.getfixturevalue(kind).report
    assert report["slowest"] < SECONDS
    assert report["peak"] < MEGABYTES


@pytest.mark.parametrize("kind", ["ordinary", "large"])
def test_each_is_packed_or_left_out(kind: str, request: pytest.FixtureRequest) -> None:
    """None is forgotten, and none is there twice."""
    found: Packed = request.getfixturevalue(kind)
    names = {fastload.Store(found.store).name(index) for index in range(found.report["samples"])}
    assert names | found.reasons.keys() == set(os.listdir(found.folder))
    assert len(names) + len(found.reasons) == len(os.listdir(found.folder))
    assert min(found.report["samples"], found.report["left_out"]) > 0


def test_reasons_can_be_read(ordinary: Packed) -> None:
    """A line of words, of some length, without control characters."""
    for name, reason in ordinary.reasons.items():
        assert reason.isprintable(), name
        assert 10 < len(reason) < 600, (name, reason)
        assert not reason.rstrip().endswith(":"), (name, reason)


def test_other_formats_are_called_by_their_names(ordinary: Packed) -> None:
    """Web pages, films, drawings and archives that are called images."""
    assert {name: word in ordinary.reasons[name] for name, (_, word) in strangers.OTHERS.items()} == dict.fromkeys(
        strangers.OTHERS, True
    )


@pytest.mark.filterwarnings("ignore:Tag data larger than file", "ignore:Possibly corrupt EXIF data")
def test_what_was_packed_decodes(ordinary: Packed, tmp_path: Path) -> None:
    """`verify --decode`, the dataset, `show` and `unpack` find nothing wrong with what packing let in."""
    verified = command("verify", "--decode", ordinary.store)
    assert verified.returncode == 0, verified.stdout
    dataset = fastload.ImageDataset(ordinary.store, on_error="raise")
    sizes = fastload.Store(ordinary.store).columns["size"]
    assert [(*dataset[i][0].shape[1:],) for i in range(len(dataset))] == [(*sizes[i],) for i in range(len(dataset))]
    assert command("show", ordinary.store, "-o", tmp_path / "sheet.png").returncode == 0
    assert Image.open(tmp_path / "sheet.png").width > 100
    assert unpack(ordinary.store, tmp_path / "out") == len(dataset) == len(os.listdir(tmp_path / "out"))


# ---- the limits, one by one


def test_scans_and_exif_segments_are_counted() -> None:
    """Up to the limits, and no more; what stands behind a JPEG's end does not count."""
    jpeg.check_markers(strangers.progressive_bomb(16, 16, jpeg.MAX_SCANS - 1) + b"\xff\xda" * 1000)
    with pytest.raises(DecodeError, match="more than 100 scans"):
        jpeg.check_markers(strangers.progressive_bomb(16, 16, jpeg.MAX_SCANS))
    data, exif = strangers.saved("JPEG"), strangers.segment(0xE1, b"Exif\0\0MM")
    jpeg.check_markers(strangers.with_segments(data, exif * jpeg.MAX_EXIF_SEGMENTS))
    with pytest.raises(DecodeError, match="more than 16 EXIF segments"):
        jpeg.check_markers(strangers.with_segments(data, exif * (jpeg.MAX_EXIF_SEGMENTS + 1)))


@pytest.mark.parametrize("letters", [b"#\n", b"\n", b"#" + b"c" * 50 + b"\n"])
def test_a_header_that_goes_on_is_given_up(letters: bytes) -> None:
    """Some of it is read."""
    with headers.opened(b"P6\n" + letters * 100 + b"5 4\n255\n" + bytes(60)) as image:
        assert image.size == (5, 4)
    with pytest.raises(DecodeError, match="too long a header"):
        headers.opened(b"P6\n" + letters * 1_000_000 + b"5 4\n255\n" + bytes(60))


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path: Path) -> None:
    """A hole of a terabyte takes no room on disk, and none in memory."""
    strangers.picture().save(tmp_path / "a.png")
    with open(tmp_path / "b.png", "wb") as file:
        file.write(strangers.saved("PNG"))
        try:
            file.truncate(1 << 40)
        except OSError:
            pytest.skip("no files of a terabyte here")
    report = fastload.pack(tmp_path, tmp_path / "db.lmdb", max_pixels=2000)
    assert (report.samples, report.quarantined) == (1, 1)
    reason = fastload.Store(tmp_path / "db.lmdb").quarantine()[0]["reason"]
    assert reason.startswith("the file has 1099511627776 bytes, more than 4 for each of 2000 pixels")


def test_as_many_pixels_are_under_work_as_one_image_may_have() -> None:
    """Whoever would be too much waits; one that is too large alone does not wait for ever."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    at_work, entered, leave = _AtWork(), Event(), Event()

    def work(pixels: int) -> None:
        with at_work(pixels, 100):
            entered.set()
            assert leave.wait(60)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(work, 60)
        assert entered.wait(60)
        with at_work(40, 100):
            entered.clear()
            second = pool.submit(work, 41)
            assert not entered.wait(0.2)
        leave.set()
        first.result(60)
        second.result(60)
    with at_work(1000, 100):
        pass


def test_reasons_are_made_printable_and_short() -> None:
    """Whatever Pillow quotes of a file."""
    assert _one_line("a\x1b[31m\nb\0é\udcff") == r"a\x1b[31m\nb\x00é\udcff"
    assert len(_one_line("x" * 10_000)) < 600


# ---- what is no plain file


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of text outside of the folder that is packed."""
    path = tmp_path / "passwd"
    path.write_text(f"{SECRET}\n" * 10)
    return path


def odd_entries(folder: Path, secret: Path) -> Iterator[tuple[str, str]]:
    """Entries of a folder that are no plain files, and a word of the reason."""
    links = {"passwd.jpg": secret, "nowhere.jpg": "nowhere", "itself.jpg": "itself.jpg", "zero.jpg": "/dev/zero"}
    links |= {"terminal.jpg": "/dev/tty", "pipe too.jpg": "pipe.jpg"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe.tar")
    os.mkfifo(folder / "pipe.json")
    os.mkfifo(folder / "pipe.parquet")
    os.mkfifo(folder / "train-images-idx3-ubyte")
    yield "passwd.jpg", "not an image"
    yield "nowhere.jpg", "No such file"
    yield "itself.jpg", "Too many levels"
    yield from ((name, "no regular file") for name in ("pipe.jpg", "pipe too.jpg", "zero.jpg", "pipe.tar"))


@posix_only
@pytest.mark.parametrize("folders", [True, False], ids=["folders", "flat"])
def test_links_pipes_and_devices_never_block_nor_leak(tmp_path: Path, secret: Path, folders: bool) -> None:
    """A link to an image is that image, as for torchvision; of any other file nothing is told but that it is none."""
    folder = tmp_path / "in" / "ant" if folders else tmp_path / "in"
    folder.mkdir(parents=True)
    strangers.picture().save(folder / "a.png")
    strangers.picture().save(tmp_path / "elsewhere.png")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "folder.jpg").mkdir()
    (folder / "loop").symlink_to(folder)
    expected = dict(odd_entries(folder, secret))
    done = command("pack", tmp_path / "in", tmp_path / "db.lmdb", "--json")
    assert done.returncode == 3, done.stderr
    store = fastload.Store(tmp_path / "db.lmdb")
    assert [Path(store.name(i)).name for i in range(len(store))] == ["a.png", "link.png"]
    reasons = {Path(entry["name"]).name: entry["reason"] for entry in store.quarantine()}
    assert {name: word for name, word in expected.items() if word not in reasons[name]} == {}
    told = done.stdout + done.stderr + str(reasons)
    assert SECRET not in told
    assert SECRET.encode() not in (tmp_path / "db.lmdb").read_bytes()


@posix_only
def test_sockets_and_names_of_any_bytes(tmp_path: Path) -> None:
    """Newlines, escapes, bytes that are no UTF-8, very many: names stay names, to the last byte."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = [b"a\nb.png", b"\x1b[31m.png", b"\xff\xfe.png", b"-rf.png", b" .png", b"x" * 236 + b".png", b"\x7f.png"]
    names += ["\u202egnp.png".encode(), b"a\\..\\b.png", b"$(reboot).png", b"%s%n.png", b"'\".png"]
    written = [name for name in names if _write(os.fsencode(folder) + b"/" + name, strangers.saved("PNG"))]
    listener = socket.socket(socket.AF_UNIX)
    try:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path may have some 100 bytes
        listener.bind("socket.png")
    finally:
        os.chdir(here)
        listener.close()
    assert command("pack", folder, tmp_path / "db.lmdb").returncode == 3
    store = fastload.Store(tmp_path / "db.lmdb")
    assert sorted(os.fsencode(store.name(i)) for i in range(len(store))) == sorted(written)
    assert [entry["reason"] for entry in store.quarantine()] == ["it is no regular file"]
    unpack(tmp_path / "db.lmdb", tmp_path / "out")
    assert sorted(os.listdir(os.fsencode(tmp_path / "out"))) == sorted(written)
    shown = command("info", tmp_path / "db.lmdb", "--quarantine").stdout
    assert "\x1b" not in shown


def _write(path: bytes, data: bytes) -> bool:
    """Whether the file system takes such a name (macOS's wants UTF-8)."""
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError:
        return False
    return True


@posix_only
@pytest.mark.parametrize("what", ["/dev/zero", "/dev/null", "socket"])
def test_a_source_that_is_a_device_is_refused(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be read for ever."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(SourceError, match=f"{what} is a device or a socket"):
            fastload.pack(what, "db.lmdb")
    assert os.listdir(tmp_path) == ["socket"]


# ---- names out of a stranger's files


OUTSIDE = ("../passwd.png", "{secret}", "/etc/passwd", "a/../../passwd.png", "x" * 5000, "..", "pipe.png")


@posix_only
@pytest.mark.parametrize("format", ["labelme", "coco"])
def test_annotations_name_no_file_outside(tmp_path: Path, format: str) -> None:
    """What an annotation file calls its image lies below the folder and is a plain file, or nothing is read."""
    folder = tmp_path / "in"
    folder.mkdir()
    strangers.picture().save(tmp_path / "passwd.png")
    strangers.picture().save(folder / "good.png")
    os.mkfifo(folder / "pipe.png")
    names = ["good.png", *(name.format(secret=tmp_path / "passwd.png") for name in OUTSIDE)]
    write: Callable[[Path, list[str]], Path] = _labelme if format == "labelme" else _coco
    report = fastload.pack(write(folder, names), tmp_path / "db.lmdb")
    assert (report.samples, report.quarantined) == (1, len(OUTSIDE))
    assert all(entry["reason"].isprintable() for entry in fastload.Store(tmp_path / "db.lmdb").quarantine())


def _labelme(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        content = {"imagePath": name, "imageData": None, "shapes": []}
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def _coco(folder: Path, names: list[str]) -> Path:
    images = [{"id": n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "all.json").write_text(json.dumps(content))
    return folder / "all.json"


# ---- stores


ODD: tuple[Any, ...] = (None, -1, "\x1b\n\ud800", [[[]]], {"a": 1})
COMMANDS = ("info {}", "info --quarantine {}", "verify {}", "show {} -o {}.png", "unpack {} {}.out", "pack {} {}.again")


def odd_members(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a store says of itself, each part of it in turn missing or of another kind."""
    for key in whole:
        yield {name: value for name, value in whole.items() if name != key}
        yield from (whole | {key: value} for value in ODD)


@pytest.fixture
def small_store(tmp_path: Path) -> Path:
    """Two images, and what was left out."""
    folder = tmp_path / "in" / "ant"
    folder.mkdir(parents=True)
    for number in range(2):
        strangers.picture(40 + number).save(folder / f"{number}.png")
    (folder / "words.jpg").write_text("words")
    fastload.pack(tmp_path / "in", tmp_path / "small.lmdb")
    return tmp_path / "small.lmdb"


def test_what_a_store_says_of_itself_is_not_believed(
    small_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is: no command ends but by its exit status, with a line that says why."""
    manifests = [json.dumps(whole).encode() for whole in odd_members(fastload.Store(small_store).manifest)]
    lists = [json.dumps([{"name": name, "reason": name}]).encode() for name in ODD]
    changes = [{b"manifest": value} for value in manifests] + [{b"quarantine/00000000": value} for value in lists]
    statuses = set()
    for number, change in enumerate(changes):
        path = altered(small_store, tmp_path / f"{number}.lmdb", change)
        for words in COMMANDS:
            statuses.add(status := main([word.format(path) for word in words.split()]))
            told = capsys.readouterr()
            assert "\x1b" not in told.out + told.err
            assert status in (0, 3) or told.err.count("\n") <= 3
        path.unlink()
    assert statuses == {0, 1, 2, 3}
