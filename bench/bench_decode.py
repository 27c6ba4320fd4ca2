"""One picture, from the bytes of a JPEG to 224 x 224, on one thread, decoded whole (`bench_tiles` is about tiles)."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import fastload
import pictures
from bare import BareCalls
from contest import Contest, Work
from fastload import decode, record
from fastload.factory import train_transform
from fastload.geometry import Plan
from fastload.order import SampleRandom

_Draw = Callable[[record.Field, Plan, pictures.Pixels], None]


def bench_decode(contest: Contest, kept: Path) -> None:
    """What does a random crop cost from a file's own bytes to 224 x 224 pixels, against Pillow, OpenCV, bare calls?"""
    dataset = fastload.ImageDataset(kept, train_transform(224), scaled_decode=False)
    samples = [_sample(dataset, index) for index in range(len(dataset))]
    samples = [(field, plan) for field, plan in samples if field.orientation == 1]
    out: dict[str, pictures.Pixels] = {
        name: np.empty((224, 224, 3), np.uint8) for name in ("fastload", "Pillow", "OpenCV")
    }

    def each(draw: _Draw, name: str) -> Callable[[], int]:
        def work() -> int:
            for field, plan in samples:
                draw(field, plan, out[name])
            return len(samples)

        return work

    contenders: dict[str, Work] = {
        "fastload": each(_fastload, "fastload"),
        "Pillow": each(_pillow, "Pillow"),
        "OpenCV, not antialiased": each(_opencv, "OpenCV"),
        "bare calls": BareCalls(dataset),
    }
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    rounds = contest.run(contenders, rounds=5)
    cv2.setNumThreads(threads)
    for rival in list(contenders)[1:]:
        contest.measure(f"times {rival}, per CPU second", rounds.cpu_ratios("fastload", rival))
    extra = rounds.differences("fastload", "bare calls", "thread")
    contest.measure("CPU time beside decode and resize calls, us", [1e6 * value for value in extra])
    pictures.assert_like(torch.from_numpy(out["fastload"]).permute(2, 0, 1), out["Pillow"], "the last picture")
    difference = np.abs(out["OpenCV"].astype(int) - out["Pillow"]).mean()
    assert difference < 12, f"OpenCV's last picture is another one: {difference} levels off on average"


def _sample(dataset: fastload.ImageDataset, index: int) -> tuple[record.Field, Plan]:
    field = record.parse(dataset.store.view(index))[0]
    size = tuple(dataset.store.columns["size"][index].tolist())
    (plan,) = dataset.transform.plans(size, SampleRandom(0, 0, index))
    return field, plan


def _fastload(field: record.Field, plan: Plan, out: pictures.Pixels) -> None:
    decode.render(decode.pixels(field), 1, [plan], out)


def _pillow(field: record.Field, plan: Plan, out: pictures.Pixels) -> None:
    x, y, width, height = plan.box
    image = Image.open(io.BytesIO(field.payload)).convert("RGB").crop((x, y, x + width, y + height))
    image = image.resize(plan.size[::-1], Image.Resampling.BILINEAR)
    out[:] = np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.mirror else image)


def _opencv(field: record.Field, plan: Plan, out: pictures.Pixels) -> None:
    image = cv2.imdecode(np.frombuffer(field.payload, np.uint8), cv2.IMREAD_COLOR_RGB)
    x, y, width, height = plan.box
    assert image is not None
    picture = cv2.resize(image[y : y + height, x : x + width], plan.size[::-1], interpolation=cv2.INTER_LINEAR)
    out[:] = cv2.flip(picture, 1) if plan.mirror else picture
