"""Makes the golden stores of format version 1, once: `python tests/golden/make.py` refuses to change one that exists.

Each NAME.lmdb.gz comes with NAME.json: its content digest, and for every sample what must come out of it for ever.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastload

HERE = Path(__file__).parent
SHADES = np.add.outer(np.arange(128), np.arange(160))


def picture(seed: int, height: int = 128, width: int = 160) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture of soft colours, the same on every machine."""
    tones = (SHADES[:height, :width, None] * np.array([1, 2, 3]) + 37 * seed) % 256
    return tones.astype(np.uint8)


def file_of(pixels: np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def classes(folder: Path) -> dict[str, Any]:
    """JPEGs that are re-cut, upright and turned, and other formats, in two classes; one file is left out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "ant/0.jpg": file_of(picture(0), "JPEG", quality=90),
        "ant/1.jpg": file_of(picture(1), "JPEG", quality=90, progressive=True, subsampling=0),
        "bee/0.jpg": file_of(picture(2), "JPEG", quality=80, exif=exif),
        "bee/1.png": file_of(picture(3), "PNG"),
        "bee/2.gif": file_of(picture(4)[..., 0], "GIF"),
        "bee/3.jpg": b"no image",
    }
    for name, content in files.items():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes(content)
    return {"source": folder / "source"}


def raw(folder: Path) -> dict[str, Any]:
    """Small pictures of one size, as a column."""
    source = folder / "source"
    source.mkdir()
    for number in range(5):
        Image.fromarray(picture(number, 8, 6)).save(source / f"{number}.png")
    return {"source": source, "encode": "raw"}


def masks(folder: Path) -> dict[str, Any]:
    """An image and its mask, of two blocks."""
    for name in ("images", "masks"):
        (folder / "source" / name).mkdir(parents=True)
    Image.fromarray(picture(0)).save(folder / "source/images/0.png")
    Image.fromarray((SHADES // 40).astype(np.uint8)).save(folder / "source/masks/0.png")
    return {"source": folder / "source"}


def deep(folder: Path) -> dict[str, Any]:
    """Images of 16 bits."""
    (folder / "source").mkdir()
    Image.fromarray((SHADES * 200).astype(np.uint16)).save(folder / "source/0.png")
    return {"source": folder / "source"}


def fields(folder: Path) -> dict[str, Any]:
    """Samples with fields of every kind."""
    samples = [
        {
            "photo": fastload.EncodedImage(file_of(picture(i), "JPEG", quality=90)),
            "mask": (SHADES // 50).astype(np.uint8),
            "boxes": np.array([[1, 2, 30, 40]] * i, np.float32).reshape(-1, 4),
            "count": i,
            "share": i / 4,
            "truth": i % 2 == 0,
            "vector": np.arange(3, dtype=np.float32) + i,
            "pair": (torch.arange(200) // 50, torch.tensor([i / 3], dtype=torch.bfloat16)),
            "text": f"é {i}",
            "bytes": bytes([i] * 5),
            "json": [None, {"a": i}],
        }
        for i in range(3)
    ]
    return {"source": samples, "kinds": {"mask": "mask", "boxes": "boxes", "vector": "vector"}}


STORES: tuple[Callable[[Path], dict[str, Any]], ...] = (classes, raw, masks, deep, fields)


def told(value: Any) -> Any:
    """A value as JSON can hold it: of pictures, arrays and bytes a hash, with the type."""
    if isinstance(value, torch.Tensor):
        shape = [str(value.dtype), *value.shape]
        flat = value.contiguous().reshape(-1)
        return [*shape, hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]]
    if isinstance(value, np.ndarray):
        return ["numpy", *told(torch.from_numpy(value))]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: told(item) for key, item in value.items()}
    return [told(item) for item in value] if isinstance(value, list | tuple) else value


def contents(path: Path) -> dict[str, Any]:
    """What must come out of a store for ever."""
    dataset = fastload.ImageDataset(path, on_error="raise")
    store = dataset.store
    return {
        "digest": store.manifest["digest"],
        "classes": store.classes,
        "names": [store.name(index) for index in range(len(store))],
        "left out": [entry["name"] for entry in store.quarantine()],
        "samples": [told(dataset[index]) for index in range(len(dataset))],
    }


def main() -> int:
    """Make what is missing."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    for make in STORES:
        target = HERE / f"v1-{make.__name__}.lmdb.gz"
        if target.exists():
            print(f"{target.name} is there, and stays as it is")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "db.lmdb"
            fastload.pack(**make(Path(folder)), destination=path)
            target.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            target.with_name(f"v1-{make.__name__}.json").write_text(json.dumps(contents(path), indent=1) + "\n")
        print(f"{target.name}: {target.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
