"""What each step of merging heads contributes: python -m study compare-groups ckpt.pt

It prints perplexities on the test split, divided by the original's, for shares of the KV cache, without
healing; a row with + adds a step to the one above. A cell is the mean over seeds.
"""

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import gqa
from common import bounded, parse, require
from data.tokenizer import read_tokenizer
from eval_ppl import split_tokens
from partition import budget, choose, even_counts, head_counts
from refit import STEPS, refit, statistics, token_maps
from study.bench import table

ROWS = {  # one map for K and V?, which heads share, how they are merged, steps of refit (None: none at all)
    "random joint groups, mean": (True, "random", "mean", None),
    "neighbours, mean (GQA's paper)": (True, "neighbour", "mean", None),
    "best joint groups, mean": (True, "best", "mean", None),
    "neighbours, closed form": (True, "neighbour", "closed", None),
    "best joint groups, closed form": (True, "best", "closed", None),
    "K and V apart": (False, "best", "closed", None),
    "+ wo refitted": (False, "best", "closed", 0),
    "+ wq, wk and wv refitted": (False, "best", "closed", STEPS),
    "latents": (False, None, "latent", None),
    "latents + wo refitted": (False, None, "latent", 0),
    "latents + wq, wk and wv refitted": (False, None, "latent", STEPS),
    "latents and tokens": (False, None, "tokens", None),
    "latents and tokens + wo refitted": (False, None, "tokens", 0),
    "latents and tokens + wq, wk and wv refitted": (False, None, "tokens", STEPS),
}


@dataclass
class CompareConfig:
    """comparison"""

    ckpt: str  # the checkpoint
    shares: list[float] | None = None  # of the KV cache (default: 3/4 to 1/8, as far as heads allow)
    seeds: int = bounded(3, 1)  # calibration texts
    calibration_tokens: int = bounded(65536, 1)  # at most, of the train split
    eval_tokens: int = bounded(32768, 1)  # of the test split
    dataset: str | None = None  # prepared data of the same tokenizer (default: the checkpoint's own)
    device: str = "auto"  # cuda, mps, cpu or auto


def main() -> None:
    config = CompareConfig(**parse(__doc__, CompareConfig))
    checkpoint, model = gqa.open_model(config.ckpt, config.device)
    data = checkpoint, read_tokenizer(checkpoint["tokenizer"]), config.dataset
    (text, _), (test, source) = split_tokens(*data, "train"), split_tokens(*data, "test")
    test = test[: config.eval_tokens + 1]
    one_map = model.config.k_groups == model.config.v_groups
    require(one_map, f"{config.ckpt} groups keys and values apart: give its original")
    heads = {joint: head_counts(model, joint) for joint in (True, False)}
    whole = sum(heads[True].values())
    least = len(heads[True]) / whole
    shares = config.shares or [x for x in (3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 8) if x >= least]
    sound = bool(shares) and all(least - 1e-9 <= x <= 1 for x in shares)
    require(sound, f"--shares {shares}: with these heads give {math.ceil(1000 * least) / 1000} to 1")
    totals = dict.fromkeys(budget(heads[True], share) for share in shares)  # what rounding leaves of them
    base, cells = gqa.perplexity_on(test, model), {(name, total): [] for name in ROWS for total in totals}
    print(f"perplexity {base:.4f} | {len(test) - 1:,} tokens of {source}", flush=True)
    for seed in range(config.seeds):
        blocks, known, latents = gqa.calibration_blocks(text, model, config.calibration_tokens, seed), {}, {}
        plain, with_tokens = (statistics(model, blocks, maps) for maps in (None, token_maps(model, blocks)))
        for how, stats in (("latent", plain), ("tokens", with_tokens)):
            found = gqa.all_directions(model, stats)
            latents[how] = stats, found, gqa.latent_losses(model, stats, found, blocks)
        for name, total in tqdm(cells, desc="comparing", disable=None, leave=False):
            joint, grouping, how, steps = ROWS[name]
            if how in latents:
                sizes = gqa.latent_sizes(model, *latents[how], total / whole)
                small = gqa.to_latents(model, *latents[how][:2], sizes)
            else:
                counts = even_counts(heads[joint], total if joint else 2 * total)  # a joint group is two
                small = gqa.merge(model, choose(model, plain, counts, grouping, seed, known), plain, how)
            if steps is not None:
                small = refit(small, model, blocks, steps)
            cells[name, total].append(gqa.perplexity_on(test, small) / base)
    rows = {name: {"share of the KV cache": name} for name in ROWS}
    for (name, total), ratios in cells.items():
        rows[name][f"{total / whole:.3g}"] = f"{np.mean(ratios):.3f}"
    print(table(list(rows.values())))
