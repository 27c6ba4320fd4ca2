"""A store of which a third is damaged: training goes to the end, and each bad sample is known, counted and marked."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from damage import spoil
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torch.utils.data import DataLoader as TorchLoader

import fastload
from fastload import DataLoader, DevicePrefetcher, ImageDataset, ShuffleSampler
from fastload.errors import TooManyFailures
from fastload.failures import Failures
from fastload.fields import leaves
from fastload.placeholders import with_valid
from fastload.transforms import Resize

# torch's advice, on a machine with fewer cores than a test has workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

COUNT = 40
BAD = [*range(1, COUNT, 3)][:12]
"""30% of the samples."""

ORDER = np.random.default_rng(0).permutation(COUNT).tolist()
SMALL = Resize((12, 12))

LOADERS: dict[str, Callable[..., Any]] = {
    "none": DataLoader,
    "threads": lambda *given, **more: DataLoader(*given, num_workers=2, **more),
    "processes": lambda *given, **more: DataLoader(*given, num_workers=2, worker_type="process", **more),
    "processes of threads": lambda *given, **more: DataLoader(*given, num_workers=2, threads_per_worker=2, **more),
    "torch, none": TorchLoader,
    "torch, processes": lambda *given, **more: TorchLoader(*given, num_workers=2, **more),
}
OURS = [name for name in LOADERS if not name.startswith("torch")]


@pytest.fixture(scope="module")
def sound_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of forty small JPEGs, each with its own index as its label."""
    root = tmp_path_factory.mktemp("list")
    for index in range(COUNT):
        Image.fromarray(picture(24 + index % 3, 32, seed=index)).save(root / f"{index:02}.jpg", quality=90)
    (root / "list.txt").write_text("".join(f"{index:02}.jpg {index}\n" for index in range(COUNT)))
    fastload.pack(root / "list.txt", root / "db.lmdb")
    return root / "db.lmdb"


@pytest.fixture(scope="module")
def bad_path(sound_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store with bytes of twelve of its JPEGs flipped."""
    return spoil(sound_path, tmp_path_factory.mktemp("bad") / "db.lmdb", BAD)


def end(batches: Any) -> None:
    """End the workers of torch's iterator: after an error only the garbage collector would, in 5 s for each."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


# --- to the end


@pytest.mark.parametrize("kind", LOADERS)
def test_a_store_of_which_a_third_is_damaged_trains_to_the_end(kind: str, sound_path: Path, bad_path: Path) -> None:
    """Three epochs with every kind of worker: the bad are black, labelled -100 and not valid, and no others are; the
    good have the pixels of the undamaged store; each bad one is counted once, with its reason, in this process."""
    images, labels = ImageDataset(sound_path, SMALL).__getitems__(range(COUNT)).columns
    images, labels = torch.as_tensor(images).clone(), torch.as_tensor(labels).clone()
    assert labels.tolist() == list(range(COUNT))
    images[BAD], labels[BAD] = 0, -100
    dataset = ImageDataset(bad_path, SMALL, max_failures=0.3, return_valid=True)
    loader = LOADERS[kind](dataset, 7, sampler=ORDER)
    for _ in range(3):
        batches = list(loader)
        assert {valid.dtype for _, _, valid in batches} == {torch.bool}
        found = [torch.cat(column) for column in zip(*batches, strict=True)]
        assert torch.equal(found[0], images[ORDER])
        assert torch.equal(found[1], labels[ORDER])
        assert found[2].tolist() == [index not in BAD for index in ORDER]
        assert list(dataset.failures) == BAD
        assert len(dataset.failures) == 12
        assert all("checksum mismatch" in reason for reason in dataset.failures.values())


@pytest.mark.parametrize("kind", LOADERS)
def test_it_stops_at_max_failures_with_the_list(kind: str, bad_path: Path) -> None:
    """Every kind of worker tells how many failed, which first and why; the list has no others than the bad."""
    dataset = ImageDataset(bad_path, SMALL, max_failures=5)
    batches = iter(LOADERS[kind](dataset, 4, sampler=ORDER))
    with pytest.raises(TooManyFailures) as caught:
        list(batches)
    end(batches)
    told = re.search(r"(\d+) samples failed, max_failures allows 5\. The first: (.*); and \d+ more", str(caught.value))
    assert told is not None
    named = re.findall(r"sample (\d+): [^;]*checksum mismatch", told[2])
    assert len(named) == 5
    assert 6 <= int(told[1]) <= len(dataset.failures) <= 12
    assert {*map(int, named)} <= {*dataset.failures} <= {*BAD}


def test_skipped_samples_count_and_are_valid(sound_path: Path, bad_path: Path) -> None:
    """What comes in their place is a real sample, and is marked as one."""
    sound = ImageDataset(sound_path, SMALL)
    dataset = ImageDataset(bad_path, SMALL, on_error="skip", return_valid=True)
    batch = dataset.__getitems__(range(COUNT))
    for image, label, valid in batch:
        assert valid is True
        assert label not in BAD
        assert torch.equal(image, sound[label][0])
    assert list(dataset.failures) == BAD
    assert ImageDataset(sound_path, on_error="raise", return_valid=True)[0][2] is True


# --- labels of placeholders


def test_placeholders_carry_the_label_that_was_asked_for(bad_path: Path) -> None:
    """Whatever a target transform would make of it; another sample's label that is the same is transformed."""
    for label in (255, -1, 0, 5, 1 << 40):
        dataset = ImageDataset(bad_path, SMALL, lambda label: label + 1000, ignore_label=label)
        found = dataset.__getitems__([0, 1, 5])
        assert found.labels == [1000, label, 1005]
        plain = ImageDataset(bad_path, SMALL, ignore_label=label).__getitems__([0, 1, 5])
        assert torch.as_tensor(plain.labels).tolist() == [0, label, 5]
    assert ImageDataset(bad_path, ignore_label=7)[1][1] == 7


class Made(Dataset[Any]):
    """Samples made by a function of their index."""

    def __init__(self, make: Callable[[int], Any], count: int = 6) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def photo(index: int) -> torch.Tensor:
    return torch.from_numpy(picture(9, 11, seed=index)).permute(2, 0, 1)


def bad_one(tmp_path: Path, make: Callable[[int], Any], field: str = "image", **options: Any) -> Path:
    """A store of six samples, of which sample 1 has a damaged field."""
    fastload.pack(Made(make), tmp_path / "sound.lmdb", **options)
    return spoil(tmp_path / "sound.lmdb", tmp_path / "bad.lmdb", [1], field)


def test_labels_of_a_type_take_what_it_holds(tmp_path: Path) -> None:
    """A tensor of 8 bits is a placeholder's label too, and 255 is none of its values."""
    path = bad_one(tmp_path, lambda i: {"image": photo(i), "label": torch.tensor(i, dtype=torch.int8)})
    found = ImageDataset(path, ignore_label=-7)[1]["label"]
    assert (found, found.dtype) == (-7, torch.int8)
    with pytest.raises(ValueError, match="ignore_label is 255; labels are int8, from -128 to 127"):
        ImageDataset(path, ignore_label=255)


@pytest.mark.parametrize("label", [2.0, "7", None, True, np.int64(3)])
def test_an_ignore_label_is_a_whole_number(sound_path: Path, label: Any) -> None:
    """Anything else is named."""
    with pytest.raises(ValueError, match=r"ignore_label is .*; it takes a whole number"):
        ImageDataset(sound_path, ignore_label=label)


def test_an_ignore_label_is_no_class(store_path: Path) -> None:
    """Placeholders would pass for samples of it, unless something else tells them apart."""
    classes = fastload.Store(store_path).classes or []
    assert classes
    for label, name in enumerate(classes):
        with pytest.raises(ValueError, match=f"ignore_label is {label}, which is the class '{name}'; take another"):
            ImageDataset(store_path, ignore_label=label)
        dataset = ImageDataset(store_path, ignore_label=label, return_valid=True, max_pixels=1)
        assert dataset[1][1:] == (label, False)
    assert ImageDataset(store_path, ignore_label=len(classes), max_pixels=1)[1][1] == len(classes)


def test_an_ignore_label_needs_labels_that_can_be_ignored(tmp_path: Path, sound_path: Path) -> None:
    """Real ones are NaN for placeholders; where there are none, a mask tells the placeholders. The default is no
    error."""
    (tmp_path / "list.txt").write_text(f"{sound_path.parent}/00.jpg 0.5\n{sound_path.parent}/01.jpg 2.5\n")
    fastload.pack(tmp_path / "list.txt", tmp_path / "real.lmdb")
    fastload.pack(Made(lambda i: {"image": photo(i), "text": str(i)}), tmp_path / "none.lmdb")
    for name, what in (("real", "labels are real numbers, NaN for placeholders"), ("none", "samples have no labels")):
        with pytest.raises(ValueError, match=f"ignore_label is 3, and the {what}; leave it out, return_valid=True"):
            ImageDataset(tmp_path / f"{name}.lmdb", ignore_label=3)
        assert len(ImageDataset(tmp_path / f"{name}.lmdb", ignore_label=-100))
    with pytest.raises(ValueError, match=r"ignore_label is .*; labels are int64"):
        ImageDataset(sound_path, ignore_label=1 << 63)


# --- which samples are valid

STRUCTURES: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
    "a tuple": (lambda i: (photo(i), i), lambda sample: sample[2]),
    "three": (lambda i: (photo(i), i, f"{i}"), lambda sample: sample[3]),
    "a list": (lambda i: [photo(i), i], lambda sample: sample[2]),
    "a dict": (lambda i: {"image": photo(i), "label": i}, lambda sample: sample["valid"]),
    "nested": (lambda i: {"of": {"valid": i, "image": photo(i)}}, lambda sample: sample["valid"]),
    "a picture": (photo, lambda sample: sample[1]),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("collate", ["ours", "torch's", "as_list", "pad"])
def test_each_sample_says_whether_it_is_valid(tmp_path: Path, structure: str, collate: str) -> None:
    """Behind the rest of whatever it consists of, alone and in batches; the rest is what it is without."""
    make, valid_of = STRUCTURES[structure]
    path = bad_one(tmp_path, make)
    dataset, without = ImageDataset(path, return_valid=True), ImageDataset(path)
    assert [valid_of(dataset[i]) for i in range(6)] == [True, False, True, True, True, True]
    assert type(valid_of(dataset[1])) is bool
    assert all(type(valid_of(sample)) is bool for sample in dataset.__getitems__([0, 1]))
    collate_fn = {"as_list": fastload.collate.as_list, "pad": fastload.collate.pad(sizes=True)}.get(collate)
    loader = TorchLoader if collate == "torch's" else DataLoader
    (batch,) = loader(dataset, 6, collate_fn=collate_fn)
    (plain,) = DataLoader(without, 6, collate_fn=collate_fn)
    valid = valid_of(batch)
    assert valid.dtype == torch.bool
    assert valid.tolist() == [True, False, True, True, True, True]
    if isinstance(batch, dict):
        del batch["valid"]
    else:
        batch = [part for part in batch if part is not valid]
        plain = [plain] if structure == "a picture" and collate != "pad" else plain
    assert flat(batch) == flat(plain)


def flat(value: Any) -> Any:
    """Nested batches as lists of numbers and texts."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_a_field_that_is_called_valid_is_in_the_way(tmp_path: Path) -> None:
    """Which is said, and what to do; without the option it is a field like others."""
    fastload.pack(Made(lambda i: {"image": photo(i), "valid": i}), tmp_path / "db.lmdb")
    with pytest.raises(
        ValueError, match="return_valid=True adds 'valid' to the samples, and they have a field of that"
    ):
        ImageDataset(tmp_path / "db.lmdb", return_valid=True)
    assert ImageDataset(tmp_path / "db.lmdb", None, lambda number: -number)[3]["valid"] == -3
    for taken in ({"tuple": ["image", "valid"]}, {"dict": [["valid", "image"]]}, "valid"):
        with pytest.raises(ValueError, match="pack with another name"):
            with_valid(taken)
    assert [*leaves(with_valid({"dict": [["image", "image"], [3, "valid.3"]]}))] == ["image", "valid.3", "valid"]


def test_masks_and_targets_go_with_it(tmp_path: Path) -> None:
    """A placeholder's mask is 255 as ever; a target transform works on the target, not on what says that it is one."""

    def pair(index: int) -> Any:
        return photo(index), Image.fromarray(picture(9, 11, seed=index)[..., 0] // 2).convert("P")

    path = bad_one(tmp_path, pair, "mask")
    image, mask, valid = ImageDataset(path, return_valid=True)[1]
    assert (valid, int(image.sum()), {*mask.flatten().tolist()}) == (False, 0, {255})
    changed = ImageDataset(path, None, lambda mask: mask.long(), return_valid=True)
    image, mask, valid = changed[2]
    assert (valid, mask.dtype) == (True, torch.int64)
    assert changed.fields == ("image", "mask", "valid")
    assert changed.show([0, 2]).size


def test_raw_images_and_caches_say_it_too(raw_store_path: Path, bad_path: Path) -> None:
    """The rows of a raw column can't fail; what a cache holds has not."""
    for transform in (None, Resize((8, 8))):
        batch = ImageDataset(raw_store_path, transform, return_valid=True).__getitems__(range(9))
        assert torch.as_tensor(batch.columns[2]).tolist() == [True] * 9
        assert [part.columns[2].tolist() for part in batch.split([4, 5])] == [[True] * 4, [True] * 5]  # type: ignore[union-attr]
    cached = ImageDataset(bad_path, SMALL, cache="1MB", return_valid=True)
    for _ in range(2):
        assert [valid for _, _, valid in cached.__getitems__([0, 1, 2])] == [True, False, True]


class Halved(ImageDataset):
    """A user's own way to read."""

    def __getitem__(self, index: int) -> Any:
        image, label, valid = super().__getitem__(index)
        return image // 2, label, valid


def test_a_subclass_gets_it(bad_path: Path) -> None:
    """Whose `__getitem__` calls the one below."""
    (batch,) = DataLoader(Halved(bad_path, SMALL, return_valid=True), COUNT, num_workers=1)
    assert batch[2].tolist() == [index not in BAD for index in range(COUNT)]


@pytest.mark.parametrize("resident", [False, True])
def test_make_loader_hands_it_on(tmp_path: Path, raw_store_path: Path, resident: bool) -> None:
    """Through threads and the prefetcher, or from where the whole set lies: a bool for each, of the same samples."""
    column = fastload.Store(raw_store_path).columns["image"]
    row = column[3].tobytes()
    (tmp_path / "bad.lmdb").write_bytes(raw_store_path.read_bytes().replace(row, bytes([row[0] ^ 1]) + row[1:]))
    dataset = ImageDataset(tmp_path / "bad.lmdb", return_valid=True, ignore_label=77)
    loader = fastload.make_loader(
        dataset, 16, train=False, device="cpu", device_resident=resident, mean=[0.5] * 3, std=[0.25] * 3
    )
    images, labels, valid = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert (images.dtype, valid.dtype) == (torch.float32, torch.bool)
    assert valid.tolist() == [index != 3 for index in range(40)]
    assert int(labels[3]) == 77
    skipping = ImageDataset(tmp_path / "bad.lmdb", return_valid=True, on_error="skip")
    batches = fastload.make_loader(skipping, 40, train=False, device="cpu", device_resident=resident)
    assert next(iter(batches))[2].all()


# --- resuming


@pytest.mark.parametrize("kind", OURS)
def test_a_resumed_run_goes_on_counting(kind: str, bad_path: Path) -> None:
    """Stopped in the middle, a fresh process's loader knows what has failed and why, and at the end all that is bad;
    `max_failures` holds for both parts together, though neither alone is beyond it."""

    def start(**options: Any) -> tuple[ImageDataset, Any]:
        dataset = ImageDataset(bad_path, SMALL, **options)
        return dataset, LOADERS[kind](dataset, 4, sampler=ShuffleSampler(dataset, seed=2))

    first, loader = start()
    batches = iter(loader)
    taken = [next(batches)[1] for _ in range(5)]
    state = json.loads(json.dumps(loader.state_dict()))
    end(batches)
    met = int(sum((labels == -100).sum() for labels in taken))
    assert 0 < met <= len(first.failures) < 12
    second, loader = start()
    loader.load_state_dict(state)
    restored = dict(second.failures)
    assert {*restored} <= {*first.failures} <= {*BAD}
    assert all("checksum mismatch" in reason for reason in restored.values())
    assert len(restored) >= met
    rest = [labels for _, labels in loader]
    assert int(sum((labels == -100).sum() for labels in rest)) == 12 - met
    assert list(second.failures) == BAD
    third, loader = start(max_failures=11)
    loader.load_state_dict(state)
    batches = iter(loader)
    with pytest.raises(TooManyFailures, match="12 samples failed, max_failures allows 11"):
        list(batches)
    end(batches)
    assert list(third.failures) == BAD


def test_a_prefetchers_state_has_the_failures_of_now(bad_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where the consumer is; what failed among the batches that were fetched ahead is bad all the same. They
    are put together when a state is asked for, not for each batch: there may be millions."""
    asked: list[Failures] = []
    state_dict = Failures.state_dict
    monkeypatch.setattr(Failures, "state_dict", lambda failures: asked.append(failures) or state_dict(failures))
    dataset = ImageDataset(bad_path, SMALL)
    batches = DevicePrefetcher(DataLoader(dataset, 4), "cpu")
    iterator = iter(batches)
    next(iterator)
    assert 1 in dataset.failures
    assert not asked
    state = batches.state_dict()
    assert asked == [dataset.failures]
    assert "failures" in state
    iterator.close()
    other = ImageDataset(bad_path, SMALL)
    resumed = DevicePrefetcher(DataLoader(other, 4), "cpu")
    resumed.load_state_dict(state)
    assert {1} <= {*other.failures} <= {*BAD}
    labels = [int(label) for _, labels in resumed for label in labels]
    assert labels == [-100 if index in BAD else index for index in range(4, COUNT)]
    assert list(other.failures) == BAD


def test_states_of_several_datasets(bad_path: Path, sound_path: Path) -> None:
    """Below Subset and ConcatDataset each keeps its own; the state passes through torch.save with weights_only."""

    def start() -> tuple[list[ImageDataset], DataLoader[Any]]:
        datasets = [ImageDataset(path, SMALL) for path in (sound_path, bad_path, bad_path)]
        parts = [datasets[0], Subset(datasets[1], [0, 1, 2]), Subset(datasets[2], [6, 7, 8])]
        return datasets, DataLoader(ConcatDataset(parts), 8)  # type: ignore[arg-type]

    datasets, loader = start()
    assert [len(labels) for _, labels in loader] == [8, 8, 8, 8, 8, 6]
    assert [list(dataset.failures) for dataset in datasets] == [[], [1], [7]]
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    others, resumed = start()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [dict(dataset.failures) for dataset in others] == [dict(dataset.failures) for dataset in datasets]
    assert resumed.state_dict() == loader.state_dict()


def test_states_without_failures_are_as_before(bad_path: Path, sound_path: Path) -> None:
    """Nothing is added where nothing failed, nor for other datasets; a state from before failures were kept loads."""
    loader = DataLoader(ImageDataset(sound_path, SMALL), 8, sampler=range(COUNT))
    list(loader)
    assert "failures" not in loader.state_dict()
    assert "failures" not in DataLoader(Made(lambda i: i), 2).state_dict()
    dataset = ImageDataset(bad_path, SMALL)
    loader = DataLoader(dataset, 8)
    next(iter(loader))
    state = loader.state_dict()
    failed = state.pop("failures")
    loader.load_state_dict(state)
    assert list(dataset.failures) == [1, 4, 7]
    assert loader.state_dict() == state | {"failures": failed}


def broken(state: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    (failed,) = state["failures"]
    yield [], "the failed samples of 0 datasets, this loader has 1"
    yield [failed, failed], "the failed samples of 2 datasets, this loader has 1"
    yield "failed", "the failed samples of 'failed' datasets"
    yield [None], "list of failed samples is damaged"
    yield [failed | {"samples": failed["samples"][:-8]}], "list of failed samples is damaged"
    yield [failed | {"reasons": [["1", 2]]}], "list of failed samples is damaged"


def test_a_damaged_state_is_refused_whole(bad_path: Path, sound_path: Path) -> None:
    """The loader and its dataset stay as they were."""
    dataset = ImageDataset(bad_path, SMALL)
    loader = DataLoader(dataset, 8)
    next(iter(loader))
    state = loader.state_dict()
    other = ImageDataset(sound_path, SMALL)
    fresh = DataLoader(other, 8)
    before = fresh.state_dict()
    for failed, message in broken(state):
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(before | {"failures": failed})
        assert fresh.state_dict() == before
        assert not other.failures
    with pytest.raises(ValueError, match="the failed samples of 1 datasets, this loader has 0"):
        DataLoader(Made(lambda i: i), 2).load_state_dict(state)
    with pytest.raises(ValueError, match="the state was made with another dataset"):
        DataLoader(Subset(other, [0, 1]), 8).load_state_dict(state)
    assert not other.failures
