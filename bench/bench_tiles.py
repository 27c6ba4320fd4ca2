"""Tiles: what it gains to decode a crop's tiles only, what it costs, and the sweep that set the defaults."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import fastload
import pictures
from conftest import Pack
from contest import Contest, Work
from fastload import decode, jpeg, record, recut, tiles
from fastload.factory import train_transform
from fastload.geometry import Box, Plan, Read, read_for
from fastload.order import SampleRandom

TILE_PIXELS, TILE_BYTES = (32, 48, 64, 96, 128), (0, 300, 400, 512, 800)
SIDE = 512


class _Crop(NamedTuple):
    """A random crop of an image: the file's own bytes, the image re-cut, and what is to be read."""

    original: record.Field
    tiled: record.Field
    read: Read

    @property
    def box(self) -> Box:
        """What is spliced: the box in pixels of the whole image."""
        return Box(*(length * self.read.reduction for length in self.read.box))


def _crops(store: Path, kept: Path, most: int, scaled: bool) -> list[_Crop]:
    """RandomResizedCrop(224)'s boxes, one for each of at most `most` images. scaled: whether DCT scaling is used."""
    dataset, originals = fastload.ImageDataset(store, train_transform(224)), fastload.Store(kept)
    crops = []
    for index in pictures.some(range(len(dataset)), most):
        field, original = (_as_views(each[index]["image"]) for each in (dataset.store, originals))
        size = tuple(dataset.store.columns["size"][index].tolist())
        (plan,) = dataset.transform.plans(size, SampleRandom(0, 0, index))
        stored = (field.height, field.width)
        read = read_for(plan, stored, field.orientation, scaled=scaled, tiled=True)
        crops.append(_Crop(original, field, read))
    return crops


def _as_views(field: record.Field) -> record.Field:
    """The field with views of its bytes, as the read path has them."""
    return field._replace(payload=memoryview(field.payload), tiles=memoryview(field.tiles))


def _whole(crop: _Crop) -> pictures.Pixels:
    """The crop out of the file's own bytes, all of them decoded."""
    box, reduction = crop.read.box, crop.read.reduction
    image = decode._decode_jpeg(crop.original.payload, (crop.original.height, crop.original.width), reduction)
    return image[box.y : box.y + box.height, box.x : box.x + box.width]


def _by_tiles(crop: _Crop) -> pictures.Pixels:
    return decode.region(crop.tiled, crop.read.box, crop.read.reduction)


def _each(work: Callable[[_Crop], object], crops: list[_Crop]) -> Work:
    def all_of_them() -> int:
        for crop in crops:
            work(crop)
        return len(crops)

    return all_of_them


def _bytes_read(crop: _Crop, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a crop takes from the store: the pieces of 8 KiB whose checksums are compared, and the tile index."""
    field = crop.tiled
    pieces: list[int] = []

    def count(piece: memoryview) -> int:
        pieces.append(len(piece))
        return record.checksum(piece)

    with monkeypatch.context() as patched:
        patched.setattr(tiles, "checksum", count)
        small = tiles.splice(field, crop.box) if field.tiles else None
    return len(field.tiles) + (sum(pieces) if small is not None else len(field.payload))


def _bytes_decoded(crop: _Crop) -> float:
    """What the decoder is given, relative to the file's own bytes."""
    small = tiles.splice(crop.tiled, crop.box) if crop.tiled.tiles else None
    return len(crop.tiled.payload if small is None else small.data) / len(crop.original.payload)


def _sizes(crops: list[_Crop]) -> float:
    """Payloads and indexes, relative to the files' own bytes."""
    stored = sum(len(crop.tiled.payload) + len(crop.tiled.tiles) for crop in crops)
    return stored / sum(len(crop.original.payload) for crop in crops)


def bench_tiles(contest: Contest, folder: Path, packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does it take to decode a random crop by its tiles, against decoding the whole file, on one thread?"""
    is_photos = "photos" in contest.name
    crops = _crops(packed(folder), packed(folder, tiles=False), most=800, scaled=False)
    tiled = [crop for crop in crops if crop.tiled.tiles]
    usual = [crop for crop in tiled if 400 <= max(crop.tiled.height, crop.tiled.width) <= 600]
    contenders = {
        "tiles": _each(_by_tiles, crops),
        "whole file": _each(_whole, crops),
        "splice": _each(lambda crop: tiles.splice(crop.tiled, crop.box), usual or tiled),
        # The same few again and again, whose bytes stay in the processor's cache: the interpreter's time alone.
        "splice, in cache": _each(lambda crop: tiles.splice(crop.tiled, crop.box), (usual or tiled)[:64] * 20),
    }
    rounds = contest.run(contenders, rounds=3 if is_photos else 9)
    contest.target("times whole file", rounds.ratios("tiles", "whole file"), at_least=1.5)
    contest.measure("times whole file, per CPU second", rounds.cpu_ratios("tiles", "whole file"))
    contest.measure("splice, us", [1e6 * cost for cost in rounds.costs("splice", "thread")])
    splices = [1e6 * cost for cost in rounds.costs("splice, in cache", "thread")]
    if usual:
        contest.target("splice of an image of about 500 pixels, in cache, us", splices, at_most=40)
    contest.target("size with index, of the files' own", [_sizes(crops)], at_most=1.05 if is_photos else 1.02)
    shares = [_bytes_read(crop, monkeypatch) / len(crop.original.payload) for crop in crops]
    contest.measure("bytes read, of the file's own", shares)
    contest.measure("bytes decoded, of the file's own", [_bytes_decoded(crop) for crop in crops])
    for crop in crops:
        assert np.array_equal(_by_tiles(crop).copy(), _whole(crop))


@pytest.mark.parametrize("kind", ["mosaic", "photo"])
def bench_region(
    kind: str,
    contest: Contest,
    request: pytest.FixtureRequest,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How fast is a region of 512 x 512 pixels of a huge JPEG, against decoding it whole?

    The mosaic is the largest file repeated to 24 megapixels; the photo that of the most pixels, as it is. What is read
    of a photo of few bytes is nearly all of its rows: they are shorter than the pieces of 8 KiB that have checksums.
    """
    folder = workspace / kind
    folder.mkdir()
    file = folder / "huge.jpg"
    if kind == "mosaic":
        given = request.config.getoption("--photos") or request.getfixturevalue("images")
        largest = max(pictures.files(given), key=lambda file: file.stat().st_size)
        pictures.mosaic(largest, 4000, 6000).save(file, quality=90, subsampling="4:2:0")
    else:
        photos = pictures.files(request.getfixturevalue("photos"))
        file.write_bytes(max(photos, key=pictures.pixel_count).read_bytes())
    path = workspace / f"{kind}.lmdb"
    fastload.pack(folder, path, exif="ignore")
    dataset = fastload.ImageDataset(path)
    field = dataset.store[0]["image"]
    data, out = file.read_bytes(), np.empty((field.height, field.width, 3), np.uint8)
    random = np.random.default_rng(0)
    corners = random.integers(0, (field.width - SIDE, field.height - SIDE), (24, 2)).tolist()
    boxes = [Box(x, y, SIDE, SIDE) for x, y in corners]
    regions: list[torch.Tensor] = []

    def by_regions() -> int:
        regions[:] = [dataset.read(0, box) for box in boxes]
        return len(boxes)

    def whole() -> int:
        jpeg.decode(data, out)
        return 1

    rounds = contest.run({"region": by_regions, "whole": whole})
    contest.target("times whole decode", rounds.ratios("region", "whole"), at_least=20)
    contest.measure("ms", [1000 * cost for cost in rounds.costs("region", "seconds")])
    reads = [read_for(Plan(box, (SIDE, SIDE)), out.shape[:2], 1, scaled=False, tiled=True) for box in boxes]
    shares = [_bytes_read(_Crop(field, field, read), monkeypatch) / len(data) for read in reads]
    contest.target("bytes read, of the file's own", shares, at_most=0.1)
    contest.measure("megapixels", [field.height * field.width / 1e6])
    contest.measure("megabytes", [len(data) / 1e6])
    for box, got in zip(boxes, regions, strict=True):
        assert np.array_equal(got.permute(1, 2, 0), out[box.y : box.ends[0], box.x : box.ends[1]])


@pytest.mark.sweep
def bench_tile_sweep(contest: Contest, folder: Path, packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """How do `recut.TILE_PIXELS` and `recut.TILE_BYTES` trade speed for size? Crops are read as a dataset does."""
    kept = packed(folder, tiles=False)
    crops = _crops(kept, kept, most=6 if "photos" in contest.name else 80, scaled=True)
    grid = itertools.product(TILE_PIXELS, TILE_BYTES)
    swept = {f"{pixels} px, {size} B": _recut(crops, pixels, size, monkeypatch) for pixels, size in grid}
    splices: dict[str, list[float]] = {name: [] for name in swept}
    splice, taken = tiles.splice, [0.0]

    def timed(field: record.Field, box: Box) -> tiles.Spliced | None:
        started = time.thread_time()
        small = splice(field, box)
        taken[0] += time.thread_time() - started
        return small

    def by_tiles(name: str) -> Work:
        work = _each(_by_tiles, swept[name])

        def and_splices() -> int:
            taken[0] = 0
            count = work()
            splices[name].append(taken[0] / count)
            return count

        return and_splices

    with monkeypatch.context() as patched:
        patched.setattr(tiles, "splice", timed)
        rounds = contest.run({**{name: by_tiles(name) for name in swept}, "whole file": _each(_whole, crops)}, rounds=5)
    for name, recut_crops in swept.items():
        contest.measure(f"{name}: times whole file, per CPU second", rounds.cpu_ratios(name, "whole file"))
        contest.measure(f"{name}: splice, us", [1e6 * seconds for seconds in splices[name][1:]])
        contest.measure(f"{name}: size with index, of the files' own", [_sizes(recut_crops)])
        shares = [_bytes_read(crop, monkeypatch) / len(crop.original.payload) for crop in recut_crops]
        contest.measure(f"{name}: bytes read, of the file's own", shares)
        for crop in recut_crops:
            assert np.array_equal(_by_tiles(crop).copy(), _whole(crop))


def _recut(crops: list[_Crop], pixels: int, size: int, monkeypatch: pytest.MonkeyPatch) -> list[_Crop]:
    """The crops of images that are re-cut into tiles of at least that width and size."""
    swept = []
    with monkeypatch.context() as patched:
        patched.setattr(recut, "TILE_PIXELS", (pixels, recut.TILE_PIXELS[1]))
        patched.setattr(recut, "TILE_BYTES", size)
        for crop in crops:
            try:
                data, index = recut.recut(bytes(crop.original.payload))
            except recut.Untouched:
                swept.append(crop)
            else:
                tiled = crop.original._replace(payload=data, tiles=index, checksum=record.checksum(data))
                swept.append(crop._replace(tiled=_as_views(tiled)))
    return swept
