"""Read what data/prepare.py wrote: the record of a data set, its token files, and the batches of a training step.

A batch is a function of (seed, step) alone, so a run that is stopped and resumed sees what it would have seen anyway.

Text is cut into blocks of equal length. Examples of instruction data are rows of their own, padded behind to the length
of the longest of their micro-batch, which has examples of like length. So no example sees another, no attention
needs a mask, and little is computed for nothing.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from config import UserError
from cross_entropy import IGNORE
from data.prepare import BUILT_IN, DATA
from files import sha256_of
from tokenizer import Tokenizer, read_tokenizer

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, (B, T) int64


def read_meta(dataset: str) -> tuple[Path, dict]:
    """The folder and record (meta.json) of a prepared data set, by its name or by its folder's path."""
    folder = next((f for f in (Path(dataset), DATA / dataset) if (f / "meta.json").exists()), None)
    if folder is None:
        remedy = f"python data/prepare.py {Path(dataset).name}"
        remedy += " --tokenizer CKPT" if dataset in ("docstrings", "alpaca") else ""
        remedy += "" if dataset in BUILT_IN else " --text FILE, or --from RECORDS.json"
        raise UserError(f"no prepared data set {dataset!r}: make it with {remedy}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["dtype"] in ("uint16", "uint32")
        counts = [meta["splits"][split]["tokens"] for split in ("train", "val", "test")]
        assert all(type(count) is int and count > 0 for count in counts)
        assert all(isinstance(meta["splits"][split]["sha256"], str) for split in ("train", "val", "test"))
        assert hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest() == meta["tokenizer_sha256"]
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError, FileNotFoundError):
        raise UserError(
            f"{folder}: meta.json or tokenizer.model is damaged: prepare the data again with --overwrite"
        ) from None
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
    """The token file of a split as a read-only memory map. Raises UserError if it is not as it was prepared."""
    path, dtype, count = folder / f"{split}.bin", np.dtype(meta["dtype"]), meta["splits"][split]["tokens"]
    size = path.stat().st_size if path.exists() else 0
    if size != count * dtype.itemsize:
        raise UserError(f"{path} has {size:,} bytes, not those of {count:,} tokens: prepare the data with --overwrite")
    check_unchanged(path, meta["splits"][split]["sha256"])
    return np.memmap(path, dtype=dtype, mode="r")


def check_unchanged(path: Path, sha256: str | None) -> None:
    """Raise UserError if a file has other bytes than its record says; older records do not say it of all."""
    if not path.exists() or (sha256 is not None and sha256_of(path) != sha256):
        raise UserError(f"{path} is missing, or has changed since it was prepared: prepare the data with --overwrite")


class Text:
    """A split of text: one long row of tokens."""

    def __init__(self, folder: Path, meta: dict, split: str, block_size: int):
        self.tokens, self.block_size = open_split(folder, meta, split), block_size

    def step_batches(self, batch_size: int, grad_accum: int, seed: int, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        return step_batches(self.tokens, self.block_size, batch_size, grad_accum, seed, step)


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


def padded(examples: list[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Prompts and answers -> inputs, padded behind with token 0, and targets, IGNORE in prompts and padding.

    Rows have a multiple of 16 tokens: for every new shape a CPU's library of products makes and keeps a kernel.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in examples) - 1
    x = torch.zeros(len(examples), 16 * -(-longest // 16), dtype=torch.int64)
    y = torch.full_like(x, IGNORE)
    for row, (prompt, answer) in enumerate(examples):
        ids = torch.tensor([*prompt, *answer])
        x[row, : len(ids) - 1] = ids[:-1]
        y[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return x, y


class Examples:
    """A split of instruction data: a row for each example, of which the answer alone carries loss.

    Examples longer than block_size are left out, never cut; `note` says how many.
    """

    def __init__(self, folder: Path, meta: dict, split: str, block_size: int):
        self.tokens, path = open_split(folder, meta, split), folder / f"{split}.mask"
        record = meta["splits"][split]
        check_unchanged(path, record.get("mask_sha256"))
        self.mask = np.memmap(path, dtype=np.uint8, mode="r")
        ends = np.flatnonzero(self.mask & np.append(self.mask[1:] == 0, True)) + 1  # an answer ends its example
        if len(ends) != record.get("documents") or int(self.mask.sum()) != record.get("answer_tokens"):
            raise UserError(f"{path} is damaged: prepare the data with --overwrite")
        starts = np.append(0, ends[:-1])
        fits = ends - starts - 1 <= block_size  # the last token is no input
        self.spans, longest = np.stack((starts, ends), axis=1)[fits], int((ends - starts).max()) - 1
        out = f"{(~fits).sum()} of {len(fits)} {split} examples are left out: longer than block_size {block_size}"
        self.note = "" if fits.all() else f"{out}; --block_size {longest} would take them all"
        if not fits.any():
            raise UserError(f"{folder}: {out}; give --block_size {longest}")

    def parts(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and answer of an example."""
        start, end = self.spans[row]
        middle = end - int(self.mask[start:end].sum())
        return self.tokens[start:middle], self.tokens[middle:end]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The micro-batch of these examples."""
        return padded([self.parts(row) for row in rows])

    @lru_cache(maxsize=2)  # noqa: B019
    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The rows of each micro-batch of an epoch, which has every example once: chance puts 64 micro-batches' worth
        of them together, these are sorted by length and cut, and chance orders the micro-batches."""
        rng, cut = np.random.default_rng((seed, epoch)), []
        lengths = self.spans[:, 1] - self.spans[:, 0]
        order = rng.permutation(len(self.spans))
        for start in range(0, len(order), 64 * batch_size):
            pool = order[start : start + 64 * batch_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            cut += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        return [cut[i] for i in rng.permutation(len(cut))]

    def step_batches(self, batch_size: int, grad_accum: int, seed: int, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        count = -(-len(self.spans) // batch_size)
        numbers = range(step * grad_accum, (step + 1) * grad_accum)
        return [self.batch(self.epoch(batch_size, seed, n // count)[n % count]) for n in numbers]


def open_data(folder: Path, meta: dict, split: str, block_size: int) -> Text | Examples:
    """A split of either kind."""
    return (Examples if meta.get("kind") == "instructions" else Text)(folder, meta, split, block_size)
