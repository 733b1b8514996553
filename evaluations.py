"""Measure groupings of a model's heads: loss and KL divergence, each computed once and kept in a JSONL file."""

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import replacing
from config import UserError
from eval_ppl import MOST_LOGITS
from merging import Maps, Statistics, convert, merged_config, rope_of
from model import Llama, widen
from refit import refit

MOST_CONTEXT = 1024  # tokens; predictions far into longer contexts would need much memory, and change few choices


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


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """What a search's JSONL says of its model and settings, and its evaluations. Raises UserError for other files."""
    try:
        lines = path.read_text().splitlines()
        if not lines[-1].endswith("}"):  # of an interrupted search it may be half written
            lines.pop()
        header, *records = map(json.loads, lines)
        assert "model" in header and all({"k_groups", "v_groups", "loss", "kl"} <= set(r) for r in records)
    except (OSError, ValueError, IndexError, TypeError, AssertionError):
        raise UserError(f"{path} is no log of search_groups.py: give another --log, or delete it") from None
    return header, records


class Evaluations:
    """Groupings and what they measured, each computed once and kept in a JSONL file."""

    def __init__(
        self, path: Path, identity: dict, original: Llama, found: list[Statistics], blocks: torch.Tensor, judge: Judge,
        how: str, itemsize: int,
    ):  # fmt: skip
        self.original, self.found, self.blocks, self.judge = original, found, blocks, judge
        self.how, self.itemsize = how, itemsize  # of refitting; bytes of a number in the cache
        header, records = read_log(path) if path.exists() and path.stat().st_size else (identity, [])
        if header != identity:
            raise UserError(f"{path} is of another model, text or settings: give another --log, or delete it")
        self.records = {self.key(r["k_groups"], r["v_groups"]): r for r in records}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in [identity, *records])
        self.file = open(path, "a")  # noqa: SIM115

    @staticmethod
    def key(k_groups: Maps, v_groups: Maps) -> str:
        return json.dumps([k_groups, v_groups])

    def sizes(self, k_groups: Maps, v_groups: Maps) -> dict:
        """groups: the number of K/V heads, that is half of all K and V groups; kv_bytes: of the cache of a token."""
        c = merged_config(self.original.config, k_groups, v_groups)
        return {"groups": c.kv_numbers_per_token / c.head_dim / 2, "kv_bytes": c.kv_numbers_per_token * self.itemsize}

    def __call__(self, k_groups: Maps, v_groups: Maps, note: str = "") -> dict:
        key = self.key(k_groups, v_groups)
        if key not in self.records:
            began = time.perf_counter()
            model = grouped(self.original, k_groups, v_groups, self.found, self.blocks, self.how)
            loss, divergence = self.judge(model)
            record = {"note": note, "loss": loss, "kl": divergence, **self.sizes(k_groups, v_groups)}
            record |= {"seconds": time.perf_counter() - began, "k_groups": k_groups, "v_groups": v_groups}
            self.records[key] = record
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        return self.records[key]


def grouped(original: Llama, k_groups: Maps, v_groups: Maps, found: list[Statistics], blocks, how: str) -> Llama:
    """The model with these groups, merged and refitted."""
    model = convert(original, k_groups, v_groups, found)
    if how != "none":
        refit(model, original, blocks, rope_of(original, blocks), attention=how == "all")
    return model
