"""What people write by hand when they follow a guide: a Dataset that opens files in `__getitem__`, torch's loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset

import fastload
import pictures
from contest import Contest
from epochs import Epochs, fast_loader
from fastload.order import SampleRandom
from fastload.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize

PAIRS, SIZE, CROP, SHOWN = 48, (1080, 1920), 512, 256
Opened = Callable[[Path], npt.NDArray[np.uint8]]


def by_pillow(path: Path) -> npt.NDArray[np.uint8]:
    """A file as an array: RGB, or a mask's values."""
    image = Image.open(path)
    return np.array(image if image.mode in "PL" else image.convert("RGB"))


def by_opencv(path: Path) -> npt.NDArray[np.uint8]:
    """The same by OpenCV."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED if path.suffix == ".png" else cv2.IMREAD_COLOR)
    assert image is not None
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class Segmentation(Dataset[Any]):
    """Image and mask from two folders: opened, cropped at the same place, flipped together."""

    def __init__(self, folder: Path, opened: Opened) -> None:
        self._pairs = list(zip(pictures.files(folder / "images"), pictures.files(folder / "masks"), strict=True))
        self._opened = opened

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        cv2.setNumThreads(0)
        image, mask = (self._opened(path) for path in self._pairs[index])
        y = int(torch.randint(image.shape[0] - CROP + 1, ()))
        x = int(torch.randint(image.shape[1] - CROP + 1, ()))
        image, mask = image[y : y + CROP, x : x + CROP], mask[y : y + CROP, x : x + CROP]
        if torch.rand(()) < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        return torch.from_numpy(image.copy()).permute(2, 0, 1), torch.from_numpy(mask.copy())


class Listed(Dataset[Any]):
    """Images of a label list: opened, resized, their labels beside them."""

    def __init__(self, path: Path, opened: Callable[[Path], npt.NDArray[np.uint8]]) -> None:
        lines = [line.rsplit(maxsplit=1) for line in path.read_text().splitlines()]
        self._files, self._labels = [path.parent / name for name, _ in lines], [int(label) for _, label in lines]
        self._opened = opened

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        cv2.setNumThreads(0)
        return torch.from_numpy(self._opened(self._files[index])).permute(2, 0, 1), self._labels[index]


def resized_by_pillow(path: Path) -> npt.NDArray[np.uint8]:
    """Opened, converted and resized as most guides do."""
    return np.array(Image.open(path).convert("RGB").resize((SHOWN, SHOWN)))


def resized_by_opencv(path: Path) -> npt.NDArray[np.uint8]:
    """The same by OpenCV, whose pixels are aliased."""
    return cv2.resize(by_opencv(path), (SHOWN, SHOWN))


def stock_loader(dataset: Dataset[Any], batch_size: int) -> DataLoader[Any]:
    """torch's loader with two processes that live on."""
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=2, persistent_workers=True)


def make_pairs(folder: Path) -> Path:
    """Fill `folder` with photograph-like images of 2 megapixels and masks of polygons."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    for number in range(PAIRS):
        Image.fromarray(pictures.photograph(number, *SIZE)).save(folder / "images" / f"{number:03}.jpg", quality=92)
        mask = Image.new("P", SIZE[::-1])
        mask.putpalette(list(range(256)) * 3)
        draw = ImageDraw.Draw(mask)
        for value in rng.integers(1, 21, 40).tolist():
            centre = rng.integers(0, SIZE[::-1], 2)
            draw.polygon([tuple(p) for p in (centre + rng.integers(-200, 200, (9, 2))).tolist()], value)
        mask.save(folder / "masks" / f"{number:03}.png")
    return folder


def bench_segmentation(contest: Contest, workspace: Path) -> None:
    """Random crops of 512 from pairs of image and mask of 2 megapixels: how many times as fast as files by hand?"""
    folder = make_pairs(workspace / "pairs")
    fastload.pack(folder, workspace / "pairs.lmdb")
    dataset = fastload.ImageDataset(workspace / "pairs.lmdb", Compose([RandomCrop(CROP), RandomHorizontalFlip()]))
    contenders = {
        "fastload": Epochs(fast_loader(dataset, 8), 4),
        "Pillow": Epochs(stock_loader(Segmentation(folder, by_pillow), 8)),
        "OpenCV": Epochs(stock_loader(Segmentation(folder, by_opencv), 8)),
    }
    rounds = contest.run({**contenders}, rounds=5)
    for rival in ("Pillow", "OpenCV"):
        contest.target(f"times {rival}", rounds.ratios("fastload", rival), at_least=3)
    order = contenders["fastload"].order()[:8]
    masks = pictures.files(folder / "masks")
    pictures.check(dataset, dataset.epoch, order, contenders["fastload"].images)
    for index, mask in zip(order, contenders["fastload"].first_labels, strict=True):
        (plan,) = dataset.transform.plans(SIZE, SampleRandom(dataset.seed, dataset.epoch, index))
        x, y, width, height = plan.box
        expected = by_pillow(masks[index])[y : y + height, x : x + width]
        assert np.array_equal(mask.numpy(), expected[:, ::-1] if plan.mirror else expected)


PACKED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "short side 256": {"short_side": SHOWN},
    "raw, short side 256": {"short_side": SHOWN, "encode": "raw"},
}


@pytest.mark.parametrize("packed", PACKED)
def bench_label_list(contest: Contest, images: Path, workspace: Path, packed: str) -> None:
    """Images of a label list at 256 x 256: how many times as fast as files by hand? Packed as they are, and smaller."""
    files = pictures.files(images)
    labels = {name: label for label, name in enumerate(sorted({file.parent.name for file in files}))}
    listed, store = workspace / "list.txt", workspace / f"{packed}.lmdb"
    listed.write_text("".join(f"{file} {labels[file.parent.name]}\n" for file in files))
    fastload.pack(listed, store, **PACKED[packed])
    dataset = fastload.ImageDataset(store, Resize((SHOWN, SHOWN)))
    contenders = {
        "fastload": Epochs(fast_loader(dataset)),
        "Pillow": Epochs(stock_loader(Listed(listed, resized_by_pillow), 64)),
        "OpenCV": Epochs(stock_loader(Listed(listed, resized_by_opencv), 64)),
    }
    rounds = contest.run({**contenders}, rounds=5)
    for rival in ("Pillow", "OpenCV"):
        contest.target(f"times {rival}", rounds.ratios("fastload", rival), at_least=3)
    pictures.check(dataset, dataset.epoch, contenders["fastload"].order()[:8], contenders["fastload"].images[:8])
    contenders["fastload"].check_labels(dataset.targets)


SCANS, CENTRE, WIDTH = 200, 40, 400


def make_scans(folder: Path) -> Path:
    """Fill `folder` with DICOM files of 512 x 512 values of 12 bits, as a CT writes them."""
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir()
    for number in range(SCANS):
        grey = pictures.photograph(number, 512, 512)[..., 1].astype(np.uint16)
        scan = pydicom.Dataset()
        scan.file_meta = pydicom.dataset.FileMetaDataset()
        scan.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        scan.SOPClassUID, scan.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
        scan.InstanceNumber, scan.Modality, scan.PhotometricInterpretation = number, "CT", "MONOCHROME2"
        scan.Rows, scan.Columns, scan.SamplesPerPixel, scan.PixelRepresentation = 512, 512, 1, 0
        scan.BitsAllocated, scan.BitsStored, scan.HighBit = 16, 12, 11
        scan.RescaleSlope, scan.RescaleIntercept = 1, -1024
        scan.PixelData = (grey * 8 + np.arange(512, dtype=np.uint16) % 8).tobytes()
        scan.save_as(folder / f"{number:03}.dcm", enforce_file_format=True)
    return folder


class Scans(Dataset[Any]):
    """DICOM files: read, rescaled, put under a window, resized."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import pydicom

        cv2.setNumThreads(0)
        scan = pydicom.dcmread(self._files[index])
        values = scan.pixel_array * float(scan.RescaleSlope) + float(scan.RescaleIntercept)
        shown = np.clip((values - (CENTRE - WIDTH / 2)) / WIDTH, 0, 1) * 255
        image = cv2.resize(shown.astype(np.uint8), (SHOWN, SHOWN))
        return torch.from_numpy(image)[None], int(scan.InstanceNumber)


def bench_scans(contest: Contest, workspace: Path) -> None:
    """DICOM files of 512 x 512 under a window at 256 x 256: how many times as fast as pydicom by hand?"""
    folder = make_scans(workspace / "scans")
    fastload.pack(folder, workspace / "scans.lmdb", window=(CENTRE, WIDTH), label_from="InstanceNumber")
    dataset = fastload.ImageDataset(workspace / "scans.lmdb", Resize((SHOWN, SHOWN)))
    contenders = {"fastload": Epochs(fast_loader(dataset), 4), "pydicom": Epochs(stock_loader(Scans(folder), 64))}
    rounds = contest.run({**contenders}, rounds=5)
    contest.target("times pydicom", rounds.ratios("fastload", "pydicom"), at_least=3)
    contenders["fastload"].check_labels(dataset.targets)
    by_hand = Scans(folder)
    for index, image in zip(contenders["fastload"].order()[:8], contenders["fastload"].images, strict=False):
        assert (image.float() - by_hand[index][0].float()).abs().mean() < 8  # cv2's resize is aliased
