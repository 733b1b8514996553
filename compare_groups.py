"""What each step of gqa.py is worth: a table of perplexities, as ratios to the original's, for each share of the cache.

    python search_groups.py ckpt.pt --kv_budget 0.5 --out groups.json         # leaves groups.jsonl
    python compare_groups.py ckpt.pt --log groups.jsonl

First what others do, and groups chosen or merged better than that, with one map for K and V; from "K and V apart" on
each row adds to the one above it. The knapsack's row needs the log of a search by knapsack, for what it measured of
each layer. Calibrated on the train split, judged on the test split; no training. A cell is the mean over seeds of
calibration text, which are those of the random groups, too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, exit_cleanly, parse
from eval_ppl import split_tokens
from evaluations import grouped, read_log
from gqa import Partitioner, calibration_blocks, open_model, perplexity_on, predictions
from merging import Maps, convert, statistics
from model import Llama
from partition import knapsack
from search_groups import fingerprint
from tokenizer import read_tokenizer

SHARES = (3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 8)


@dataclass
class CompareConfig:
    """comparison"""

    ckpt: str  # the checkpoint
    log: str | None = None  # the JSONL of a search of it (default: no row for the knapsack)
    shares: list[float] | None = None  # of the KV cache to keep (default: those of 3/4 2/3 1/2 1/3 1/4 1/8 there are)
    seeds: int = 3  # calibration texts
    calibration_tokens: int = 65536  # at most, of the train split
    eval_tokens: int = 32768  # of the test split
    dataset: str | None = None  # prepared data of the same tokenizer (default: the checkpoint's own)
    device: str = "auto"  # cuda, mps, cpu or auto

    def __post_init__(self):
        for name in ("seeds", "calibration_tokens", "eval_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give --{name} 1 or more")


def sensitivities(log: Path, model: Llama) -> dict[tuple[int, str], dict[int, float]]:
    """{slot: {groups: KL divergence that they alone cause}}, as a search measured them. Raises UserError for the log of
    another model, or one that lacks them."""
    partition = Partitioner(model, [])
    whole = {slot: partition.heads(*slot) for slot in partition.slots()}
    known: dict[tuple[int, str], dict[int, float]] = {slot: {} for slot in whole}
    for record in read_log(log, model.config, {"model": fingerprint(model)}):
        maps = {"k": record["k_groups"], "v": record["v_groups"]}
        counts = {(layer, kind): max(maps[kind][layer]) + 1 for layer, kind in whole}
        changed = [slot for slot in whole if counts[slot] != whole[slot]]
        if len(changed) == 1 and record["note"].endswith(f"alone: {counts[changed[0]]}"):
            known[changed[0]][counts[changed[0]]] = record["kl"]
    if not all(known[slot] or n == 1 for slot, n in whole.items()):
        raise UserError(f"{log} lacks single layers: python search_groups.py CKPT --kv_budget 0.5 --out groups.json")
    return known


def rows(model: Llama, blocks, seed: int, known: dict | None) -> dict[str, Callable[[float], Llama]]:
    """{name: the model that it makes of a share of the cache}"""
    found = statistics(model, blocks)
    best, table = Partitioner(model, found), {}

    def even(partition: Partitioner, merge: str = "closed") -> Callable[[float], Llama]:
        return lambda share: convert(model, *partition.maps(partition.even(total(partition, share))), found, merge)

    if best.can_be_joint():
        chance, neighbours, joint = (Partitioner(model, found, x, True, seed) for x in ("random", "neighbour", "best"))
        table = {
            "random joint groups, mean": even(chance, "mean"),
            "neighbours, mean (GQA's paper)": even(neighbours, "mean"),
            "best joint groups, mean": even(joint, "mean"),
            "neighbours, closed form": even(neighbours),
            "best joint groups, closed form": even(joint),
        }
    table["K and V apart"] = even(best)

    def maps(share: float) -> tuple[Maps, Maps]:
        if not known:
            return best.maps(best.even(total(best, share)))
        counts = knapsack(list(predictions(best, known).values()))[1][total(best, share)]
        return best.maps(dict(zip(best.slots(), counts)))

    if known:
        table["+ knapsack"] = lambda share: grouped(model, *maps(share), found, blocks, "none")
    table["+ wo refitted"] = lambda share: grouped(model, *maps(share), found, blocks, "output")
    table["+ wq and wk refitted"] = lambda share: grouped(model, *maps(share), found, blocks, "all")
    return table


def total(partition: Partitioner, share: float) -> int:
    """Groups of a share of the cache: where one map can serve K and V, an even number, so that all rows keep equally
    many."""
    if partition.joint or not partition.can_be_joint():
        return partition.total(share, "shares")
    return 2 * Partitioner(partition.model, [], joint=True).total(share, "shares")


def measured(config: CompareConfig) -> Iterator[tuple[str, float, int, float]]:
    """Row, share, seed, ratio of perplexities."""
    checkpoint, model = open_model(config.ckpt, config.device)
    tokenizer = read_tokenizer(checkpoint["tokenizer"])
    text, _ = split_tokens(checkpoint, tokenizer, config.dataset, "train")
    test, source = split_tokens(checkpoint, tokenizer, config.dataset, "test")
    test = test[: config.eval_tokens + 1]
    partition = Partitioner(model, [])
    config.shares = config.shares or [share for share in SHARES if share >= partition.least_share()]
    for share in config.shares:
        total(partition, share)  # one that is too small is told at once
    known = sensitivities(Path(config.log), model) if config.log is not None else None
    base = perplexity_on(test, model)
    print(f"perplexity {base:.4f} | {len(test) - 1:,} tokens of {source}", flush=True)
    for seed in range(config.seeds):
        blocks = calibration_blocks(text, model, config.calibration_tokens, seed)
        for name, make in rows(model, blocks, seed, known).items():
            for share in config.shares:
                yield name, share, seed, perplexity_on(test, make(share)) / base


def main() -> None:
    config = CompareConfig(**parse(__doc__, CompareConfig))
    cells: dict[tuple[str, float], list[float]] = {}
    for name, share, seed, ratio in tqdm(measured(config), desc="comparing", disable=None, leave=False):
        cells.setdefault((name, share), []).append(ratio)
        tqdm.write(f"seed {seed} | {share:.4f} | x {ratio:.4f} | {name}")
    print("| share of the KV cache | " + " | ".join(f"{share:.3g}" for share in config.shares) + " |")
    print("| --- |" + " --- |" * len(config.shares))
    for name in dict.fromkeys(name for name, _ in cells):
        print(f"| {name} | " + " | ".join(f"{np.mean(cells[name, share]):.3f}" for share in config.shares) + " |")
    if config.seeds > 1:
        spread = max(np.ptp(values) for (name, _), values in cells.items() if not name.startswith("random"))
        print(f"largest difference between seeds, random groups aside: {spread:.3f}")


if __name__ == "__main__":
    exit_cleanly(main)
