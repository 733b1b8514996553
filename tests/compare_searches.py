"""For developers: the best loss so far of each search, and of Optuna's TPE, at equal numbers of evaluations.

    pip install optuna
    python tests/compare_searches.py ckpt.pt --kv_budget 0.5 --out /tmp/curves.json --refit none --search_tokens 8192

All choose the numbers of groups of every slot; which heads share is found by the closed form, but for `random`, the
published search, which draws that, too. TPE names a weight for each slot, and the budget is shared out by them.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import exit_cleanly, parse
from search_groups import Search, SearchConfig, open_search

AT = (10, 20, 30, 40, 50, 60, 80, 100, 125, 150)


def by_weights(search: Search, weights: dict) -> dict:
    """The search's total, shared out in proportion to the weights, one at least and all at most."""
    counts = dict.fromkeys(search.slots, 1)
    for _ in range(search.total - len(counts)):
        open_slots = [slot for slot in counts if counts[slot] < search.heads[slot]]
        counts[min(open_slots, key=lambda slot: counts[slot] / weights[slot])] += 1
    return counts


def tpe(search: Search) -> None:
    """Tree-structured Parzen estimator, Optuna's default, with its default settings."""

    def objective(trial: optuna.Trial) -> float:
        weights = {slot: trial.suggest_int(f"{slot}", 1, n) for slot, n in search.heads.items()}
        return search.value(*search.measure([(search.partition.maps(by_weights(search, weights)), "tpe")]))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=search.config.seed))
    study.optimize(objective, n_trials=search.config.max_evals)


def curve(search: Search, run) -> list[float]:
    """Best value after each evaluation; infinity before the first that keeps to the budget."""
    found, measure = [], search.measure

    def watched(maps, note, counts=True):
        record = measure(maps, note, counts)
        best = min(found[-1] if found else np.inf, search.value(record) if counts else np.inf)
        found.append(best)
        return record

    search.measure = watched
    run(search)
    return found + found[-1:] * (search.config.max_evals - len(found))


def main() -> None:
    config = SearchConfig(**parse(__doc__, SearchConfig))
    curves, first = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for name, evals in (("knapsack", 60), ("tpe", 150), ("anneal", 150), ("random", 150)):
            run = tpe if name == "tpe" else getattr(Search, name)
            now = replace(config, max_evals=evals, log=str(Path(folder) / f"{name}.jsonl"))
            if first is None:
                first, _ = open_search(now)
                search = first
            else:
                search = Search(now, first.partition, first.evaluate)
            curves[name] = curve(search, run)
            search.bar.close()
            cells = [f"{at}: {curves[name][at - 1]:.4f}" for at in AT if at <= evals]
            print(f"{name:9}" + "  ".join(cells), flush=True)
    Path(config.out).write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    exit_cleanly(main)
