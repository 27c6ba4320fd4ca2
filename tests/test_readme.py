"""The README is true: its blocks run, its commands and options exist, its paths lead somewhere."""

from __future__ import annotations

import gzip
import inspect
import io
import json
import os
import re
import shlex
import struct
import tarfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pydicom
import pytest
import torch
from PIL import Image, ImageDraw

import fastload

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(match[1], match[2]) for match in BLOCK.finditer(README)]
PROSE = BLOCK.sub("", README)
SPANS = re.findall(r"`([^`\n]+)`", PROSE)
"""What stands between backticks in running text and tables."""


def shell_lines() -> list[str]:
    """The commands of all sh blocks, without their comments."""
    lines = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def command_rows() -> dict[str, str]:
    """What the table of commands says of each."""
    return {match[1]: match[0] for match in re.finditer(r"^\| `fastload (\w+).*$", README, re.MULTILINE)}


@pytest.fixture
def fastload_command() -> Callable[[list[str]], int]:
    """What the installed `fastload` script calls."""
    (script,) = (s for s in entry_points(group="console_scripts") if s.name == "fastload")
    command: Callable[[list[str]], int] = script.load()
    return command


@pytest.fixture
def help_of(fastload_command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The help of a command, as it prints it."""

    def help_of(*command: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            fastload_command([*command, "--help"])
        assert exit_info.value.code == 0
        return capsys.readouterr().out

    return help_of


def options_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


@pytest.fixture
def where_images_are(tmp_path: Path, make_picture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with `images/`: two classes, enough of them for a whole batch of 64."""
    for i in range(70):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_picture(48, 64, seed=i)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def other_data(where_images_are: Path) -> None:
    """The rest of what the README packs: a list, MNIST's files, images with masks, labelme's files."""
    for folder in ("mnist", "scans", "outlines", "annotated"):
        (where_images_are / folder).mkdir()
    images = sorted(Path("images/a").iterdir())[:4]
    lines = [f"{image},{i}.5,{2 * i}\n" for i, image in enumerate(images)]
    Path("list.csv").write_text("file,x,y\n" + "".join(lines))
    header = struct.pack(">4I", 0x803, 600, 28, 28)
    Path("mnist/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(600 * 28 * 28)))
    Path("mnist/train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 600) + bytes(600))
    Path("classes.txt").write_text("__ignore__\n_background_\ncat\n")
    corners = [[10, 10], [50, 12], [30, 40]]
    for image in images:
        (where_images_are / "scans" / image.name).write_bytes(image.read_bytes())
        (where_images_are / "annotated" / image.name).write_bytes(image.read_bytes())
        shape = {"label": "cat", "points": corners, "shape_type": "polygon", "group_id": None}
        annotation = {"version": "5.5.0", "shapes": [shape], "imagePath": image.name, "imageData": None}
        Path("annotated", image.stem + ".json").write_text(json.dumps(annotation))
        mask = Image.new("L", (64, 48))
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners], 1)
        mask.save(Path("outlines", image.stem + ".png"))


@pytest.fixture
def dict_data(where_images_are: Path) -> None:
    """What becomes dicts: COCO's list, shards, Parquet files, DICOM, and a dataset of one's own."""
    images = sorted(Path("images").rglob("*.jpg"))[:4]
    for folder in ("shards", "hub", "ct"):
        Path(folder).mkdir()
    about = [{"id": i, "file_name": f"a/{image.name}", "height": 48, "width": 64} for i, image in enumerate(images)]
    found = [{"id": 0, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 20]}]
    lists = {"images": about, "annotations": found, "categories": [{"id": 3, "name": "cat"}]}
    Path("instances.json").write_text(json.dumps(lists))
    for number in range(2):
        with tarfile.open(f"shards/train-{number:06d}.tar", "w") as shard:
            for image in images[2 * number : 2 * number + 2]:
                for extension, content in (("jpg", image.read_bytes()), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{image.stem}.{extension}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    rows = [{"bytes": image.read_bytes(), "path": image.name} for image in images]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": rows, "label": [0, 1, 0, 1]}), "hub/train-00000-of-00001.parquet"
    )
    scan = pydicom.Dataset()
    scan.file_meta = pydicom.dataset.FileMetaDataset()
    scan.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    scan.SOPClassUID, scan.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    scan.Modality, scan.PhotometricInterpretation, scan.SamplesPerPixel = "CT", "MONOCHROME2", 1
    scan.Rows, scan.Columns, scan.BitsAllocated, scan.BitsStored, scan.HighBit = 8, 8, 16, 12, 11
    scan.PixelRepresentation, scan.PixelData = 0, bytes(128)
    scan.save_as("ct/0.dcm", enforce_file_format=True)
    Path("mydata.py").write_text("def make():\n    return [([i], str(i)) for i in range(3)]\n")


def test_the_blocks_run(
    other_data: None, dict_data: None, fastload_command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """From top to bottom in one folder: the sh blocks pack `images/` into `db.lmdb`, the Python blocks load it."""
    names: dict[str, Any] = {}
    ran = []
    for language, block in BLOCKS:
        if language == "sh":
            for line in (shlex.split(line, comments=True) for line in block.splitlines()):
                if line and line[0] == "fastload":
                    assert fastload_command(line[1:]) == 0
                    ran.append("fastload")
        elif language == "python":
            names.pop("images", None)
            exec(compile(block, "README.md", "exec"), names)
            ran.append("python")
            if "images" in names:
                count = len(names["images"])
                assert names["images"].shape == (count, 3, 224, 224)
                assert names["labels"].shape == (count,)
    assert ran[0] == "fastload"
    assert ran.count("python") >= 2
    assert len(fastload.Store("db.lmdb")) == 70
    assert names["mask"].shape == (64, 64)
    assert names["targets"].dtype == torch.int64
    assert set(names["traced"]) == {"image", "mask", "instances"}
    assert names["traced"]["mask"].unique().tolist() == [0, 1, 255]
    assert names["xy"].tolist() == [0.5, 0.0]
    assert names["sample"]["photo"].shape == (3, 32, 32)
    assert names["sample"]["boxes"].tolist() == [[0.0, 0.0, 16.0, 16.0]] * 3
    assert names["sample"]["wave"].tolist() == [0.0] * 16
    assert len(fastload.Store("shards.lmdb")) == len(fastload.Store("boxes.lmdb")) == 4
    assert fastload.Store("ct.lmdb").classes == ["CT"]
    assert names["estimate"].parameters == 407080
    assert Path("first.png").stat().st_size > 1000
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"torch.Size([64, 3, 224, 224]) torch.float32 {device}" in capsys.readouterr().out


def block_with(words: str) -> str:
    """The Python block that has these words."""
    (block,) = (block for language, block in BLOCKS if language == "python" and words in block)
    return block


@pytest.fixture
def names(where_images_are: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks on resuming take for granted; `read` lists the indices that the dataset is asked for."""
    fastload.pack("images/", "db.lmdb")
    read: list[int] = []
    begin = fastload.ImageDataset.begin

    def recorded(self: Any, indices: Any) -> Any:
        read.extend(int(index) for index in indices)
        return begin(self, indices)

    monkeypatch.setattr(fastload.ImageDataset, "begin", recorded)
    dataset = fastload.ImageDataset("db.lmdb", fastload.transforms.RandomResizedCrop(224))
    return {"dataset": dataset, "fastload": fastload, "torch": torch, "DataLoader": fastload.DataLoader, "read": read}


def test_the_block_on_resuming_goes_on_where_it_stopped(names: dict[str, Any]) -> None:
    """Two batches, then the other three, the last one small; the third is that of an epoch without a stop."""
    block = block_with("torch.save(loader.state_dict()")
    exec(
        compile(block.replace("    ...  #", "    third = images if step == 3 else third  #"), "README.md", "exec"),
        names,
    )
    assert names["step"] == 5
    assert len(names["images"]) == 70 - 4 * 16
    sampler = fastload.ShuffleSampler(names["dataset"], seed=1)
    names["dataset"].set_epoch(0)
    whole = list(fastload.DataLoader(names["dataset"], batch_size=16, sampler=sampler))
    assert torch.equal(names["third"], whole[2][0])


def test_the_block_on_ranks_reads_every_sample(names: dict[str, Any]) -> None:
    """Eight ranks and then six: all of the epoch, and the first four of it again, where 38 don't divide by six."""
    exec(compile(block_with("loader_of(rank, 8)"), "README.md", "exec"), names)
    order = fastload.ShuffleSampler(70, seed=1).share().take(0, 70).tolist()
    assert sorted(names["read"][:32]) == sorted(order[:32])
    assert sorted(names["read"]) == sorted(order + order[:4])


def test_the_table_of_arguments_has_every_argument() -> None:
    """Those of the constructor, each once, and the new ones by the defaults that the table gives."""
    table = re.search(r"^\| argument \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert table is not None
    rows = [row.split("|") for row in table[0].strip().splitlines()[2:]]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row[1])]
    assert sorted(listed) == sorted(set(inspect.signature(fastload.DataLoader.__init__).parameters) - {"self"})
    assert all(cell.strip() for row in rows for cell in row[1:-1])


def test_every_shell_line_is_known() -> None:
    """Set-up lines call scripts that are there (running them would make environments); all others are `fastload`'s."""
    lines = shell_lines()
    assert lines
    for line in lines:
        first, *rest = line.split()
        if first == "python3":
            script = ROOT / rest[0]
            assert script.is_file(), f"{rest[0]} does not exist"
            compile(script.read_text(encoding="utf-8"), str(script), "exec")
            if os.name == "posix":
                assert os.access(script, os.X_OK)
        else:
            assert first == "fastload"


def test_the_table_has_every_command(help_of: Callable[..., str]) -> None:
    """The commands in the README are those of the parser, in its order."""
    listed = re.search(r"COMMAND\n(.*)", help_of(), re.DOTALL)
    assert listed is not None
    assert list(command_rows()) == re.findall(r"^    (\w+)", listed[1].split("\n\n")[0], re.MULTILINE)


@pytest.mark.parametrize("command", command_rows())
def test_the_table_has_no_option_that_is_not_there(help_of: Callable[..., str], command: str) -> None:
    """Every option in a command's row is in that command's help, with the choices that the row gives."""
    row, text = command_rows()[command], help_of(command)
    assert options_of(row) <= options_of(text)
    for option, choices in re.findall(r"(--[a-z-]+) (\w+(?:\\\|\w+)+)", row):
        assert f"{option} {{{','.join(choices.split(chr(92) + '|'))}}}" in text
    for choice in re.findall(r"`--exif (\w+)`", row):
        assert re.search(rf"--exif {{[\w,]*{choice}", text)
    positional = re.match(r"\| `fastload \w+((?: [A-Z]+)*)`", row)
    assert positional is not None
    assert re.search(rf"usage: fastload {command}\b.*{'.*'.join(positional[1].split())}\n", text, re.DOTALL)


def test_options_in_running_text_exist(help_of: Callable[..., str]) -> None:
    """Each is an option of some command, or of the benchmarks where the README says so."""
    known = {option for command in command_rows() for option in options_of(help_of(command))}
    bench = (ROOT / "bench" / "conftest.py").read_text(encoding="utf-8")
    known |= {option for option in options_of(PROSE) if f'"{option}"' in bench}
    assert options_of(PROSE) <= known


def test_paths_exist() -> None:
    """What looks like a path of this repository, in links and between backticks, leads to something."""
    words = {word for span in SPANS for word in span.split() if re.fullmatch(r"[\w.]+(/[\w.]+)+/?", word)}
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", PROSE) if "://" not in link}
    assert {"fastload/record.py", "fastload/store.py"} <= words
    assert {path for path in words | links if not (ROOT / path).exists()} == set()


def test_modules_in_the_table_exist() -> None:
    """Each name in the table of modules is a module of the package, and none is named twice."""
    table = re.search(r"^\| module \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert table is not None
    names = [name for row in table[0].strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(names) == len(set(names)) >= 15
    assert {name for name in names if not (ROOT / "fastload" / f"{name}.py").is_file()} == set()


def test_names_of_the_package_exist() -> None:
    """Every `fastload.NAME` in text and code is public, or the path of a file."""
    names = set(re.findall(r"(?<![\w/])fastload\.(\w+)", README))
    assert "DataLoader" in names
    assert names <= set(fastload.__all__)


def test_arguments_in_running_text_are_understood(where_images_are: Path) -> None:
    """The keyword arguments that the text gives as examples are taken by what they are said to be for."""
    fastload.pack("images/", "db.lmdb")
    given = {span.split("=")[0]: span for span in SPANS if re.match(r"[a-z_]+=\S", span)}
    errors = re.search(r'on_error=("\w+"(?: \| "\w+")*)', README)
    assert errors is not None
    for on_error in re.findall(r'"(\w+)"', errors[1]):
        fastload.ImageDataset("db.lmdb", on_error=on_error)
    assert "max_failures=0.01" in given["max_failures"]
    assert 'cache="4GB"' in given["cache"] or "cache=fastload.ImageCache" in given["cache"]
    dataset = fastload.ImageDataset("db.lmdb", cache=fastload.ImageCache("4GB", "pin"), max_failures=0.01)
    fastload.DataLoader(dataset, worker_type="process")
    assert 'worker_type="process"' in README


def test_the_exit_statuses_are_those_of_the_command_line() -> None:
    """README and `cli` list the same numbers."""
    from fastload import cli

    readme = re.search(r"Exit status: (.*?)\. `--json`", README, re.DOTALL)
    module = re.search(r"Exit status: (.*?)\.\n", cli.__doc__ or "", re.DOTALL)
    assert readme is not None
    assert module is not None
    assert re.findall(r"\b\d\b", readme[1]) == re.findall(r"\b\d\b", module[1]) == ["0", "1", "2", "3"]


def test_the_record_s_layout_is_the_module_s() -> None:
    """The table of bytes adds up to the sizes that are really written."""
    from fastload import record

    table = re.search(r"^\| bytes \| what \|\n.*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert table is not None
    assert f"`{record.MAGIC.decode()}`" in table[0]
    cells = [row.split("|")[1].strip() for row in table[0].strip().splitlines()[2:]]
    numbers = [sum(map(int, re.findall(r"\d+", cell))) for cell in cells]
    head, entry = sum(numbers[:3]), numbers[3]
    for fields in (1, 2, 5):
        assert len(record.build([record.Field(record.TEXT, b"")] * fields)) == head + fields * entry
    described = re.search(r"40 per field \|(.*)\|", table[0])
    assert described is not None
    parts = re.findall(r"([^;()]+)\((\d)( each)?\)", described[1])
    assert sum(int(size) * (len(names.split(",")) if each else 1) for names, size, each in parts) == entry
