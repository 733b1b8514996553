"""Find how many key and value heads each layer of a model needs, for a KV-cache budget or over all budgets.

    python search_groups.py ckpt.pt --kv_budget 0.5 --out groups.json
    python search_groups.py ckpt.pt --groups_power 2 --out groups.json \\
        --method random --joint --merge mean --refit none               # a published search: ppl * groups^2

partition.py finds the cheapest groups of a layer; this searches for how many. `--method knapsack` predicts
from one backward pass the KL divergence that fewer groups in one slot (a layer's K or V) would cause, and
spends the budget so that the sum is smallest. Then it goes on best-first: one group moves from a slot to
another, in any grouping measured so far. `random` draws each head's group.

The search reads the first --search_tokens of the val split, the next as many rank its best three beside even
groups, and the next report. The evaluations are lines of a JSONL file: an interrupted search goes on from
there, and one for another budget, given the same --log, measures none of them again.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import permutations, product
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import picture
from common import UserError, bounded, exit_cleanly, lock, parse, replacing, require, sha256_of, writable
from eval_ppl import MOST_LOGITS, perplexity
from gqa import MOST_CONTEXT, MergeConfig, merge, open_inputs
from model import Llama, Maps, widen
from partition import (
    Counts, Slot, as_maps, best_partitions, budget, choose, even_counts, head_counts, knapsack, slot_costs,
)  # fmt: skip
from refit import STEPS, divergence, refit, sensitivity, statistics

LEFT = {"k": 0.3}  # share of merged keys' loss that is left, about, once wq and wk are refitted (not --joint)


@dataclass
class SearchConfig(MergeConfig):
    """search"""

    out: str = "groups.json"  # the file to write
    groups_power: float | None = bounded(None, 0, 10)  # or: minimise perplexity * (K/V heads) ** this
    method: Literal["knapsack", "random"] = "knapsack"  # see above
    max_evals: int = bounded(60, 2)  # groupings to evaluate before the last judgement
    search_tokens: int = bounded(16384, 1)  # of val, for an evaluation; choice and report read as many
    log: str | None = None  # the JSONL of all evaluations (default: OUT.jsonl)

    def __post_init__(self):
        goals = [self.kv_budget, self.groups_power]
        require(goals.count(None) == 1, "for which size? give --kv_budget 0.5 or --groups_power 2")
        self.log = self.log or self.out.removesuffix(".json") + ".jsonl"
        other = Path(self.log).resolve() != Path(self.out).resolve()
        require(other, f"--log {self.log} is --out, too: give another name")


# ---- measuring ----


class Judge:
    """Loss of models on a text, and KL divergence from the original's predictions, mean nats a token."""

    @torch.no_grad()
    def __init__(self, original: Llama, tokens: np.ndarray):
        T, V = min(original.config.block_size, MOST_CONTEXT), original.config.vocab_size
        blocks = torch.from_numpy(tokens.astype(np.int64)).unfold(0, T + 1, T)  # (N, T + 1)
        blocks = blocks.to(original.tok_embeddings.weight.device)
        self.parts = blocks.split(max(1, min(16, MOST_LOGITS // (4 * T * V))))
        self.count, self.original = len(blocks) * T, original
        self.hidden = [original.hidden(part[:, :-1]) for part in self.parts]  # logits would be V / C larger

    @torch.no_grad()
    def __call__(self, model: Llama) -> dict[str, float]:
        loss = kl = 0.0
        for part, hidden in zip(self.parts, self.hidden):
            ours = widen(model(part[:, :-1])).log_softmax(-1).flatten(0, 1)
            theirs = widen(self.original.output(hidden)).log_softmax(-1).flatten(0, 1)
            loss += F.nll_loss(ours, part[:, 1:].flatten(), reduction="sum").item()
            kl += F.kl_div(ours, theirs, log_target=True, reduction="sum").item()
        return {"loss": loss / self.count, "kl": max(kl / self.count, 0.0)}  # in this order nan stays


def open_log(path: Path, header: dict) -> tuple[IO, dict[str, dict]]:
    """A search's log (JSONL), opened and locked, and its evaluations, by their maps. Raises UserError if
    another search has it, or if its first line is another header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", buffering=1)  # noqa: SIM115
    try:
        lock(file)
        file.seek(0)
        text = file.read()
        *lines, half = text.split("\n")  # a killed search leaves half a line
        first, *records = map(json.loads, lines) if text else [header]
        numbers = [record[name] for record in records for name in ("loss", "kl", "groups", "kv_bytes")]
        require(all(map(math.isfinite, numbers)) and all(r["note"] for r in records), "a damaged record")
        found = {str((record["k_groups"], record["v_groups"])): record for record in records}
        other = [name for name, value in header.items() if first[name] != value]
    except BlockingIOError:
        raise UserError(f"{path} is in use by another search: wait, or give another --log") from None
    except Exception:
        raise UserError(f"{path} is damaged or no log of search_groups.py: give another --log") from None
    require(not other, f"{path} is of another {' and '.join(other)}: give the same flags, or another --log")
    if not text:
        print(json.dumps(header), file=file)
    file.truncate(file.tell() - len(half.encode()))
    return file, found


# ---- the search ----


class Search:
    """A model, the groupings that were measured, and what they are worth. Of the val split `judge` reads the
    part to search on, `choice` and `report` what the search does not see."""

    def __init__(self, config: SearchConfig):
        checkpoint, model, blocks, val, _ = open_inputs(config)
        self.config, self.model, self.blocks, self.known = config, model, blocks, {}
        self.itemsize = checkpoint["model"]["norm.weight"].itemsize
        self.heads = head_counts(model, config.joint)
        self.total = None if config.kv_budget is None else budget(self.heads, config.kv_budget)
        third, least = (len(val) - 1) // 3, min(model.config.block_size, MOST_CONTEXT)
        size = min(config.search_tokens, third)
        few = f"search_tokens is {config.search_tokens}, a third of val {third}: give --search_tokens {least}"
        require(size >= least, f"{few} or more, and three times as much val text")
        texts = [val[start : start + size + 1] for start in (0, size, 2 * size)]
        read = b"".join(x.tobytes() for x in (blocks.cpu().numpy(), *texts))
        header = {"model": sha256_of(Path(config.ckpt)), "text": hashlib.sha256(read).hexdigest()}
        header |= {"refit": config.refit, "merge": config.merge}
        self.stats = statistics(model, blocks)
        self.log, self.records = open_log(Path(config.log), header)
        self.judge, self.choice, self.report = (Judge(model, text) for text in texts)
        self.seen: dict[str, dict] = {}  # the groupings of this search, by their maps
        self.evals, self.bar = 0, tqdm(total=config.max_evals, desc=config.method, disable=None)

    def maps(self, counts: Counts) -> tuple[Maps, Maps]:
        return choose(self.model, self.stats, counts, known=self.known)

    def described(self, maps: tuple[Maps, Maps]) -> dict:
        """groups: K/V heads, half of the sum of K and V groups; kv_bytes: of the cache of a token."""
        heads = sum(max(of_head) + 1 for of_head in maps[0] + maps[1])
        config = replace(self.model.config, k_groups=maps[0], v_groups=maps[1])
        kv_bytes = config.kv_bytes_per_token(self.itemsize)
        return {"groups": heads / 2, "kv_bytes": kv_bytes, "k_groups": maps[0], "v_groups": maps[1]}

    def grouped(self, maps: tuple[Maps, Maps], part: int = 1) -> Llama:
        """What gqa.py makes of these groups with this --refit; with 1 / `part` of its blocks and steps."""
        small = merge(self.model, maps, self.stats, self.config.merge)
        if self.config.refit == "none":
            return small
        steps = STEPS // part if self.config.refit == "all" else 0
        return refit(small, self.model, self.blocks[: max(1, len(self.blocks) // part)], steps)

    def value(self, record: dict) -> float:
        """What is minimised: KL, which tells the loss on other text better than a short text's loss, or over
        all budgets perplexity * groups ** groups_power."""
        power = self.config.groups_power
        return record["kl"] if power is None else perplexity(record["loss"]) * record["groups"] ** power

    def measure(self, maps: tuple[Maps, Maps], note: str) -> dict:
        """Evaluate a grouping, unless the log has it."""
        key = str(maps)
        if key not in self.records:
            found = self.judge(self.grouped(maps, 2))  # refitting takes most of the time
            self.records[key] = {"note": note, **found, **self.described(maps)}
            print(json.dumps(self.records[key]), file=self.log)
        record = self.seen[key] = self.records[key]
        self.evals += 1
        self.bar.set_postfix_str(f"best {min(map(self.value, self.seen.values())):.4f}")
        self.bar.update()
        return record


def predict(search: Search) -> dict[Slot, np.ndarray]:
    """For each slot the KL divergence if only it had 1, 2, ... groups, never less with fewer; of keys that
    will be refitted, LEFT of it."""
    model, heads, values = search.model, search.heads, {}
    found = sensitivity(model, search.blocks)
    for slot, n in heads.items():
        search.known[slot] = best_partitions(n, slot_costs(model, search.stats, slot))  # for all g at once
        values[slot] = np.zeros(n)
    for kind, g in product({kind for _, kind in heads}, range(1, max(heads.values()))):
        fewer = {slot: g for slot, n in heads.items() if slot[1] == kind and g < n}
        small = merge(model, search.maps({**heads, **fewer}), search.stats, search.config.merge)
        for layer, _ in fewer:
            values[layer, kind][g - 1] = divergence(small.layers[layer].attention, found[layer])
    left = LEFT if search.config.refit == "all" else {}
    return {slot: left.get(slot[1], 1) * np.maximum.accumulate(x[::-1])[::-1] for slot, x in values.items()}


def knapsack_search(search: Search) -> None:
    """Spend each budget where the sum of the predicted KL divergences is smallest; then, until max_evals,
    measure the untried counts with the best prediction. A neighbour of measured counts, one group given from
    one slot to another, is predicted to have their numbers plus the change of the two slots' divergence."""
    kl_of, original_loss = predict(search), search.judge(search.model)["loss"]
    best_of = knapsack([(kl, g, g) for g, kl in enumerate(x.tolist(), 1)] for x in kl_of.values())
    predicted, measured = {}, set()  # {numbers of groups in all slots: (value, note)}
    for kl, counts in [best_of[search.total]] if search.total else best_of.values():
        sizes = search.described(search.maps(dict(zip(search.heads, counts))))
        record = {**sizes, "loss": original_loss + kl, "kl": kl}
        predicted[tuple(counts)] = search.value(record), "knapsack"
    while predicted and search.evals < search.config.max_evals:
        best = min(predicted, key=predicted.get)
        _, note = predicted.pop(best)
        measured.add(best)
        now = dict(zip(search.heads, best))
        record = search.measure(search.maps(now), note)
        for giver, taker in permutations(now, 2):
            there = {**now, giver: now[giver] - 1, taker: now[taker] + 1}
            near = tuple(there.values())
            if there[giver] and there[taker] <= search.heads[taker] and near not in measured:
                change = sum(kl_of[s][there[s] - 1] - kl_of[s][now[s] - 1] for s in (giver, taker))
                value = search.value({**record, **{key: record[key] + change for key in ("loss", "kl")}})
                if value < predicted.get(near, (math.inf,))[0]:
                    predicted[near] = value, "move"


def random_search(search: Search) -> None:
    """The published search: a uniformly drawn label for every head of every layer. Under a budget the number
    of groups in each slot is drawn first, so that they add up to it."""
    for number in range(search.config.max_evals):
        rng, labels = np.random.default_rng((search.config.seed, number)), {}
        counts = dict.fromkeys(search.heads, 1)
        for _ in range((search.total or 0) - len(counts)):
            room = [slot for slot in counts if counts[slot] < search.heads[slot]]
            counts[room[rng.integers(len(room))]] += 1
        for slot, n in search.heads.items():
            labels[slot] = rng.integers(n, size=n)
            if search.total is not None:
                rest = rng.integers(counts[slot], size=n - counts[slot])
                labels[slot] = rng.permutation([*range(counts[slot]), *rest])
        search.measure(as_maps(search.model, labels), "random")


# ---- the answer ----


def chosen(search: Search) -> list[dict]:
    """The search's best three and, unless it is random, even counts with as many groups as the best: the best
    on the text of `choice` first, their loss and KL those on that of `report`."""
    best, rows = sorted(search.seen.values(), key=search.value)[:3], {}
    found = [(f"found ({record['note']})", (record["k_groups"], record["v_groups"])) for record in best]
    if search.config.method != "random":  # which is a baseline itself
        total = search.total or int(2 * best[0]["groups"]) // (1 + search.config.joint)
        found.append(("best groups, spread evenly", search.maps(even_counts(search.heads, total))))
    for name, maps in tqdm(found, desc="judging", disable=None, leave=False):
        if str(maps) not in rows:
            small, sizes = search.grouped(maps), search.described(maps)
            value = search.value({**sizes, **search.choice(small)})
            rows[str(maps)] = {"name": name, **search.report(small), "choice": value, **sizes}
    return sorted(rows.values(), key=lambda row: row["choice"])


def main() -> None:
    config = SearchConfig(**parse(__doc__, SearchConfig))
    writable(Path(config.out), config.overwrite)
    search = Search(config)
    with search.bar:
        (knapsack_search if config.method == "knapsack" else random_search)(search)
    rows = chosen(search)
    best, original = rows[0], search.report(search.model)["loss"]
    share = best["kv_bytes"] / search.model.config.kv_bytes_per_token(search.itemsize)
    record = {"share": share, **best, "original_loss": original, "judged": rows}
    with replacing(Path(config.out), "w") as file:
        file.write(json.dumps(record | {"search": asdict(config), "evals": search.evals}) + "\n")
    print(*picture(replace(search.model.config, **{k: best[k] for k in ("k_groups", "v_groups")})), sep="\n")
    base = f"the original's {perplexity(original):.4f}, on {search.report.count:,} other tokens"
    objective = "" if search.total else f" | perplexity * groups^{config.groups_power:g}"
    print(f"perplexity, relative to {base}{objective}")
    for row in rows:
        ratio = f"x {perplexity(row['loss'] - original):.4f} | KL {row['kl']:.4f}"
        cache = f"{row['groups']:g} K/V heads, {row['kv_bytes']:,} bytes a token"
        value = f" | {search.value(row):.6g}" if search.total is None else ""
        print(f"  {ratio} | {cache}{value} | {row['name']}")
    print(f"{search.evals} groupings looked at; all measurements are in {config.log}")
    how, small = f" --dataset {config.dataset}" if config.dataset else "", Path(config.out).with_suffix("")
    how += " --merge mean" * (config.merge == "mean") + f" --refit {config.refit}" * (config.refit != "all")
    how += f" --seed {config.seed} --calibration_tokens {config.calibration_tokens}"
    print(f"--- next:\npython gqa.py {config.ckpt} --groups {config.out} --out {small}-grouped.pt{how}")


if __name__ == "__main__":
    exit_cleanly(main)
