"""Measure groupings of a model's heads: loss and KL divergence, each computed once and kept in a JSONL file."""

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import UserError
from cross_entropy import widen
from eval_ppl import MOST_LOGITS
from files import replacing
from merging import Maps, Statistics, convert, merged_config, rope_of
from model import Llama, ModelConfig
from parallel import gathered, rank, world
from refit import refit

MOST_CONTEXT = 1024  # tokens; predictions far into longer contexts would need much memory, and change few choices
IDENTITY = {  # what a log's header says, and what another value of it means
    "model": "another model",
    "text": "other text (--dataset, --seed, --calibration_tokens or --search_tokens)",
    "refit": "another --refit",
}


class Judge:
    """Measures models on some text: mean loss, and mean KL divergence from the original's predictions, nats a token."""

    def __init__(self, original: Llama, tokens: np.ndarray):
        T, V = min(original.config.block_size, MOST_CONTEXT), original.config.vocab_size
        rows = (len(tokens) - 1) // T
        blocks = np.stack([tokens[i * T : (i + 1) * T + 1] for i in range(rows)]).astype(np.int64)
        device = original.tok_embeddings.weight.device
        self.parts = torch.from_numpy(blocks).to(device).split(max(1, min(16, MOST_LOGITS // (4 * T * V))))
        self.count, self.original = rows * T, original
        self.hidden = [self.last_hidden(original, part[:, :-1]) for part in self.parts]  # logits would be V / C larger

    @staticmethod
    @torch.no_grad()
    def last_hidden(model: Llama, x: torch.Tensor) -> torch.Tensor:
        rope, h = rope_of(model, x), model.tok_embeddings(x)
        for layer in model.layers:
            h = layer(h, *rope)
        return model.norm(h)

    @torch.no_grad()
    def __call__(self, model: Llama) -> tuple[float, float]:
        loss = divergence = 0.0
        for part, hidden in zip(self.parts, self.hidden):
            ours = widen(model(part[:, :-1])).log_softmax(-1).flatten(0, 1)
            theirs = widen(self.original.output(hidden)).log_softmax(-1).flatten(0, 1)
            loss += F.nll_loss(ours, part[:, 1:].flatten(), reduction="sum").item()
            divergence += F.kl_div(ours, theirs, log_target=True, reduction="sum").item()
        return loss / self.count, max(0.0, divergence / self.count)


def read_log(path: Path, c: ModelConfig, identity: dict) -> list[dict]:
    """The evaluations in a search's JSONL. Raises UserError for other files, and if its header does not say what
    `identity` does."""
    try:
        header, *lines = (text := path.read_text()).splitlines()
        header = json.loads(header)
        other = [key for key in IDENTITY if header[key] != identity.get(key, header[key])]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        missing = "no such log; python search_groups.py writes one"
        raise UserError(
            f"{path} is no log of search_groups.py: give another --log" if path.exists() else f"{path}: {missing}"
        ) from None
    if other:
        raise UserError(
            f"{path} is of {' and '.join(map(IDENTITY.get, other))}: give the same, or another --log, or delete it"
        )
    try:
        # the last line of an interrupted search may be half written
        records = [json.loads(line) for line in (lines if text.endswith("\n") else lines[:-1])]
        damaged = not all(sound(record, c) for record in records)
    except (ValueError, TypeError, KeyError, RecursionError):
        damaged = True
    if damaged:
        raise UserError(f"{path} is a damaged log of search_groups.py: give another --log, or delete it")
    return records


def sound(record: dict, c: ModelConfig) -> bool:
    """Whether it says what was measured of groups of such a model."""
    maps = [of_head for kind in ("k_groups", "v_groups") for of_head in record[kind]]
    shape = len(maps) == 2 * c.n_layer and all(len(of_head) == c.n_head for of_head in maps)
    measured = math.isfinite(record["loss"]) and math.isfinite(record["kl"]) and isinstance(record["note"], str)
    return shape and measured and all(type(g) is int and 0 <= g < c.n_head for of_head in maps for g in of_head)


class Evaluations:
    """Groupings and what they measured, each computed once and kept in a JSONL file."""

    def __init__(
        self, path: Path, identity: dict, original: Llama, found: list[Statistics], blocks: torch.Tensor, judge: Judge,
        how: str, itemsize: int,
    ):  # fmt: skip
        self.original, self.found, self.blocks, self.judge = original, found, blocks, judge
        self.how, self.itemsize = how, itemsize  # of refitting; bytes of a number in the cache
        old = path.exists() and path.stat().st_size > 0
        records = read_log(path, original.config, identity) if old else []
        # of all processes: another search may have been writing while they read
        self.records = gathered({self.key(r["k_groups"], r["v_groups"]): r for r in records})
        self.known = len(self.records)
        path.parent.mkdir(parents=True, exist_ok=True)
        if rank() == 0 and (
            not old or not path.read_bytes().endswith(b"\n")
        ):  # else another search may be writing to it
            with replacing(path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in [identity, *records])
        self.file = open(os.devnull if rank() else path, "a")  # noqa: SIM115

    @staticmethod
    def key(k_groups: Maps, v_groups: Maps) -> str:
        return json.dumps([k_groups, v_groups])

    def sizes(self, k_groups: Maps, v_groups: Maps) -> dict:
        """groups: the number of K/V heads, that is half of all K and V groups; kv_bytes: of the cache of a token."""
        c = merged_config(self.original.config, k_groups, v_groups)
        return {"groups": c.kv_numbers_per_token / c.head_dim / 2, "kv_bytes": c.kv_numbers_per_token * self.itemsize}

    def __call__(self, asked: list[tuple[tuple[Maps, Maps], str]]) -> list[dict]:
        """The records of groupings, each with a note; those that are new are measured now, divided among processes."""
        new = {self.key(*maps): (maps, note) for maps, note in asked if self.key(*maps) not in self.records}
        mine = {key: self.measure(*new[key]) for key in list(new)[rank() :: world()]}
        found = gathered(mine)
        for key in new:
            self.records[key] = found[key]
            self.file.write(json.dumps(found[key]) + "\n")
            self.file.flush()
        return [self.records[self.key(*maps)] for maps, _ in asked]

    def measure(self, maps: tuple[Maps, Maps], note: str) -> dict:
        began = time.perf_counter()
        loss, divergence = self.judge(grouped(self.original, *maps, self.found, self.blocks, self.how))
        record = {"note": note, "loss": loss, "kl": divergence, **self.sizes(*maps)}
        return record | {"seconds": time.perf_counter() - began, "k_groups": maps[0], "v_groups": maps[1]}


def grouped(original: Llama, k_groups: Maps, v_groups: Maps, found: list[Statistics], blocks, how: str) -> Llama:
    """The model with these groups, merged and refitted."""
    model = convert(original, k_groups, v_groups, found)
    if how != "none":
        refit(model, original, blocks, rope_of(original, blocks), attention=how == "all")
    return model
