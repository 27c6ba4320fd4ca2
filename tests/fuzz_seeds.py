"""Small files of every kind that fastload reads, made by what writes such files: where `fuzz_targets` begin."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import numpy as np
from conftest import picture
from PIL import Image

import fastload
from fastload import arrays, blocks, record
from fastload.fields import Spec
from fastload.image_fields import raw_field, shallow
from fastload.options import Options

SMALL = 3
"""Images in files of many."""


def _saved(format: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(30, 40)).convert(mode).save(file, format, **options)
    return file.getvalue()


def records() -> Iterator[bytes]:
    """Records of all codecs."""
    random = np.random.default_rng(0)
    jpeg = io.BytesIO()
    Image.fromarray(picture(120, 160)).save(jpeg, "JPEG", quality=40)
    tiled = shallow(jpeg.getvalue(), Spec("image", "image", "file"), Options()).field
    deep = random.integers(0, 1 << 16, (40, 150, 3), np.uint16)
    name = record.Field(record.TEXT, b"a/b.jpg")
    yield record.build([tiled, name])
    yield record.build([record.Field(record.ENCODED, _saved("PNG"), 6, 3, 0, 40, 30), name])
    yield record.build([raw_field(picture(5, 4)), blocks.field_of(np.eye(140, dtype=np.uint8)), name])
    yield record.build([blocks.field_of(deep[..., 0].astype(np.int16)), blocks.field_of(deep[:9, :9])])
    values = [np.arange(200.0), np.zeros((3, 0, 2), "<U4"), random.random(50) < 0.1]
    yield record.build([arrays.field_of(value) for value in values] + [record.Field(record.TEXT, b'{"x": [1, "y"]}')])


def stores() -> Iterator[bytes]:
    """Stores of images and labels, of raw images, and of fields of many kinds."""
    samples = [
        {
            "image": picture(8, 9, seed),
            "boxes": np.zeros((seed, 4), np.float32),
            "text": "x",
            "more": [seed, {"score": 0.5, "vector": np.zeros(3)}],
            "mask": Image.new("P", (9, 8)),
        }
        for seed in range(2)
    ]
    pairs = [(picture(8, 8, seed), seed) for seed in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        for dataset, options in ((samples, {"kinds": {"boxes": "boxes"}}), (pairs, {"encode": "raw"})):
            path = Path(folder, "db.lmdb")
            fastload.pack(dataset, path, overwrite=True, **options)
            yield path.read_bytes()


def manifests() -> Iterator[bytes]:
    """Manifests of such stores."""
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(stores()):
            path = Path(folder, f"{number}.lmdb")
            path.write_bytes(data)
            yield json.dumps(fastload.Store(path).manifest).encode()


def jpegs() -> Iterator[bytes]:
    """JPEGs of many kinds."""
    random = np.random.default_rng(0)
    yield from (damage.made_up(random) for _ in range(12))


def images() -> Iterator[bytes]:
    """A file of each format, and of each of their kinds."""
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield _saved("PNG", mode) if mode != "I;16" else _deep("PNG")
    for mode in ("L", "P", "RGB", "RGBA", "CMYK", "I;16"):
        yield _saved("TIFF", mode) if mode != "I;16" else _deep("TIFF")
    yield _saved("TIFF", compression="tiff_adobe_deflate")
    yield from (_saved("JPEG", mode, quality=50) for mode in ("L", "RGB", "CMYK"))
    yield _saved("JPEG", quality=50, progressive=True)
    yield from (_saved("GIF", mode) for mode in ("L", "P"))
    yield from (_saved("BMP", mode) for mode in ("1", "L", "P", "RGB"))
    yield from (_saved("PPM", mode) for mode in ("1", "L", "RGB"))
    yield _saved("WEBP")
    yield _saved("WEBP", "RGBA", lossless=True)


def _deep(format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(20, 30)[..., 0].astype(np.uint16) * 257).save(file, format)
    return file.getvalue()


def lists() -> Iterator[bytes]:
    """Lists as `label_lists` describes them."""
    yield b"a.png 0\nb.png 1 # good\n'my cat.png' 1\n"
    yield b"a.png cat\nb.png dog\n\n# nothing\nmissing.png dog\n"
    yield b'file,label\na.png,0.5\nb.png,\n"my cat.png",1e3\n'
    yield b"x;y;image\n1;2;a.png\n3;4;b.png\n"
    yield b'{"file": "a.png", "y": [0, 1]}\n{"file": "b.png", "y": [1, null]}\n'
    yield b"\xef\xbb\xbfa.png\t3\nb.png\t4\na.png\t3\n"


def annotations() -> Iterator[bytes]:
    """labelme's files: shapes of all kinds, a mask in one, its image in another."""
    bitmap = io.BytesIO()
    Image.new("L", (3, 4), 1).save(bitmap, "PNG")
    points = [[1.5, 2], [30, 3], [20, 25], [4, 20]]
    kinds = {"polygon": 4, "linestrip": 3, "oriented_rectangle": 4, "rectangle": 2, "circle": 2, "line": 2, "point": 1}
    shapes: list[dict[str, Any]] = [
        {"label": kind, "points": points[:count], "shape_type": kind, "group_id": None} for kind, count in kinds.items()
    ]
    mask = base64.b64encode(bitmap.getvalue()).decode()
    shapes.append({"label": "cat", "points": [[5, 6], [7, 9]], "shape_type": "mask", "mask": mask, "group_id": 1})
    whole = {"imagePath": "a.png", "imageData": None, "imageHeight": 30, "imageWidth": 40}
    yield json.dumps({**whole, "shapes": shapes}).encode()
    embedded = base64.b64encode(_saved("PNG", "1")).decode()
    yield json.dumps({"imagePath": "gone.png", "imageData": embedded, "shapes": shapes[:1]}).encode()


def boxes() -> Iterator[bytes]:
    """A file in COCO's format."""
    content = {
        "info": {},
        "images": [
            {"id": n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(("a.png", "b.png"))
        ],
        "annotations": [
            {"image_id": n % 2, "category_id": 3, "bbox": [1, 2.5, 3, 4], "iscrowd": int(n == 3)} for n in range(4)
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 1, "name": "cat"}],
    }
    yield json.dumps(content).encode()


def tars() -> Iterator[bytes]:
    """WebDataset's shards in the formats of tar."""
    import tarfile

    from test_tar_members import tar_of

    array = io.BytesIO()
    np.save(array, np.arange(6.0).reshape(2, 3))
    members = {
        "png": _saved("PNG", "1"),
        "cls": b"1",
        "txt": b"words",
        "json": b'{"x": [1, 2]}',
        "npy": array.getvalue(),
    }
    files = [(f"{key}.{suffix}", content) for key in ("a", "b") for suffix, content in members.items()]
    yield tar_of(files)
    yield tar_of([(f"{'x' * 120}/{name}", content) for name, content in files[:2]], tarfile.GNU_FORMAT)
    yield tar_of([(f"{'é' * 120}/{name}", content) for name, content in files[:2]])


def parquets() -> Iterator[bytes]:
    """Rows of images and values of many types."""
    import pyarrow as arrow
    from test_parquet import CAT_OR_DOG, IMAGE, images, write

    with tempfile.TemporaryDirectory() as folder:
        columns = {
            "image": images(3),
            "label": arrow.array([0, 1, None]),
            "words": arrow.array(["a", "b", None]),
            "list": arrow.array([[1, 2], [3, 4], [5, 6]], arrow.list_(arrow.int32(), 2)),
            "more": arrow.array([{"x": 1.5, "y": [True]}] * 3),
        }
        features = {"image": IMAGE, "label": CAT_OR_DOG}
        for name, options in (("a", {}), ("b", {"compression": "none", "use_dictionary": False, "rows": 2})):
            yield write(Path(folder, name), columns, features, **options).read_bytes()


def dicoms() -> Iterator[bytes]:
    """Files of 8 and 16 bits, in colour, compressed, of several frames."""
    from pydicom import uid
    from test_dicom import RAMP, made

    values: dict[str, Any] = {
        "RescaleSlope": "2",
        "RescaleIntercept": "-100",
        "WindowCenter": "20",
        "WindowWidth": "30",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.dcm")
        for array, options in (
            (RAMP, values),
            (RAMP.astype(np.int16), {"BitsStored": 12, **values}),
            (np.stack([RAMP, RAMP]), {"syntax": uid.RLELossless}),
            (picture(6, 5), {"colour": True, "planar": 1}),
            (
                RAMP.astype(np.uint16),
                {"syntax": uid.ImplicitVRLittleEndian, "PhotometricInterpretation": "MONOCHROME1"},
            ),
            (RAMP, {"syntax": uid.DeflatedExplicitVRLittleEndian}),
        ):
            made(path, array, **options)
            yield path.read_bytes()


def idx_labels() -> bytes:
    """MNIST's labels."""
    return b"\0\0\x08\x01" + struct.pack(">I", SMALL) + bytes(range(SMALL))


def idx_images() -> Iterator[bytes]:
    """MNIST's images, and gzipped."""
    plain = b"\0\0\x08\x03" + struct.pack(">3I", SMALL, 4, 5) + bytes(range(SMALL * 4 * 5))
    yield plain
    yield gzip.compress(plain, mtime=0)


def cifar_names() -> bytes:
    """The pickled names of CIFAR's classes."""
    return pickle.dumps({"label_names": [f"class {n}" for n in range(SMALL)]}, 2)


def cifar_batches() -> Iterator[bytes]:
    """Pickled batches by protocols old and new."""
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2], "filenames": ["a", "b"]}
    yield from (pickle.dumps(batch, protocol) for protocol in (1, 2, 4))
