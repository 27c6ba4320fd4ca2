"""An image data loader for PyTorch that keeps the accelerator fed. README.md is the tour, `errors` the errors."""

from . import errors, pictures, transforms
from .batch import Batch, collate
from .buckets import BucketSampler
from .cache import ImageCache
from .dataset import ImageDataset
from .errors import FastloadError
from .factory import make_loader
from .loader import DataLoader
from .memory import estimate_memory, find_batch_size
from .monitor import Monitor
from .pack import PackReport, pack, pack_splits
from .prefetch import DevicePrefetcher
from .sampler import ShuffleSampler
from .samples import EncodedImage
from .stats import statistics
from .store import Record, Store

__all__ = [
    "Batch",
    "BucketSampler",
    "DataLoader",
    "DevicePrefetcher",
    "EncodedImage",
    "FastloadError",
    "ImageCache",
    "ImageDataset",
    "Monitor",
    "PackReport",
    "Record",
    "ShuffleSampler",
    "Store",
    "collate",
    "errors",
    "estimate_memory",
    "find_batch_size",
    "make_loader",
    "pack",
    "pack_splits",
    "pictures",
    "statistics",
    "transforms",
]
