"""Read what data/prepare.py wrote: the record of a data set, its tokens, the batches of a training step.

A batch is a function of (seed, step), so a resumed run reads what an uninterrupted one would have read.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from common import IGNORE, UserError, note, require, sha256_of
from data.tokenizer import Tokenizer, read_tokenizer

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, (B, T) int64
DATA = Path(__file__).resolve().parent  # NAME is prepared in DATA / NAME
BUILT_IN = ("stdlib", "docstrings", "shakespeare", "wikitext2", "tinystories", "alpaca")
SPLITS = ("train", "val", "test")


def read_meta(dataset: str) -> tuple[Path, dict]:
    """The folder and record (meta.json) of a prepared data set, by its name or its folder's path."""
    folder = next((f for f in (Path(dataset), DATA / dataset) if (f / "meta.json").exists()), None)
    how = Path(dataset).name + ("" if dataset in BUILT_IN else " --text FILE, or --from RECORDS.json")
    require(folder is not None, f"no data set {dataset!r}: prepare it, python data/prepare.py {how}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        require(meta["kind"] in ("text", "instructions"), "a kind that this version does not have")
        for split in SPLITS:
            size = meta["splits"][split]["tokens"] * {"uint16": 2, "uint32": 4}[meta["dtype"]]
            require(size == (folder / f"{split}.bin").stat().st_size, f"{split}.bin has another size")
    except Exception as error:
        raise UserError(f"{folder} is damaged ({error!s:.150}): prepare it again with --overwrite") from None
    check_unchanged(folder / "tokenizer.model", meta.get("tokenizer_sha256"))
    return folder, meta


def prepared(dataset: str, *flags: str) -> tuple[Path, dict, Tokenizer]:
    """Folder, record and tokenizer. A built-in data set is prepared first if need be, by another process,
    so that the peak memory of the training is the training's."""
    if dataset in BUILT_IN and not any(Path(f, dataset, "meta.json").exists() for f in (".", DATA)):
        print(f"preparing the data: python data/prepare.py {' '.join([dataset, *flags])}", flush=True)
        if code := subprocess.call([sys.executable, str(DATA / "prepare.py"), dataset, *flags]):
            sys.exit(code)  # it has printed the reason
    folder, meta = read_meta(dataset)
    if dataset in BUILT_IN and not flags and isinstance(meta.get("tokenizer"), str):
        note(f"{folder} has the tokenizer of {meta['tokenizer']}: for its own, prepare it with --overwrite")
    return folder, meta, read_tokenizer((folder / "tokenizer.model").read_bytes())


def check_unchanged(path: Path, sha256: str) -> None:
    """Raise UserError if a file is not as it was prepared."""
    require(path.exists() and sha256_of(path) == sha256, f"{path} is damaged: prepare it with --overwrite")


def open_split(folder: Path, meta: dict, split: str) -> np.ndarray:
    """The tokens of a split, a read-only memory map. Raises UserError if they have changed."""
    check_unchanged(folder / f"{split}.bin", meta["splits"][split].get("sha256"))
    return np.memmap(folder / f"{split}.bin", meta["dtype"], "r")


@lru_cache(maxsize=2)
def epoch_starts(seed: int, epoch: int, blocks: int, block_size: int) -> np.ndarray:
    """(blocks,) where an epoch's blocks begin, in their order. Each epoch cuts the text at other places."""
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(block_size) + block_size * rng.permutation(blocks)


class Text:
    """A split of text: one long row of tokens."""

    def __init__(self, folder: Path, meta: dict, split: str, block_size: int):
        self.tokens, self.block_size = open_split(folder, meta, split), block_size

    def step_batches(self, batch_size: int, grad_accum: int, seed: int, step: int) -> list[Batch]:
        """The `grad_accum` micro-batches of a step, of `batch_size` blocks. An epoch has each block once."""
        T, rows = self.block_size, batch_size * grad_accum
        blocks, numbers = (len(self.tokens) - T) // T, range(step * rows, (step + 1) * rows)
        starts = [epoch_starts(seed, n // blocks, blocks, T)[n % blocks] for n in numbers]
        data = torch.from_numpy(np.stack([self.tokens[s : s + T + 1] for s in starts]).astype(np.int64))
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in data.split(batch_size)]

    def steps_per_epoch(self, rows: int) -> float:
        """Steps of `rows` blocks in an epoch."""
        return (len(self.tokens) - self.block_size) // self.block_size / rows

    def some(self, about: int) -> list[tuple]:
        """Blocks of about so many tokens, evenly spread, each as a prompt of one token and an answer."""
        T, size = self.block_size, len(self.tokens)
        starts = range(0, size - 1, max(T, T * size // about))
        return [(self.tokens[at : at + 1], self.tokens[at + 1 : at + T + 1]) for at in starts]


def padded(examples: list[tuple]) -> Batch:
    """Prompts and answers -> inputs, padded behind with 0, and targets, IGNORE in prompts and padding."""
    width = max(len(prompt) + len(answer) for prompt, answer in examples) - 1
    width += -width % 16  # few widths: a CPU's library of products keeps a kernel for every shape
    x = [[*prompt, *answer[:-1], *[0] * width][:width] for prompt, answer in examples]
    y = [[*[IGNORE] * (len(prompt) - 1), *answer, *[IGNORE] * width][:width] for prompt, answer in examples]
    return torch.tensor(x, dtype=torch.int64), torch.tensor(y, dtype=torch.int64)


class Examples:
    """A split of instruction data: a padded row per example, which sees no other, with loss on the answer.
    Examples longer than block_size are left out, never cut."""

    def __init__(self, folder: Path, meta: dict, split: str, block_size: int):
        path = folder / f"{split}.mask"
        check_unchanged(path, meta["splits"][split].get("mask_sha256"))
        self.tokens, mask = open_split(folder, meta, split), np.fromfile(path, np.uint8)
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))  # where each answer begins and ends
        spans = np.stack((np.append(0, edges[1:-1:2]), edges[::2], edges[1::2]), axis=1)
        lengths = spans[:, 2] - spans[:, 0] - 1  # the last token is no input
        fits = lengths <= block_size
        left = f"{sum(~fits)} of {len(fits)} {split} examples left out: longer than block_size {block_size}"
        require(fits.any(), f"{folder}: {left}")
        self.spans, self.lengths = spans[fits], lengths[fits]
        if not fits.all():
            note(left)

    def parts(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and answer of an example."""
        start, answer, end = self.spans[row]
        return self.tokens[start:answer], self.tokens[answer:end]

    def steps_per_epoch(self, rows: int) -> int:
        """Steps of up to `rows` examples in an epoch; one may be shorter."""
        return -(-len(self.spans) // rows)

    def some(self, about: int) -> list[tuple]:
        """Prompts and answers of about so many tokens, evenly spread; then by length, for little padding."""
        n = len(self.spans)
        count = max(1, min(n, round(n * about / int(self.lengths.sum()))))
        rows = (n * i // count for i in range(count))
        return [self.parts(row) for row in sorted(rows, key=self.lengths.__getitem__)]

    @lru_cache(maxsize=2)  # noqa: B019
    def epoch(self, rows: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The rows of each step: shuffle, sort pools of 64 steps by length, cut, shuffle."""
        rng = np.random.default_rng((seed, epoch))
        order, pools = rng.permutation(len(self.spans)), np.arange(len(self.spans)) // (64 * rows)
        order = order[np.lexsort((self.lengths[order], pools))]  # by pool, then by length
        steps = np.split(order, range(rows, len(order), rows))
        return [steps[i] for i in rng.permutation(len(steps))]

    def step_batches(self, batch_size: int, grad_accum: int, seed: int, step: int) -> list[Batch]:
        """The micro-batches of a step, at most `grad_accum`, each of up to `batch_size` examples."""
        rows = batch_size * grad_accum
        epoch, place = divmod(step, self.steps_per_epoch(rows))
        examples = [self.parts(row) for row in self.epoch(rows, seed, epoch)[place]]
        return [padded(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]
