"""What each step of gqa.py is worth: a table of perplexities, as ratios to the original's, for each share of the cache.

    python search_groups.py ckpt.pt --kv_budget 0.5 --out groups.json         # leaves groups.jsonl
    python compare_groups.py ckpt.pt --log groups.jsonl

Each row adds to the one above it, from the mean of random groups to groups that are found, spent and refitted. The
knapsack's row needs the log of a search, with its default --refit, for what it measured of each layer. Calibrated on
the train split, judged on the test split; no training. A cell is the mean over seeds of calibration text, which are
those of the random groups, too.
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


@dataclass
class CompareConfig:
    """comparison"""

    ckpt: str  # the checkpoint
    log: str | None = None  # the JSONL of a search of it (default: no row for the knapsack)
    shares: list[float] | None = None  # of the KV cache to keep (default: 3/4 2/3 1/2 1/3 1/4 1/8)
    seeds: int = 3  # calibration texts
    calibration_tokens: int = 65536  # at most, of the train split
    eval_tokens: int = 32768  # of the test split
    dataset: str | None = None  # prepared data of the same tokenizer (default: the checkpoint's own)
    device: str = "auto"  # cuda, mps, cpu or auto

    def __post_init__(self):
        self.shares = self.shares or [3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 8]
        for name in ("seeds", "calibration_tokens", "eval_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give --{name} 1 or more")


def spent(log: Path, partition: Partitioner, total: int) -> dict:
    """The number of groups of each slot where a knapsack over what a search's log measured of them spends `total`."""
    known: dict[tuple, dict[int, float]] = {slot: {} for slot in partition.slots()}
    whole = {slot: partition.heads(*slot) for slot in known}
    header, records = read_log(log)
    if header["model"] != fingerprint(partition.model):
        raise UserError(f"{log} is of another model: python search_groups.py CKPT --kv_budget 0.5 --out groups.json")
    for record in records:
        maps = {"k": record["k_groups"], "v": record["v_groups"]}
        counts = {(layer, kind): max(maps[kind][layer]) + 1 for layer, kind in whole}
        changed = [slot for slot in whole if counts[slot] != whole[slot]]
        if len(changed) == 1 and record["note"].endswith(f"alone: {counts[changed[0]]}"):
            known[changed[0]][counts[changed[0]]] = record["kl"]
    return dict(zip(whole, knapsack(list(predictions(partition, known).values()))[1][total]))


def rows(model: Llama, blocks, seed: int, log: Path | None) -> dict[str, Callable[[float], Llama]]:
    """{name: the model that it makes of a share of the cache}"""
    found = statistics(model, blocks)
    best, table = Partitioner(model, found), {}

    def even(partition: Partitioner, merge: str = "closed") -> Callable[[float], Llama]:
        return lambda share: convert(model, *partition.maps(partition.even(partition.total(share))), found, merge)

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
        total = best.total(share)
        return best.maps(spent(log, best, total) if log else best.even(total))

    if log:
        table["+ knapsack"] = lambda share: grouped(model, *maps(share), found, blocks, "none")
    table["+ wo refitted"] = lambda share: grouped(model, *maps(share), found, blocks, "output")
    table["+ wq and wk refitted"] = lambda share: grouped(model, *maps(share), found, blocks, "all")
    return table


def measured(config: CompareConfig) -> Iterator[tuple[str, float, int, float]]:
    """Row, share, seed, ratio of perplexities."""
    checkpoint, model = open_model(config.ckpt, config.device)
    tokenizer = read_tokenizer(checkpoint["tokenizer"])
    text, _ = split_tokens(checkpoint, tokenizer, config.dataset, "train")
    test, source = split_tokens(checkpoint, tokenizer, config.dataset, "test")
    test = test[: config.eval_tokens + 1]
    for share in config.shares:
        Partitioner(model, []).total(share)  # one that is too small is told at once
    base = perplexity_on(test, model)
    print(f"perplexity {base:.4f} | {len(test) - 1:,} tokens of {source}", flush=True)
    log = Path(config.log) if config.log else None
    for seed in range(config.seeds):
        blocks = calibration_blocks(text, model, config.calibration_tokens, seed)
        for name, make in rows(model, blocks, seed, log).items():
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
    spread = max(np.ptp(values) for (name, _), values in cells.items() if not name.startswith("random"))
    print(f"largest difference between seeds, random groups aside: {spread:.3f}")


if __name__ == "__main__":
    exit_cleanly(main)
