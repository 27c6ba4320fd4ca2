"""torchrun and DistributedDataParallel: `with_torchrun.py STORE OUT` trains, and saves the loaders' states in between.

`with_torchrun.py STORE OUT resume` goes on from them, with any number of ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diary import Diary, dataset_of, model
from torch.nn.parallel import DistributedDataParallel

import fastload

EPOCHS = 3
STOP = (1, 3)  # the epoch, and its batches before the state is saved
KINDS = ("made", "threads", "processes")


def loader_of(store: str, kind: str) -> Any:
    """Loaders that share out by themselves and have a state."""
    dataset = dataset_of(store)
    if kind == "made":
        return fastload.make_loader(dataset, 4, train=True, device="cpu", num_workers=2)
    worker_type: Any = "thread" if kind == "threads" else "process"
    sampler = fastload.ShuffleSampler(dataset)
    return fastload.DataLoader(dataset, 4, sampler=sampler, num_workers=1, worker_type=worker_type)


def train(store: str, out: Path, diary: Diary, kind: str, start: int = 0) -> None:
    """Epochs as anybody writes them; from epoch `start` on, from the state that was saved in it."""
    loader = loader_of(store, kind)
    file = out / f"{kind}.state"
    if start:
        loader.load_state_dict(json.loads(file.read_text()))
    network = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for epoch in range(start, EPOCHS):
        for count, batch in enumerate(loader, 1):
            loss = network(diary.add(kind, epoch, batch)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not start and (epoch, count) == STOP:
                diary.facts[kind] = loader.state_dict()
                if torch.distributed.get_rank() == 0:
                    file.write_text(json.dumps(diary.facts[kind]))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    diary = Diary()
    folder = Path(sys.argv[2])
    for kind in KINDS:
        train(sys.argv[1], folder, diary, kind, start=STOP[0] if sys.argv[3:] else 0)
    diary.write(folder / "resumed" if sys.argv[3:] else folder)
    torch.distributed.destroy_process_group()
