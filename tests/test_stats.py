"""Statistics of a store, held against NumPy on the very pixels that the dataset gives, and against whole numbers."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastload
from fastload import stats
from fastload.cli import main
from fastload.errors import StoreError, StoreFormatError
from fastload.stats import Statistics, histogram, statistics

Array = npt.NDArray[Any]


def save(path: Path, pixels: Array, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def packed(root: Path, images: Sequence[Array], **options: Any) -> Path:
    """A store of these images, PNGs of one folder."""
    for number, image in enumerate(images):
        save(root / "images" / f"{number:05}.png", image)
    fastload.pack(root / "images", root / "db.lmdb", **options)
    return root / "db.lmdb"


def mnist(root: Path, images: Array, labels: Array) -> Path:
    """A store of grey images (n, height, width), packed from MNIST's files."""
    root.mkdir(parents=True, exist_ok=True)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        (root / name).write_bytes(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes())
    fastload.pack(root, root / "db.lmdb")
    return root / "db.lmdb"


def assert_describes(found: Statistics, images: Sequence[Array]) -> None:
    """Mean and std of all pixels of (height, width, channels) images: the mean to the last bit, std within one."""
    pixels = np.concatenate([image.reshape(-1, image.shape[-1]) for image in images])
    assert found.pixels == len(pixels)
    sums, squares = (np.sum(pixels.astype(np.uint64) ** power, axis=0).tolist() for power in (1, 2))
    count = len(pixels)
    assert found.mean == tuple(float(Fraction(total, 255 * count)) for total in sums)
    for std, total, square in zip(found.std, sums, squares, strict=True):
        exact = math.sqrt(Fraction(count * square - total**2, (255 * count) ** 2))
        assert abs(std - exact) <= math.ulp(exact)
    assert found.mean == pytest.approx(np.mean(pixels / 255, axis=0), abs=1e-12)
    assert found.std == pytest.approx(np.std(pixels / 255, axis=0), abs=1e-7)
    assert (found.min, found.max) == (tuple(pixels.min(axis=0)), tuple(pixels.max(axis=0)))


def as_read(store: Path) -> list[Array]:
    dataset = fastload.ImageDataset(store)
    return [dataset.read(index).permute(1, 2, 0).numpy() for index in range(len(dataset))]


def flipped(store: Path, copy: Path, index: int, field: str = "image") -> Path:
    """A copy of a store in which a bit in the middle of a sample's field is flipped."""
    payload = bytes(fastload.Store(store)[index][field].payload)
    data = bytearray(store.read_bytes())
    assert data.count(payload) == 1
    data[data.index(payload) + len(payload) // 2] ^= 16
    copy.write_bytes(data)
    return copy


# ---- pixels


lengths = st.integers(1, 40)
ranges = st.tuples(st.integers(0, 255), st.integers(0, 255)).map(sorted)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5),
    spans=st.tuples(ranges, ranges, ranges),
    encode=st.sampled_from(["keep", "raw"]),
    seed=st.integers(0, 999),
)
def test_statistics_are_those_of_all_pixels(sizes: list[tuple[int, int]], spans: Any, encode: str, seed: int) -> None:
    """For images of any sizes and ranges of values, constant ones among them; large images weigh more."""
    rng = np.random.default_rng(seed)
    images = [np.stack([rng.integers(low, high + 1, size, np.uint8) for low, high in spans], axis=-1) for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        found = statistics(packed(Path(folder), images, encode=encode))
    assert_describes(found, images)
    assert (found.samples, found.failures) == (len(images), 0)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 60), height=lengths, width=lengths, span=ranges, seed=st.integers(0, 999))
def test_grey_images_have_one_channel(count: int, height: int, width: int, span: list[int], seed: int) -> None:
    """As MNIST's, whose known figures, 0.1307 and 0.3081, are of the same formula."""
    rng = np.random.default_rng(seed)
    images = rng.integers(span[0], span[1] + 1, (count, height, width), np.uint8)
    labels = rng.integers(0, 10, count, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        found = statistics(mnist(Path(folder) / "raw", images, labels))
    assert_describes(found, [images[..., None]])
    assert found.class_counts == {n: c for n, c in enumerate(np.bincount(labels).tolist()) if c}


def test_a_set_with_figures_that_are_known(tmp_path: Path) -> None:
    """A quarter of all pixels is white: mean 1/4, standard deviation sqrt(3)/4 of the whole, not of a sample."""
    images = np.zeros((8, 4, 4), np.uint8)
    images[:2] = 255
    found = statistics(mnist(tmp_path / "raw", images, np.arange(8, dtype=np.uint8)))
    assert (found.mean, found.std) == ((0.25,), (math.sqrt(3) / 4,))


def test_a_large_white_image_is_white(tmp_path: Path) -> None:
    """An odd number of pixels above 2**24, which float32 can't count and uint32 can't sum."""
    store = packed(tmp_path, [np.full((4097, 4099), 255, np.uint8)])
    found = statistics(store)
    assert (found.pixels, found.mean, found.std) == (4097 * 4099, (1.0,) * 3, (0.0,) * 3)
    assert (found.min, found.max) == ((255,) * 3, (255,) * 3)


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from([np.uint8, np.uint16]),
    shape=st.tuples(st.integers(1, 9), lengths, lengths, st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_histograms_count_each_channel(dtype: Any, shape: tuple[int, ...], seed: int) -> None:
    """Also in parts of a few pixels, and of arrays that are not contiguous."""
    values = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)[:, ::2]
    expected = [np.bincount(values[..., c].ravel(), minlength=256**values.itemsize) for c in range(shape[-1])]
    assert np.array_equal(histogram(values), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "_PART_PIXELS", 7)
        assert np.array_equal(histogram(values), expected)


def test_the_jpegs_that_the_dataset_shows(store_path: Path) -> None:
    """Turned by EXIF in all ways, subsampled and progressive: the pixels of `read`, without a transform."""
    assert_describes(statistics(store_path), as_read(store_path))


def test_re_cut_jpegs(tmp_path: Path) -> None:
    """Their tiles show what the whole image shows."""
    save(tmp_path / "images" / "large.jpg", picture(300, 400))
    fastload.pack(tmp_path / "images", tmp_path / "db.lmdb")
    assert fastload.Store(tmp_path / "db.lmdb")[0]["image"].tiles
    assert_describes(statistics(tmp_path / "db.lmdb"), as_read(tmp_path / "db.lmdb"))


def test_the_same_for_any_number_of_threads(store_path: Path, raw_store_path: Path) -> None:
    """Bit for bit, records and columns."""
    for path in (store_path, raw_store_path):
        found = [statistics(path, workers=workers) for workers in (1, 2, 3, 4)]
        assert found.count(found[0]) == 4


@pytest.mark.parametrize("pixels", [1, 300, 5 * 256, 1 << 20])
def test_columns_are_read_in_blocks(raw_store_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    """Of whole images, whatever fits: each is counted once, and progress ends with the last."""
    monkeypatch.setattr(stats, "_BLOCK_PIXELS", pixels)
    seen: list[tuple[int, int]] = []
    assert_describes(statistics(raw_store_path, progress=lambda *at: seen.append(at)), as_read(raw_store_path))
    block = max(1, pixels // 256)
    assert seen == [(min(done, 40), 40) for done in range(block, 40 + block, block)]


# ---- damage


def test_damaged_samples_are_left_out(tmp_path: Path, store_path: Path) -> None:
    """Of pixels and class counts alike; `failures` says how many."""
    bad = flipped(flipped(store_path, tmp_path / "one.lmdb", 5), tmp_path / "two.lmdb", 6)
    found = statistics(bad, workers=2)
    images = as_read(store_path)
    assert_describes(found, images[:5] + images[7:])
    assert (found.samples, found.failures) == (10, 2)
    assert found.class_counts == {"ant": 4, "bee": 2, "cat": 4}


def test_where_nothing_can_be_decoded(tmp_path: Path) -> None:
    """There is no mean of nothing."""
    store = packed(tmp_path, [picture(40, 40)])
    with pytest.raises(StoreError, match="none of the 1 samples"):
        statistics(flipped(store, tmp_path / "bad.lmdb", 0))


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """As by `Store`."""
    with pytest.raises(FileNotFoundError):
        statistics(tmp_path / "missing.lmdb")
    (tmp_path / "text").write_text("no store")
    with pytest.raises(StoreFormatError):
        statistics(tmp_path / "text")


# ---- classes


def listed(root: Path, text: str) -> dict[str | int, int]:
    """The class counts of four images with this list of labels."""
    for number in range(4):
        save(root / f"{number}.png", picture(20, 20, seed=number))
    (root / "list.txt").write_text(text)
    fastload.pack(root / "list.txt", root / "db.lmdb")
    return statistics(root / "db.lmdb").class_counts


def test_classes_by_name(store_path: Path, raw_store_path: Path) -> None:
    """Names that the folders had."""
    assert statistics(store_path).class_counts == {"ant": 4, "bee": 4, "cat": 4}
    assert statistics(raw_store_path).class_counts == {f"class{label}": 10 for label in range(4)}
    assert statistics(store_path).counted == "samples"


def test_several_labels_count_for_each(tmp_path: Path) -> None:
    """And a sample without one for none."""
    assert listed(tmp_path, "0.png 7 9\n1.png 9\n2.png\n3.png 9 30\n") == {7: 1, 9: 3, 30: 1}


def test_real_labels_and_none_have_no_counts(tmp_path: Path) -> None:
    """Targets of a regression are no classes."""
    assert listed(tmp_path / "real", "0.png 0.5\n1.png 1.5\n2.png 1\n3.png 1\n") == {}
    fastload.pack(tmp_path / "real", tmp_path / "flat.lmdb", format="flat")
    assert statistics(tmp_path / "flat.lmdb").class_counts == {}


def test_names_that_no_sample_has_and_labels_without_a_name() -> None:
    """The former count 0, the latter go by their number; names that are not distinct name nothing."""
    assert stats._named(["a", "b"], {1: 3, 4: 2}) == {"a": 0, "b": 3, 4: 2}
    assert stats._named(["a", "a"], {0: 3, 1: 2}) == {0: 3, 1: 2}
    assert stats._named(None, {0: 3, 1: 2}) == {0: 3, 1: 2}


def masked(root: Path, masks: Sequence[Array], **options: Any) -> Path:
    """A store of these masks, and an image for each."""
    for number, mask in enumerate(masks):
        save(root / "images" / f"{number}.png", picture(*mask.shape, seed=number))
        save(root / "masks" / f"{number}.png", mask)
    fastload.pack(root, root / "db.lmdb", **options)
    return root / "db.lmdb"


def noise(*shape: int, seed: int, values: Sequence[int]) -> Array:
    dtype = np.uint16 if max(values) > 255 else np.uint8
    return np.random.default_rng(seed).choice(np.array(values, dtype), shape)


@pytest.mark.parametrize("encode", ["keep", "raw"])
@pytest.mark.parametrize("values", [(0, 1, 4), (0, 255, 3), (2, 255, 300, 65535)])
def test_pixels_of_each_class_in_masks(tmp_path: Path, encode: str, values: tuple[int, ...]) -> None:
    """Where there are masks; what lies outside, 255, is not counted. Raw images of one shape are no exception."""
    masks = [noise(50, 140, seed=seed, values=values) for seed in range(3)]
    store = masked(tmp_path, masks, encode=encode)
    assert ("image" in fastload.Store(store).columns) == (encode == "raw")
    found = statistics(store)
    numbers, counts = np.unique(np.concatenate(masks), return_counts=True)
    expected = {n: c for n, c in zip(numbers.tolist(), counts.tolist(), strict=True) if n != 255}
    assert (found.counted, found.class_counts) == ("pixels", expected)
    assert_describes(found, [picture(50, 140, seed=seed) for seed in range(3)])


def test_masks_with_names(tmp_path: Path) -> None:
    """All names are listed, also of what no mask shows."""
    (tmp_path / "names.txt").write_text("sky\nsea\nsand\n")
    mask = np.repeat(np.array([[0, 0, 2, 255]], np.uint8), 5, axis=0)
    store = masked(tmp_path / "pairs", [mask], labels=tmp_path / "names.txt")
    assert statistics(store).class_counts == {"_background_": 10, "sky": 0, "sea": 5, "sand": 0}


@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_damaged_mask_or_image_leaves_out_both(tmp_path: Path, field: str) -> None:
    """A sample is counted whole or not at all."""
    masks = [noise(40, 50, seed=seed, values=(0, 1, 2)) for seed in range(3)]
    found = statistics(flipped(masked(tmp_path, masks), tmp_path / "bad.lmdb", 1, field))
    assert (found.samples, found.failures, found.pixels) == (2, 1, 4000)
    assert list(found.class_counts.values()) == np.bincount(np.concatenate([masks[0], masks[2]]).ravel()).tolist()
    assert_describes(found, [picture(40, 50, seed=seed) for seed in (0, 2)])


# ---- fastload info --stats


def test_the_command_prints_what_can_be_pasted(raw_store_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mean and std of four digits as arguments of Normalize; min, max and all classes follow."""
    assert main(["info", str(raw_store_path), "--stats", "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    found = statistics(raw_store_path)
    line = re.search(r"^ normalize +(.*?) *$", out, re.MULTILINE)
    assert line is not None
    normalize = eval(f"Normalize({line[1]})", {"Normalize": fastload.transforms.Normalize})
    assert normalize.mean == pytest.approx(found.mean, abs=6e-5)
    assert normalize.std == pytest.approx(found.std, abs=6e-5)
    assert re.search(rf"^ min +{re.escape(str(found.min))} *$", out, re.MULTILINE)
    assert re.search(rf"^ pixels +{40 * 256} of 40 images *$", out, re.MULTILINE)
    assert re.findall(r"^ (class\d) +(\d+) *$", out, re.MULTILINE) == [(f"class{i}", "10") for i in range(4)]
    assert err == ""


def test_one_channel_is_a_tuple_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the comma that Python wants."""
    store = mnist(tmp_path / "raw", np.full((3, 4, 4), 51, np.uint8), np.zeros(3, np.uint8))
    assert main(["info", str(store), "--stats"]) == 0
    assert "mean=(0.2000,), std=(0.0000,)" in capsys.readouterr().out


def test_json_is_exact(store_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All figures of `Statistics` under `stats`, beside what `info` says without it."""
    assert main(["info", str(store_path), "--stats", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["info", str(store_path), "--json"]) == 0
    assert facts.pop("stats") == json.loads(json.dumps(asdict(statistics(store_path))))
    assert facts == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("count", "told"), [(1, "1 sample that can't"), (2, "2 samples that can't")])
def test_damage_is_told(
    store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, told: str
) -> None:
    """On standard error, in one line that names the command to go on with."""
    bad = tmp_path / "bad.lmdb"
    shutil.copy(store_path, bad)
    for index in range(count):
        flipped(bad, tmp_path / "next.lmdb", index).replace(bad)
    assert main(["info", str(bad), "--stats", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["stats"]["failures"] == count
    assert told in err
    assert f"fastload verify --decode {bad}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("classes", "shown"), [(50, 50), (51, 20)])
def test_of_many_classes_the_ends_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: int, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ten most frequent, the ten rarest, and how many lie between; up to fifty are all shown."""
    store = packed(tmp_path, [np.zeros((4, 4, 3), np.uint8)])
    found = replace(statistics(store), class_counts={f"c{number}\x1b": 1000 + number for number in range(classes)})
    monkeypatch.setattr(stats, "statistics", lambda *_, **__: found)
    assert main(["info", str(store), "--stats"]) == 0
    out = capsys.readouterr().out
    rows = [int(number) for number in re.findall(r"^ c\d+\\x1b +(\d+) *$", out, re.MULTILINE)]
    assert len(rows) == shown
    assert ("(31 classes between; --json has them all)" in out) == (classes == 51)
    if classes == 51:
        assert rows == [*range(1050, 1040, -1), *range(1009, 999, -1)]


def test_quarantine_and_statistics_are_two_questions(store_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked together they are refused, rather than one of them not answered."""
    with pytest.raises(SystemExit, match="2"):
        main(["info", str(store_path), "--stats", "--quarantine"])
    assert "not allowed with" in capsys.readouterr().err
