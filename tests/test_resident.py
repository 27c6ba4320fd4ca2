"""`make_loader(device_resident=True)`: the usual loader's batches, gathered where the whole set lies."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastload
from fastload import make_loader, resident
from fastload.errors import DecodeError, TooManyFailures
from fastload.order import SampleRandom, SampleRandoms
from fastload.transforms import (
    CenterCrop,
    Compose,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
)

CIFAR = [RandomCrop(16, padding=2), RandomHorizontalFlip()]
TRANSFORMS: dict[str, list[Any]] = {
    "nothing": [],
    "flip": [RandomHorizontalFlip()],
    "padded crop and flip": CIFAR,
    "flip before the crop": [RandomHorizontalFlip(), RandomCrop(14, padding=(0, 1, 5, 3))],
    "padding on one side": [RandomCrop((9, 18), padding=(6, 0, 0, 0)), RandomHorizontalFlip(1.0)],
    "two crops, three flips": [
        RandomHorizontalFlip(),
        RandomCrop((13, 15)),
        RandomHorizontalFlip(),
        RandomCrop((11, 7)),
        CenterCrop(5),
        RandomHorizontalFlip(0.2),
    ],
    "padding where it is needed": [RandomCrop((24, 9), pad_if_needed=True)],
    "centre": [CenterCrop((7, 12))],
    "centre with a border": [RandomHorizontalFlip(), CenterCrop(25), RandomHorizontalFlip()],
}
BATCH = 7


def both(path: Path, transforms: Iterable[Any] = (), **options: Any) -> list[fastload.DevicePrefetcher[Any]]:
    """The usual loader and one whose set is resident, on the CPU."""
    options = {"batch_size": BATCH, "train": True, "device": "cpu", "seed": 3} | options
    return [
        make_loader(fastload.ImageDataset(path, Compose(list(transforms)), seed=5), **options, **more)
        for more in ({"num_workers": 1}, {"device_resident": True})
    ]


def same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether all batches agree, in pictures, labels, types and layout."""
    return all(
        a.equal(b) and a.dtype == b.dtype and a.stride() == b.stride()
        for pair in zip(one, other, strict=True)
        for a, b in zip(*pair, strict=True)
    )


@pytest.fixture(scope="module")
def real_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of thirty raw images, 12 high and 10 wide, with real labels, in several chunks."""
    root = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(root / f"{i:02d}.png")
    (root / "list.csv").write_text("file,x\n" + "".join(f"{i:02d}.png,{i / 7}\n" for i in range(30)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastload.store.COLUMN_CHUNK", 7 * 12 * 10 * 3)
        fastload.pack(root / "list.csv", root / "db.lmdb", encode="raw")
    return root / "db.lmdb"


@pytest.fixture(scope="module")
def mnist_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store packed from MNIST's own files: twenty grey images, 9 high and 8 wide."""
    root = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(1)
    for name, shape in (("images-idx3", (20, 9, 8)), ("labels-idx1", (20,))):
        head = bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape)
        (root / f"train-{name}-ubyte").write_bytes(head + rng.integers(0, 10, shape, np.uint8).tobytes())
    fastload.pack(root, root / "db.lmdb")
    return root / "db.lmdb"


@pytest.fixture
def damaged_path(raw_store_path: Path, tmp_path: Path) -> Path:
    """A copy of the raw store in which images 3 and 17 have a wrong byte."""
    path = tmp_path / "damaged.lmdb"
    content = bytearray(raw_store_path.read_bytes())
    dataset = fastload.ImageDataset(raw_store_path)
    for index in (3, 17):
        row = dataset.store.columns["image"][index].tobytes()
        assert content.count(row) == 1
        content[content.find(row) + 100] ^= 1
    path.write_bytes(content)
    return path


# ---- the usual loader's batches


@pytest.mark.parametrize("name", TRANSFORMS)
def test_pictures_are_the_usual_loaders(raw_store_path: Path, name: str) -> None:
    """Bit for bit, over several epochs, with every kind of transform, in the same order and layout."""
    usual, here = both(raw_store_path, TRANSFORMS[name], drop_last=False)
    assert len(usual) == len(here) == 6
    assert all(same(usual, here) for _ in range(3))
    for loader in (usual, here):
        loader.set_epoch(7)
    assert same(usual, here)


@pytest.mark.parametrize("name", ["nothing", "flip", "padded crop and flip"])
@pytest.mark.parametrize(
    "options",
    [
        {"repeat": 3},
        {"weights": "balanced", "drop_last": False},
        {"train": False, "pad": False},
        {"window": 8},
        {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        {"dtype": torch.float16},
    ],
    ids=repr,
)
def test_options_mean_the_same(raw_store_path: Path, name: str, options: dict[str, Any]) -> None:
    """Repeated passes and draws by weight have crops of their own; batches are normalised and cast alike."""
    usual, here = both(raw_store_path, TRANSFORMS[name], **options)
    assert all(same(usual, here) for _ in range(2))


@pytest.mark.parametrize("transforms", [[], [RandomCrop((10, 9), padding=3), RandomHorizontalFlip()]], ids=repr)
def test_grey_images_and_real_labels(mnist_path: Path, real_path: Path, transforms: list[Any]) -> None:
    """One channel; float32 labels; a column of several chunks."""
    usual, here = both(mnist_path, transforms)
    assert next(iter(both(mnist_path)[1]))[0].shape == (BATCH, 1, 9, 8)
    assert same(usual, here)
    dataset = fastload.ImageDataset(real_path)
    assert len(list(dataset.store.columns["image"].chunks())) == 5
    usual, here = both(real_path, transforms)
    assert next(iter(both(real_path)[1]))[1].dtype == torch.float32
    assert same(usual, here)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**70),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
    st.integers(1, 2**32),
)
def test_numbers_are_drawn_as_one_by_one(seed: int, epoch: int, keys: list[int], n: int) -> None:
    """Every draw is `SampleRandom`'s, in any order of kinds."""
    many = SampleRandoms(seed, epoch, np.array(keys, np.uint64))
    single = [SampleRandom(seed, epoch, key) for key in keys]
    for _ in range(2):
        assert many.integer(n).tolist() == [random.integer(n) for random in single]
        assert many.random().tolist() == [random.random() for random in single]
        assert many.bits().tolist() == [random.bits() for random in single]


def test_a_path_gets_no_transform(raw_store_path: Path) -> None:
    """The images as they were packed, for training too; options reach the dataset."""
    loader = make_loader(raw_store_path, 8, train=True, device="cpu", device_resident=True, max_failures=3)
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, 16, 16)
    dataset = loader.loader.dataset  # type: ignore[attr-defined]
    assert (dataset.failures.limit, dataset.transform.transforms) == (3, ())
    assert set(labels.tolist()) <= set(range(4))


def test_batches_are_the_users(raw_store_path: Path) -> None:
    """Changing a batch changes nothing of the set."""
    _, here = both(raw_store_path, train=False)
    first = [images.clone() for images, _ in here]
    for images, labels in here:
        images.zero_()
        labels.zero_()
    assert all(images.equal(before) for (images, _), before in zip(here, first, strict=True))


def test_the_set_goes_with_its_loader(raw_store_path: Path) -> None:
    """Nothing holds it after that, not even an iterator that was left in the middle and closed."""
    _, loader = both(raw_store_path, CIFAR)
    batches = iter(loader)
    next(batches)
    batches.close()
    assert list(batches) == []
    held = weakref.ref(loader.loader.resident)  # type: ignore[attr-defined]
    del loader, batches
    assert held() is None


# ---- states


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.booleans(), st.sampled_from([1, 2]))
def test_a_state_resumes_at_any_batch_and_in_the_usual_loader(
    raw_store_path: Path, epoch: int, steps: int, switch: bool, repeat: int
) -> None:
    """From any batch on the next ones are those that would have come, whichever of the two goes on."""
    loaders = both(raw_store_path, CIFAR, drop_last=False, repeat=repeat)
    first, second = loaders if switch else reversed(loaders)
    first.set_epoch(epoch)
    batches = iter(first)
    for _ in range(steps):
        next(batches)
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == second.state_dict()
    assert same(batches, second)
    assert same(first, second)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_other_ranks_go_on(raw_store_path: Path, before: int, after: int, steps: int) -> None:
    """Together they give every sample once, whatever the number of ranks before and after."""

    def ranks(world: int) -> list[fastload.DevicePrefetcher[Any]]:
        loaders = []
        for rank in range(world):
            _, loader = both(raw_store_path, batch_size=2, drop_last=False, pad=False)
            loader.sampler.rank, loader.sampler.world = rank, world
            loaders.append(loader)
        return loaders

    def pictures(batches: Iterable[Any]) -> list[bytes]:
        return [image.numpy().tobytes() for images, _ in batches for image in images]

    first, seen = ranks(before), []
    for loader in first:
        batches = iter(loader)
        seen += pictures(itertools.islice(batches, steps))
        state = loader.state_dict()
        batches.close()
    for loader in ranks(after):
        loader.load_state_dict(state)
        seen += pictures(loader)
    assert len(seen) == len(set(seen)) == 40


# ---- what is refused


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([RandomResizedCrop(8)], "can't do RandomResizedCrop"),
        ([Resize(8), RandomHorizontalFlip()], "can't do Resize"),
        ([Normalize([0.5] * 3, [0.5] * 3)], "normalise by make_loader's mean and std"),
        ([RandomHorizontalFlip(), torch.nn.Identity()], "can't do Identity"),
        ([RandomCrop(20)], "pad_if_needed=True"),
        ([RandomCrop(8), CenterCrop(10)], "where it is the only one"),
        ([RandomCrop(16, padding=2), CenterCrop(8)], "where it is the only one"),
    ],
)
def test_other_transforms_are_refused(raw_store_path: Path, transforms: list[Any], message: str) -> None:
    """ValueError at once, which says what to do."""
    with pytest.raises(ValueError, match=message):
        both(raw_store_path, transforms)


def test_other_stores_and_datasets_are_refused(raw_store_path: Path, store_path: Path) -> None:
    """What isn't one raw column, or has ways of its own."""

    class Own(fastload.ImageDataset):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)

    def load(dataset: Any) -> Any:
        return make_loader(dataset, 4, train=True, device="cpu", device_resident=True)

    with pytest.raises(ValueError, match=r"--encode raw.*--short-side"):
        load(store_path)
    for dataset in (
        fastload.ImageDataset(raw_store_path, image_type="numpy"),
        fastload.ImageDataset(raw_store_path, None, lambda label: -label),
        Own(raw_store_path),
    ):
        with pytest.raises(ValueError, match="takes an ImageDataset of tensors"):
            load(dataset)


def test_a_set_that_does_not_fit_is_refused(raw_store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it takes and what there is, before anything is made."""
    monkeypatch.setattr(resident.psutil, "virtual_memory", type("Memory", (), {"available": 30_000}))
    with pytest.raises(MemoryError, match=r"on cpu, where .* GB are free; pack smaller images"):
        both(raw_store_path)


# ---- damage


def pictures_by_place(path: Path, **options: Any) -> tuple[Any, list[torch.Tensor], list[int]]:
    dataset = fastload.ImageDataset(path, **options)
    loader = make_loader(dataset, 8, train=False, device="cpu", device_resident=True)
    images, labels = zip(*loader, strict=True)
    return dataset, list(torch.cat(images)), torch.cat(labels).tolist()


def test_damaged_images_are_found_at_once(raw_store_path: Path, damaged_path: Path) -> None:
    """Black, with a label that losses ignore, and listed; all others are as they were."""
    _, sound, labels = pictures_by_place(raw_store_path)
    dataset, pictures, found = pictures_by_place(damaged_path)
    assert list(dataset.failures) == [3, 17]
    assert "checksum" in dataset.failures[3]
    assert not pictures[3].any()
    assert not pictures[17].any()
    assert found == [-100 if i in (3, 17) else label for i, label in enumerate(labels)]
    assert all(pictures[i].equal(sound[i]) for i in range(40) if i not in (3, 17))


def test_damaged_images_are_replaced_or_raised(raw_store_path: Path, damaged_path: Path) -> None:
    """By another sample and its label, the same in every run; as an error that names the first; or too many."""
    _, sound, labels = pictures_by_place(raw_store_path)
    one, other = (pictures_by_place(damaged_path, on_error="skip") for _ in range(2))
    for i in (3, 17):
        source = next(j for j in range(40) if j not in (3, 17) and one[1][i].equal(sound[j]))
        assert one[2][i] == labels[source]
        assert one[1][i].equal(other[1][i])
    assert list(one[0].failures) == [3, 17]
    with pytest.raises(DecodeError, match=r"sample 3: .*checksum"):
        pictures_by_place(damaged_path, on_error="raise")
    with pytest.raises(TooManyFailures, match="max_failures allows 1"):
        pictures_by_place(damaged_path, max_failures=1)


# ---- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRANSFORMS)
def test_gpu_pictures_are_the_usual_loaders(raw_store_path: Path, name: str) -> None:
    """The same bits on CUDA, where all of it lies."""
    usual, _ = both(raw_store_path, TRANSFORMS[name])
    dataset = fastload.ImageDataset(raw_store_path, Compose(TRANSFORMS[name]), seed=5)
    here = make_loader(dataset, BATCH, train=True, device="cuda", seed=3, device_resident=True)
    for _ in range(2):
        for (images, labels), (expected, their_labels) in zip(here, usual, strict=True):
            assert images.is_cuda
            assert labels.is_cuda
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.cpu().equal(expected)
            assert labels.cpu().equal(their_labels)


@pytest.mark.gpu
def test_gpu_memory_is_given_back(raw_store_path: Path) -> None:
    """The set goes when its loader goes, and one that doesn't fit is refused."""
    before = torch.cuda.memory_allocated()
    loader = make_loader(raw_store_path, 8, train=True, device="cuda", device_resident=True)
    next(iter(loader))
    assert torch.cuda.memory_allocated() >= before + 40 * 16 * 16 * 3
    del loader
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 4096
