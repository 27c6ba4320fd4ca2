"""Other loaders that are known for speed, where they are installed, on the same files with as many threads.

Only OpenCV under torch's DataLoader was run so far. DALI, FFCV and tf.data are written from their documentation and
have yet to be tried: they had no place on the machine of the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import fastload
import pictures
import rivals
from contest import Contest
from epochs import Epochs, fast_loader
from fastload.factory import train_transform

BATCH, SIZE, THREADS = 64, rivals.SIZE, 2

Batches = Callable[[], Iterator[Any]]
"""An epoch's batches of pictures: arrays, uint8, (n, 3, 224, 224) or (n, 224, 224, 3)."""


class _OpenCVFolder(rivals.Folder):
    """Class folders of images, decoded and resized by OpenCV; its linear resize is not antialiased."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        cv2.setNumThreads(0)
        path, label = self.samples[index]
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert image is not None
        top, left, height, width = rivals.draw_box(*image.shape[:2])
        picture = cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE))
        if torch.rand(1) < 0.5:
            picture = cv2.flip(picture, 1)
        return torch.from_numpy(picture).permute(2, 0, 1), label


def _opencv(images: Path, workspace: Path) -> Batches:
    """torch's DataLoader, two processes, OpenCV."""
    folder = _OpenCVFolder(images, rivals.random_crop())
    pillow = rivals.Folder(images, rivals.random_crop())
    for index in range(0, len(folder), max(1, len(folder) // 8)):
        torch.manual_seed(index)
        picture, _ = folder[index]
        torch.manual_seed(index)
        difference = (picture.int() - pillow[index][0].int()).abs().float().mean()
        assert difference < 12, f"OpenCV's picture {index} is another one: {difference} levels off on average"
    loader = rivals.loader(folder, BATCH)
    return lambda: (batch for batch, _ in loader)


def _dali(images: Path, workspace: Path) -> Batches:
    """NVIDIA DALI on the CPU: decodes to the crop's end, resizes antialiased. Not run yet."""
    dali = pytest.importorskip("nvidia.dali")
    fn, types = pytest.importorskip("nvidia.dali.fn"), dali.types

    @dali.pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=types.CPU_ONLY_DEVICE_ID)  # type: ignore[misc]
    def pipeline() -> Any:
        data, labels = fn.readers.file(file_root=str(images), random_shuffle=True, name="files")
        area, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
        picture = fn.decoders.image_random_crop(data, device="cpu", random_area=area, random_aspect_ratio=ratio)
        picture = fn.resize(picture, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(picture, horizontal=fn.random.coin_flip()), labels

    pipe = pipeline()
    pipe.build()
    batches = -(-pipe.epoch_size("files") // BATCH)

    def epoch() -> Iterator[Any]:
        for _ in range(batches):
            pictures_of_batch, _ = pipe.run()
            yield pictures_of_batch.as_array()

    return epoch


def _ffcv(images: Path, workspace: Path) -> Batches:
    """FFCV: its writer encodes the pictures anew, so quality 95; its resize is OpenCV's. Not run yet."""
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    path = str(workspace / "ffcv.beton")
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=95), "label": IntField()}
    folder: Any = rivals.Folder(images, lambda image: image)  # type: ignore[arg-type, return-value]  # left a picture
    DatasetWriter(path, fields, num_workers=THREADS).from_indexed_dataset(folder)
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()]}
    order = OrderOption.RANDOM
    loader = Loader(path, BATCH, num_workers=THREADS, os_cache=True, order=order, drop_last=False, pipelines=pipelines)
    return lambda: (batch for batch, _ in loader)


def _tf_data(images: Path, workspace: Path) -> Batches:
    """tf.data: decodes only the crop's rows and columns of blocks, resizes without antialiasing. Not run yet."""
    tf = pytest.importorskip("tensorflow")
    files = [str(path) for path in pictures.files(images)]

    def picture(path: Any) -> Any:
        data = tf.io.read_file(path)
        start, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
        )
        window = tf.stack([start[0], start[1], size[0], size[1]])
        image = tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_ACCURATE")
        image = tf.cast(tf.image.resize(image, (SIZE, SIZE), antialias=False), tf.uint8)
        return tf.image.random_flip_left_right(image)

    options = tf.data.Options()
    options.threading.private_threadpool_size = THREADS
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files))
    dataset = dataset.map(picture, num_parallel_calls=THREADS, deterministic=True).batch(BATCH).prefetch(2)
    dataset = dataset.with_options(options)
    return dataset.as_numpy_iterator  # type: ignore[no-any-return]


@pytest.mark.parametrize("rival", [_opencv, _dali, _ffcv, _tf_data], ids=["OpenCV", "DALI", "FFCV", "tf.data"])
def bench_rivals(
    rival: Callable[[Path, Path], Batches], contest: Contest, images: Path, store: Path, workspace: Path
) -> None:
    """How many random crops per second come in whole epochs, against another loader with 2 threads or processes?"""
    batches = rival(images, workspace)
    dataset = fastload.ImageDataset(store, train_transform(SIZE))
    ours = Epochs(fast_loader(dataset, BATCH, THREADS))
    last: list[Any] = []

    def theirs() -> int:
        count = 0
        for batch in batches():
            last[:] = [batch]
            count += len(batch)
        return count

    rounds = contest.run({"fastload": ours, "rival": theirs})
    contest.measure("times the rival", rounds.ratios("fastload", "rival"))
    contest.measure("times the rival, per CPU second", rounds.cpu_ratios("fastload", "rival"))
    pictures.check(dataset, dataset.epoch, ours.order()[:8], ours.images[:8])
    assert rounds.turns["rival"][0].samples >= len(dataset)
    got = np.asarray(last[0])
    assert got.dtype == np.uint8
    assert sorted(got.shape[1:]) == [3, SIZE, SIZE]
    assert got.std(axis=(1, 2, 3)).min() > 0
