"""What each step of merging heads contributes, and what each way of searching finds.

    python -m study compare-groups ckpt.pt
    python -m study compare-searches ckpt.pt --kv_budget 0.5 --refit none     # needs pip install optuna

compare-groups prints perplexities on the test split as ratios to the original's, for shares of the KV cache,
without training: first other work, with one map for K and V; from "K and V apart" on, each row adds a step to
the one above. A cell is the mean over seeds, of the calibration text and of the random groups.

compare-searches prints the best loss that each search finds, the knapsack after --max_evals evaluations, the
others after 2.5 times as many. TPE, Optuna's default, draws a weight for each slot, in proportion to which
the budget is shared out.
"""

import importlib.util
import tempfile
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from common import UserError, bounded, parse
from data.tokenizer import read_tokenizer
from eval_ppl import split_tokens
from gqa import budget, calibration_blocks, choose, even_counts, head_counts, merge, open_model
from gqa import perplexity_on, statistics
from refit import refit
from search_groups import Search, SearchConfig, knapsack_search, random_search
from study.bench import table

SHARES = (3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 8)
ROWS = {  # one map for K and V?, which heads share, how they are merged, and whether wq and wk are refitted
    "random joint groups, mean": (True, "random", "mean", None),
    "neighbours, mean (GQA's paper)": (True, "neighbour", "mean", None),
    "best joint groups, mean": (True, "best", "mean", None),
    "neighbours, closed form": (True, "neighbour", "closed", None),
    "best joint groups, closed form": (True, "best", "closed", None),
    "K and V apart": (False, "best", "closed", None),
    "+ wo refitted": (False, "best", "closed", False),
    "+ wq and wk refitted": (False, "best", "closed", True),
}


@dataclass
class CompareConfig:
    """comparison"""

    ckpt: str  # the checkpoint
    shares: list[float] | None = None  # of the KV cache (default: those of 3/4 2/3 1/2 1/3 1/4 1/8 there are)
    seeds: int = bounded(3, 1)  # calibration texts
    calibration_tokens: int = bounded(65536, 1)  # at most, of the train split
    eval_tokens: int = bounded(32768, 1)  # of the test split
    dataset: str | None = None  # prepared data of the same tokenizer (default: the checkpoint's own)
    device: str = "auto"  # cuda, mps, cpu or auto


def main() -> None:
    config = CompareConfig(**parse(__doc__, CompareConfig))
    checkpoint, model = open_model(config.ckpt, config.device)
    tokenizer = read_tokenizer(checkpoint["tokenizer"])
    text, _ = split_tokens(checkpoint, tokenizer, config.dataset, "train")
    test, source = split_tokens(checkpoint, tokenizer, config.dataset, "test")
    test = test[: config.eval_tokens + 1]
    one_map = model.config.k_groups == model.config.v_groups  # else K and V cannot share one
    heads = {joint: head_counts(model, joint) for joint in {False, one_map}}
    least = len(heads[one_map]) / sum(heads[one_map].values())
    shares = config.shares or [share for share in SHARES if share >= least]
    totals = {share: budget(heads[one_map], share) for share in shares}
    rows = {name: row for name, row in ROWS.items() if row[0] in heads}
    base, cells = perplexity_on(test, model), {(name, share): [] for name in rows for share in shares}
    print(f"perplexity {base:.4f} | {len(test) - 1:,} tokens of {source}", flush=True)
    for seed in tqdm(range(config.seeds), desc="comparing", disable=None, leave=False):
        blocks, known = calibration_blocks(text, model, config.calibration_tokens, seed), {}
        stats = statistics(model, blocks)
        for name, share in cells:
            joint, grouping, how, attention = rows[name]
            twice = one_map and not joint  # all rows keep equally many heads
            counts = even_counts(heads[joint], totals[share] * (1 + twice))
            small = merge(model, choose(model, stats, counts, grouping, seed, known), stats, how)
            if attention is not None:
                small = refit(small, model, blocks, attention)
            cells[name, share].append(perplexity_on(test, small) / base)
    lines = [[name, *(f"{np.mean(cells[name, share]):.3f}" for share in shares)] for name in rows]
    print(table(["share of the KV cache", *(f"{share:.3g}" for share in shares)], lines))


# ---- searches ----


def tpe_search(search: Search) -> None:
    """Tree-structured Parzen estimator, with Optuna's default settings."""
    import optuna

    def objective(trial) -> float:
        weights = {slot: trial.suggest_int(f"{slot}", 1, n) for slot, n in search.heads.items()}
        counts = dict.fromkeys(weights, 1)
        for _ in range(search.total - len(counts)):
            room = [slot for slot in counts if counts[slot] < search.heads[slot]]
            counts[min(room, key=lambda slot: counts[slot] / weights[slot])] += 1
        return search.value(search.measure(search.maps(counts), "tpe"))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=search.config.seed))
    study.optimize(objective, n_trials=search.config.max_evals)


def searches_main() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise UserError("compare-searches compares with Optuna: pip install optuna")
    config = SearchConfig(**{"out": "unused.json", **parse(__doc__, SearchConfig)})
    if config.kv_budget is None:
        raise UserError("TPE shares out a budget: give --kv_budget 0.5")
    ways = {"knapsack": (knapsack_search, 1), "TPE": (tpe_search, 2.5), "random": (random_search, 2.5)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (run, more) in ways.items():
            how = {"max_evals": int(more * config.max_evals), "log": f"{folder}/{name}.jsonl"}
            search = Search(replace(config, **how))
            with search.bar:
                run(search)
            best = min(map(search.value, search.seen))
            print(f"{name:9} {search.evals:4} evaluations, best {best:.4f}", flush=True)
