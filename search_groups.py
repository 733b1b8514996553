"""Find which key and value heads of a model to merge: the best groups under a KV-cache budget, or for an objective.

    python search_groups.py ckpt.pt --kv_budget 0.5 --out groups.json
    python search_groups.py ckpt.pt --objective "ppl*groups**2" --out groups.json        # over all budgets
    python gqa.py ckpt.pt --groups groups.json --out grouped.pt

Inside a layer the closed form says which heads (gqa.py); what is searched is how many groups each layer's keys and each
layer's values get. `knapsack` groups one layer's K or V at a time at a few sizes, measures the KL divergence of the
predictions from the original's, interpolates along the closed form's cost, and spends the budget where the sum of the
divergences is smallest; then it moves single groups between layers, from where measurements were best. `random`
draws the groups by chance, as the published search does, `anneal` walks by chance from an even spread.

The search sees one part of the val split. The best that it found and the baselines are then judged on another part.
Every evaluation is a line of a JSONL file: an interrupted search goes on from there, and one for another budget, given
the same --log, begins with what is known.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from checkpoint import picture
from config import UserError, exit_cleanly, parse
from eval_ppl import perplexity, split_tokens
from evaluations import MOST_CONTEXT, Evaluations, Judge, grouped
from files import replacing, writable
from gqa import Partitioner, calibration_blocks, open_model, predictions
from merging import Costs, Maps, merged_config, statistics
from model import Llama
from objective import Objective
from parallel import gathered, note, processes, rank, world
from partition import knapsack
from tokenizer import read_tokenizer

Counts = dict[tuple[int, str], int]  # (layer, "k", "v" or "joint") -> groups
NAMES = ("ppl", "loss", "groups", "kv_bytes")  # what an objective may name


@dataclass
class SearchConfig:
    """search"""

    ckpt: str  # the checkpoint
    out: str | None = None  # the group file to write
    kv_budget: float | None = None  # share of the checkpoint's KV cache to keep
    objective: str | None = None  # or: what to minimise over all budgets, of ppl, loss, groups (K/V heads), kv_bytes
    method: Literal["knapsack", "random", "anneal"] = "knapsack"  # see above
    max_evals: int = 60  # groupings to evaluate, without the last judgement
    joint: bool = False  # one map for keys and values
    refit: Literal["none", "output", "all"] = "all"  # what each grouping gets before it is measured, as in gqa.py
    calibration_tokens: int = 65536  # at most, of the train split, for the statistics; refitting uses half of it
    search_tokens: int = 16384  # of the val split that an evaluation reads; the last judgement reads as many others
    log: str | None = None  # the JSONL of all evaluations (default: OUT.jsonl)
    dataset: str | None = None  # prepared data of the same tokenizer (default: the checkpoint's own)
    seed: int = 0  # of the calibration text, and of random and anneal
    device: str = "auto"  # cuda, mps, cpu or auto
    overwrite: bool = False  # replace an existing group file

    def __post_init__(self):
        if (self.kv_budget is None) == (self.objective is None):
            raise UserError("what to search for? give one of --kv_budget 0.5 and --objective EXPRESSION")
        if not self.out:
            raise UserError("one name is missing: --out GROUPS.json, the file to write")
        for name in ("max_evals", "calibration_tokens", "search_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give --{name} 1 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give --seed 0 to {2**32 - 1}")
        if not Path(self.out).name or Path(self.out).is_dir():
            raise UserError(f"--out {self.out} is a folder: name a file, such as {Path(self.out) / 'groups.json'}")
        self.log = self.log or str(Path(self.out).with_suffix(".jsonl"))
        if Path(self.log).resolve() == Path(self.out).resolve():
            raise UserError(f"--out {self.out} would be the log, too: name it groups.json, or give another --log")


class Search:
    """What the methods share: the slots, whose number of groups is searched for, and the value of a grouping."""

    def __init__(self, config: SearchConfig, partition: Partitioner, evaluate: Evaluations):
        self.config, self.partition, self.evaluate = config, partition, evaluate
        self.slots = partition.slots()
        self.heads = {slot: partition.heads(*slot) for slot in self.slots}
        self.objective = None if config.objective is None else Objective(config.objective, NAMES)
        self.total = None if self.objective else partition.total(config.kv_budget)
        self.seen: list[dict] = []  # the groupings of this search that keep to the budget, each once
        self.evals = 0
        self.bar = tqdm(total=config.max_evals, desc=config.method, disable=rank() > 0 or None)

    def value(self, record: dict) -> float:
        """What is minimised: the objective, or the loss."""
        if self.objective is None:
            return record["loss"]
        return self.objective(ppl=perplexity(record["loss"]), **{k: record[k] for k in NAMES[1:]})

    def measure(self, asked: list[tuple[tuple[Maps, Maps], str]], counts: bool = True) -> list[dict]:
        """Evaluate groupings, each with a note, as many at a time as there are processes; if it `counts`, they may be
        the answer."""
        records = []
        for i in range(0, len(asked), world()):
            new = self.evaluate(asked[i : i + world()])
            for record in new if counts else []:
                self.seen += [] if record in self.seen else [record]
            records += new
            self.evals += len(new)
            self.bar.set_postfix_str(f"best {min(map(self.value, self.seen)):.4f}" if self.seen else "probing")
            self.bar.update(len(new))
        return records

    def left(self) -> int:
        return self.config.max_evals - self.evals

    # ---- knapsack ----

    def knapsack(self) -> None:
        """Probe, spend the budget, then move single groups: next is what lies one move from something measured, and is
        predicted to be best from there."""
        values = self.probe()
        sums, counts = knapsack(values)
        if self.objective:
            self.over_budgets(sums, counts)
            return
        predicted, tried, note = {tuple(counts[self.total]): 0.0}, set(), "knapsack"
        while predicted and self.left() > 0:
            best = sorted(predicted, key=predicted.get)[: min(world(), self.left())]
            there = [dict(zip(self.slots, counts)) for counts in best]
            records = self.measure([(self.partition.maps(now), note) for now in there])
            tried |= set(best)
            for now, record in zip(there, records):
                for change, near in self.moves(now, values):
                    predicted[near] = min(predicted.get(near, math.inf), self.value(record) + change)
            predicted = {near: value for near, value in predicted.items() if near not in tried}
            note = "move"

    def probe(self) -> list[np.ndarray]:
        """For each slot the KL divergence that 1, 2, ... groups in it alone cause, measured at one size at least and
        at four within two fifths of the evaluations: moves learn more from the rest."""
        known: dict[tuple, dict[int, float]] = {slot: {} for slot in self.slots}
        most = min(max(len(self.slots), 2 * self.config.max_evals // 5), self.config.max_evals - 1)
        for slot in self.slots:
            self.partition.all_costs(*slot)  # at once, for all that is asked of it below
        for share in (0.5, 0, 0.25, 0.75):
            sizes = {slot: max(1, round(share * n)) for slot, n in self.heads.items()}
            sizes = [(slot, g) for slot, g in sizes.items() if g < self.heads[slot] and g not in known[slot]]
            sizes = sizes[: most - sum(map(len, known.values()))]
            asked = [
                (self.partition.maps({**self.heads, slot: g}), f"{slot[1]} of layer {slot[0]} alone: {g}")
                for slot, g in sizes
            ]
            for (slot, g), record in zip(sizes, self.measure(asked, counts=False)):
                known[slot][g] = record["kl"]
        return list(predictions(self.partition, known).values())

    def moves(self, now: Counts, values: list[np.ndarray]) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Predicted change, and the counts, when one slot gives a group to another."""
        table = dict(zip(self.slots, values))
        for giver in self.slots:
            for taker in self.slots:
                if giver != taker and now[giver] > 1 and now[taker] < self.heads[taker]:
                    there = {**now, giver: now[giver] - 1, taker: now[taker] + 1}
                    change = sum(table[s][there[s] - 1] - table[s][now[s] - 1] for s in (giver, taker))
                    yield change, tuple(there.values())

    def over_budgets(self, sums: np.ndarray, counts: list[list[int]]) -> None:
        """Evaluate the budget whose predicted objective is best, correct the predictions by what was measured, and so
        on until it is one that is known."""
        (start,) = self.measure([(self.partition.maps(self.heads), "the original")])
        ratios: dict[int, float] = {}
        while self.left() > 0:
            predicted = {}
            for total in np.flatnonzero(np.isfinite(sums)):
                near = min(ratios, key=lambda known: abs(known - total), default=None)
                loss = float(start["loss"] + sums[total] * ratios.get(near, 1.0))
                maps = self.partition.maps(dict(zip(self.slots, counts[total])))
                about = self.evaluate.sizes(*maps)
                predicted[int(total)] = self.value({"loss": loss, **about})
            total = min(predicted, key=predicted.get)
            if total in ratios:
                return
            maps = self.partition.maps(dict(zip(self.slots, counts[total])))
            (record,) = self.measure([(maps, f"knapsack of {total}")])
            ratios[total] = max(0.0, record["loss"] - start["loss"]) / max(sums[total], 1e-12)

    # ---- chance ----

    def random(self) -> None:
        """The published search: a label for every head of every layer, all alike likely. Under a budget the number of
        groups of each slot is drawn first, so that their sum is the budget's."""
        asked = []
        for number in range(self.config.max_evals):
            rng = np.random.default_rng((self.config.seed, number))
            counts = self.random_counts(rng) if self.objective is None else None
            labels = {}
            for slot, n in self.heads.items():
                drawn = rng.integers(n, size=n)
                if counts:
                    drawn = rng.permutation([*range(counts[slot]), *rng.integers(counts[slot], size=n - counts[slot])])
                labels[slot] = drawn.tolist()
            asked.append((self.partition.labelled(labels), "random"))
        self.measure(asked)

    def random_counts(self, rng: np.random.Generator) -> Counts:
        counts = dict.fromkeys(self.slots, 1)
        for _ in range(self.total - len(counts)):
            open_slots = [slot for slot in self.slots if counts[slot] < self.heads[slot]]
            counts[open_slots[rng.integers(len(open_slots))]] += 1
        return counts

    def anneal(self) -> None:
        """Simulated annealing over the numbers of groups, each step a group that moves, or under an objective also one
        that comes or goes; the temperature falls from a typical difference to a hundredth of it."""
        rng, heat = np.random.default_rng(self.config.seed), None
        now = self.partition.even(self.total or sum(self.heads.values()) // 2)
        value = self.value(*self.measure([(self.partition.maps(now), "even")]))
        for _ in range(100 * self.config.max_evals * (len(self.slots) > 1)):  # where no step is possible it ends, too
            if self.left() <= 0:
                return
            there = dict(now)
            giver, taker = (self.slots[i] for i in rng.choice(len(self.slots), 2, replace=False))
            gives, takes = (True, True) if self.objective is None else rng.permutation([True, rng.random() < 0.5])
            there[giver] -= int(gives)
            there[taker] += int(takes)
            if there[giver] < 1 or there[taker] > self.heads[taker]:
                continue
            new = self.value(*self.measure([(self.partition.maps(there), "anneal")]))
            heat = heat or abs(new - value) or None
            cooled = (heat or 1.0) * 0.01 ** (1 - self.left() / self.config.max_evals)
            if new < value or rng.random() < math.exp((value - new) / cooled):
                now, value = there, new


# ---- the answer ----


def baselines(search: Search, best: dict) -> Iterator[tuple[str, Maps, Maps]]:
    """What needs no search, with as many groups as the best that was found."""
    total = search.total or min(round(2 * best["groups"]) // (1 + search.config.joint), sum(search.heads.values()))
    own = search.partition
    total = max(total, len(search.slots))
    yield ("best groups, spread evenly", *own.maps(own.even(total)))
    yield (
        "neighbours, spread evenly",
        *Partitioner(own.model, own.found, "neighbour", own.joint).maps(own.even(total)),
    )
    if not own.joint and own.can_be_joint():
        joint = Partitioner(own.model, own.found, joint=True)
        if total // 2 >= len(joint.slots()):
            yield ("best joint groups, spread evenly", *joint.maps(joint.even(total // 2)))


def judged(search: Search, judge: Judge) -> tuple[dict, list[dict]]:
    """The best of the search's three best and of the baselines on text that the search has not seen; and all of
    these."""
    ranked = sorted(search.seen, key=search.value)[:3]
    rows = [(f"found ({r['note']})", r["k_groups"], r["v_groups"]) for r in ranked] + list(baselines(search, ranked[0]))
    e, distinct, mine = search.evaluate, {}, {}
    for row in rows:
        distinct.setdefault(e.key(*row[1:]), row)
    for key in tqdm(list(distinct)[rank() :: world()], desc="judging", disable=rank() > 0 or None, leave=False):
        name, *maps = distinct[key]
        loss, divergence = judge(grouped(e.original, *maps, e.found, e.blocks, e.how))
        record = {"name": name, "loss": loss, "kl": divergence, **e.sizes(*maps)}
        mine[key] = {**record, "k_groups": maps[0], "v_groups": maps[1]}
    found = gathered(mine)
    judged = {key: found[key] for key in distinct}
    return min(judged.values(), key=search.value), sorted(judged.values(), key=search.value)


def together(records: list[dict], kind: str, layer: int) -> np.ndarray:
    """(H, H): the share of these groupings in which two query heads share a group."""
    of_head = np.array([record[f"{kind}_groups"][layer] for record in records])
    return (of_head[:, :, None] == of_head[:, None, :]).mean(0)


def head_report(search: Search) -> tuple[dict, list[str]]:
    """Which heads merge cheaply: for each layer and kind the similarity of K or V heads by the closed form, and how
    often two query heads share a group in the ten best groupings; and a line for each with the three likest pairs."""
    best = sorted(search.seen, key=search.value)[:10]
    table, lines = {"similarity": {}, "together": {}}, []
    for kind in "kv":
        for layer, block in enumerate(search.evaluate.original.layers):
            alike = Costs(block.attention, kind, search.evaluate.found[layer]).similarity()
            often = together(best, kind, layer)
            table["similarity"][f"{kind}{layer}"] = alike.round(3).tolist()
            table["together"][f"{kind}{layer}"] = often.round(3).tolist()
            groups = block.attention.k_groups if kind == "k" else block.attention.v_groups
            first = [groups.of_head.tolist().index(head) for head in range(groups.n_group)]
            pairs = sorted(((alike[a, b], b, a) for a in range(len(alike)) for b in range(a)), reverse=True)[:3]
            words = [f"{a}+{b} {value:.2f} ({100 * often[first[a], first[b]]:.0f}%)" for value, a, b in pairs]
            lines.append(f"  {kind.upper()} of layer {layer:<3} " + "   ".join(words))
    return table, lines


def open_search(config: SearchConfig) -> tuple[Search, Judge]:
    """The search, and a judge on the part of the val split that it will not see."""
    checkpoint, model = open_model(config.ckpt, config.device)
    tokenizer = read_tokenizer(checkpoint["tokenizer"])
    text, _ = split_tokens(checkpoint, tokenizer, config.dataset, "train")
    val, _ = split_tokens(checkpoint, tokenizer, config.dataset, "val")
    blocks = calibration_blocks(text, model, config.calibration_tokens, config.seed)
    most = (len(val) - 1) // 2
    context = min(model.config.block_size, MOST_CONTEXT)
    if min(config.search_tokens, most) < context:
        least = f"give --search_tokens {context} or more, and a val split of twice as many"
        raise UserError(f"search_tokens is {config.search_tokens} of {len(val):,} in the val split: {least}")
    half = min(config.search_tokens, most)
    partition = Partitioner(model, [], joint=config.joint)
    partition.total(config.kv_budget or 1.0)  # a budget too small is told before the first measurement
    few = blocks[: max(1, len(blocks) // 2)]
    pieces = [val[start : start + half + 1] for start in (0, half)]
    identity = {"refit": config.refit, "model": fingerprint(model), "text": digest(blocks.cpu().numpy(), *pieces)}
    partition.found = statistics(model, blocks)
    judges, itemsize = [Judge(model, piece) for piece in pieces], checkpoint["model"]["tok_embeddings.weight"].itemsize
    how = (partition.found, few, judges[0], config.refit, itemsize)
    return Search(config, partition, Evaluations(Path(config.log), identity, model, *how)), judges[1]


def fingerprint(model: Llama) -> str:
    """What tells one model from another."""
    return digest(*(x.cpu().numpy() for _, x in sorted(model.state_dict().items())))


def digest(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


@processes()
def main() -> None:
    config = SearchConfig(**parse(__doc__, SearchConfig))
    if config.objective is not None:
        Objective(config.objective, NAMES)
    writable(Path(config.out), config.overwrite)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    search, judge = open_search(config)
    try:
        with search.bar:
            getattr(search, config.method)()
        best, rows = judged(search, judge)
    except KeyboardInterrupt:
        note(f"stopped; {config.log} keeps the evaluations, and the same command goes on from there")
        raise
    original = judge(search.evaluate.original)[0]
    heads, lines = head_report(search)
    share = best["kv_bytes"] / search.evaluate.sizes(*search.partition.maps(search.heads))["kv_bytes"]
    record = {"share": share, **best, "original_loss": original, "judged": rows, **heads}
    record |= {"search": asdict(config), "evals": search.evals}
    if rank() == 0:
        with replacing(Path(config.out), "w") as file:
            file.write(json.dumps(record) + "\n")
    print("\n".join(picture(merged_config(search.evaluate.original.config, best["k_groups"], best["v_groups"]))))
    ten = min(10, len(search.seen))
    print(f"heads most alike, by the closed form (and how often together in the {ten} best)\n" + "\n".join(lines))
    print(f"judged on {judge.count:,} other tokens; perplexity of the original {perplexity(original):.4f}")
    for row in rows:
        cache = f"{row['groups']:g} K/V heads, {row['kv_bytes']:,} bytes a token"
        value = "" if search.objective is None else f" | objective {search.value(row):.6g}"
        print(f"  x {perplexity(row['loss'] - original):.4f} | KL {row['kl']:.4f} | {cache}{value} | {row['name']}")
    new = len(search.evaluate.records) - search.evaluate.known
    print(f"{search.evals} groupings looked at, {new} of them measured now; all measurements are in {config.log}")
    dataset = f" --dataset {config.dataset}" if config.dataset else ""
    print(f"--- next:\npython gqa.py {config.ckpt} --groups {config.out} --out grouped.pt{dataset}")


if __name__ == "__main__":
    exit_cleanly(main)
