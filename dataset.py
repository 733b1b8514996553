"""Read what data/prepare.py wrote: the record of a data set, its token files, and the batches of a training step.

A batch is a function of (seed, step) alone, so a run that is stopped and resumed sees what it would have seen anyway.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from config import UserError
from data.prepare import BUILT_IN, DATA
from tokenizer import Tokenizer, read_tokenizer

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, (B, T) int64


def read_meta(dataset: str) -> tuple[Path, dict]:
    """The folder and record (meta.json) of a prepared data set, by its name or by its folder's path."""
    folder = next((f for f in (Path(dataset), DATA / dataset) if (f / "meta.json").exists()), None)
    if folder is None:
        remedy = f"python data/prepare.py {Path(dataset).name}"
        remedy += "" if dataset in BUILT_IN else " --text FILE"
        raise UserError(f"no prepared data set {dataset!r}: make it with {remedy}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["dtype"] in ("uint16", "uint32")
        assert all(meta["splits"][split]["tokens"] > 0 for split in ("train", "val", "test"))
    except (ValueError, TypeError, KeyError, AssertionError):
        raise UserError(f"{folder}/meta.json is damaged: prepare the data again with --overwrite") from None
    return folder, meta


def prepared(dataset: str, *flags: str) -> tuple[Path, dict, Tokenizer]:
    """Folder, record and tokenizer; a data set that prepare.py knows by name is made first if need be, with `flags`."""
    if dataset in BUILT_IN and not (DATA / dataset / "meta.json").exists():
        line = " ".join(["python data/prepare.py", dataset, *flags])
        print(f"data set {dataset} is not prepared yet; doing it now: {line}", flush=True)
        # a process of its own, so that the peak memory of the training is the training's
        if code := subprocess.run([sys.executable, str(DATA / "prepare.py"), dataset, *flags]).returncode:
            sys.exit(code)  # it has said why
    folder, meta = read_meta(dataset)
    return folder, meta, read_tokenizer((folder / "tokenizer.model").read_bytes())


def open_split(folder: Path, meta: dict, split: str) -> np.ndarray:
    """The token file of a split as a read-only memory map, its size checked against the record."""
    path, dtype, count = folder / f"{split}.bin", np.dtype(meta["dtype"]), meta["splits"][split]["tokens"]
    size = path.stat().st_size if path.exists() else 0
    if size != count * dtype.itemsize:
        raise UserError(f"{path} has {size:,} bytes, not those of {count:,} tokens: prepare the data with --overwrite")
    return np.memmap(path, dtype=dtype, mode="r")


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, blocks: int, block_size: int) -> tuple[int, np.ndarray]:
    """Where the first block of an epoch begins, below block_size, and the order in which its blocks come."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(block_size)), rng.permutation(blocks)


def step_batches(
    tokens: np.ndarray, block_size: int, batch_size: int, grad_accum: int, seed: int, step: int
) -> list[Batch]:
    """The `grad_accum` micro-batches of a step, each of `batch_size` blocks.

    An epoch shows every block of the text once; each epoch cuts the text at other places.
    """
    blocks, rows, windows = (len(tokens) - block_size) // block_size, batch_size * grad_accum, []
    for number in range(step * rows, (step + 1) * rows):
        offset, order = epoch_order(seed, number // blocks, blocks, block_size)
        start = offset + int(order[number % blocks]) * block_size
        windows.append(tokens[start : start + block_size + 1])
    data = torch.from_numpy(np.stack(windows).astype(np.int64))
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in data.split(batch_size)]
