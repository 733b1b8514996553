"""Read what data/prepare.py wrote: the record of a data set, its token files, the batches of a training step.

A batch is a function of (seed, step), so a resumed run reads what an uninterrupted one would have read. Text
is cut into blocks of equal length. Examples of instruction data are rows, padded to the longest of their
batch, which has examples of similar length: no example sees another, and attention needs no mask.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common import IGNORE, UserError, sha256_of
from data.tokenizer import Tokenizer, read_tokenizer

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, (B, T) int64
DATA = Path(__file__).resolve().parent  # NAME is prepared in DATA / NAME
BUILT_IN = ("stdlib", "docstrings", "shakespeare", "wikitext2", "tinystories", "alpaca")
SPLITS = ("train", "val", "test")


def read_meta(dataset: str) -> tuple[Path, dict]:
    """The folder and record (meta.json) of a prepared data set, by its name or its folder's path."""
    folder = next((f for f in (Path(dataset), DATA / dataset) if (f / "meta.json").exists()), None)
    if folder is None:
        how = Path(dataset).name + ("" if dataset in BUILT_IN else " --text FILE, or --from RECORDS.json")
        raise UserError(f"no prepared data set {dataset!r}: make it with python data/prepare.py {how}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        check_unchanged(folder / "tokenizer.model", meta["tokenizer_sha256"])
        for split in SPLITS:
            size = meta["splits"][split]["tokens"] * {"uint16": 2, "uint32": 4}[meta["dtype"]]
            if size != (folder / f"{split}.bin").stat().st_size:
                raise ValueError(f"{split}.bin has another size")
    except Exception as error:
        reason = str(error)[:150]
        raise UserError(f"{folder} is damaged ({reason}): prepare it again with --overwrite") from None
    return folder, meta


def prepared(dataset: str, *flags: str) -> tuple[Path, dict, Tokenizer]:
    """Folder, record and tokenizer. A built-in data set is prepared first if need be, with `flags`."""
    if dataset in BUILT_IN and not (DATA / dataset / "meta.json").exists():
        print(f"preparing the data: python data/prepare.py {' '.join([dataset, *flags])}", flush=True)
        # a process of its own, so that the peak memory of the training is the training's
        done = subprocess.run([sys.executable, str(DATA / "prepare.py"), dataset, *flags])
        if done.returncode:
            sys.exit(done.returncode)  # it has printed the reason
    folder, meta = read_meta(dataset)
    return folder, meta, read_tokenizer((folder / "tokenizer.model").read_bytes())


def check_unchanged(path: Path, sha256: str) -> None:
    """Raise UserError if a file is not as it was prepared."""
    if not path.exists() or sha256_of(path) != sha256:
        raise UserError(f"{path} is missing or damaged: prepare the data again with --overwrite")


def open_split(folder: Path, meta: dict, split: str) -> np.ndarray:
    """The tokens of a split, a read-only memory map. Raises UserError if they have changed."""
    check_unchanged(folder / f"{split}.bin", meta["splits"][split].get("sha256"))
    return np.memmap(folder / f"{split}.bin", meta["dtype"], "r")


class Text:
    """A split of text: one long row of tokens."""

    def __init__(self, folder: Path, meta: dict, split: str, block_size: int):
        self.tokens, self.block_size = open_split(folder, meta, split), block_size

    def step_batches(self, batch_size: int, grad_accum: int, seed: int, step: int) -> list[Batch]:
        return step_batches(self.tokens, self.block_size, batch_size, grad_accum, seed, step)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, blocks: int, block_size: int) -> tuple[int, np.ndarray]:
    """Where the first block of an epoch begins, below block_size, and the order of its blocks."""
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
    """Prompts and answers -> inputs, padded behind with 0, and targets, IGNORE in prompts and padding.

    Rows have a multiple of 16 tokens: for every new shape a CPU's library of products keeps a kernel.
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
    """A split of instruction data: a row per example, with loss on the answer only.

    Examples longer than block_size are left out, never cut; `note` counts them.
    """

    def __init__(self, folder: Path, meta: dict, split: str, block_size: int):
        path = folder / f"{split}.mask"
        check_unchanged(path, meta["splits"][split].get("mask_sha256"))
        self.tokens, self.mask = open_split(folder, meta, split), np.memmap(path, np.uint8, "r")
        ends = np.flatnonzero(self.mask & np.append(self.mask[1:] == 0, True)) + 1  # behind each answer
        starts = np.append(0, ends[:-1])
        lengths = ends - starts - 1  # the last token is no input
        fits = lengths <= block_size
        self.spans, self.note = np.stack((starts, ends), axis=1)[fits], ""
        if not fits.all():
            out = f"{(~fits).sum()} of {len(fits)} {split} examples are left out: longer than block_size"
            self.note = f"{out} {block_size}; --block_size {lengths.max()} takes them all"
        if not fits.any():
            raise UserError(f"{folder}: {self.note}")

    def parts(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and answer of an example."""
        start, end = self.spans[row]
        middle = end - int(self.mask[start:end].sum())
        return self.tokens[start:middle], self.tokens[middle:end]

    def batch(self, rows: Sequence[int]) -> Batch:
        return padded([self.parts(row) for row in rows])

    @lru_cache(maxsize=2)  # noqa: B019
    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The rows of each micro-batch: shuffle, sort pools of 64 batches by length, cut, shuffle."""
        rng, batches = np.random.default_rng((seed, epoch)), []
        lengths = np.diff(self.spans)[:, 0]
        order = rng.permutation(len(self.spans))
        for start in range(0, len(order), 64 * batch_size):
            pool = order[start : start + 64 * batch_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def step_batches(self, batch_size: int, grad_accum: int, seed: int, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        count = -(-len(self.spans) // batch_size)
        numbers = range(step * grad_accum, (step + 1) * grad_accum)
        return [self.batch(self.epoch(batch_size, seed, n // count)[n % count]) for n in numbers]


def open_data(folder: Path, meta: dict, split: str, block_size: int) -> Text | Examples:
    """A split of either kind."""
    return (Examples if meta.get("kind") == "instructions" else Text)(folder, meta, split, block_size)
