"""Merge the key and value heads of a trained model into groups of any size: a smaller KV cache.

    python gqa.py ckpt.pt --out grouped.pt --kv_budget 0.5            # half the KV cache, spread evenly over the layers
    python gqa.py ckpt.pt --out grouped.pt --groups groups.json       # spent as search_groups.py found best
    python gqa.py ckpt.pt --out mean.pt --n_kv_head 4 --merge mean --grouping neighbour --refit none     # GQA's paper

The cache holds one key and one value head a group. The paper on grouped-query attention (GQA, arXiv 2305.13245) takes
the mean of neighbouring heads' weights and trains on. Here the heads that can share one are found by what it costs
(partition.py), keys and values apart; a group's shared head is the best there is (merging.py); then each layer is
refitted to what it did before (refit.py). What is lost after that, training gets back:

    python train.py --init_from grouped.pt --teacher ckpt.pt --max_steps 40
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from checkpoint import build_model, load, picture, save
from config import UserError, exit_cleanly, parse
from device import peak_memory_bytes, pick_device
from eval_ppl import mean_nll, perplexity, split_tokens, window_nll
from files import writable
from lora import plain
from merging import Costs, Maps, Statistics, convert, rope_of, statistics
from model import Llama, ModelConfig
from partition import Groups, best_partitions, interpolated
from refit import refit
from tokenizer import read_tokenizer

# ---- which heads ----


def neighbours(n: int, g: int) -> Groups:
    """Runs of heads, as equal as can be, as in the paper on GQA."""
    return [run.tolist() for run in np.array_split(np.arange(n), g)]


def random_groups(n: int, g: int, rng: np.random.Generator) -> Groups:
    """g groups, none empty, and otherwise chance alone."""
    order = rng.permutation(n)
    label = np.concatenate((np.arange(g), rng.integers(g, size=n - g)))
    return sorted(sorted(order[label == i].tolist()) for i in range(g))


class Partitioner:
    """Which K or V heads of which layer share one, for any number of groups; each layer's answers are kept."""

    def __init__(
        self, model: Llama, found: list[Statistics], grouping: str = "best", joint: bool = False, seed: int = 0
    ):
        self.model, self.found, self.grouping, self.joint, self.seed = model, found, grouping, joint, seed
        self.known: dict[tuple, tuple[float, Groups]] = {}
        if joint and not self.can_be_joint():
            raise UserError("this model's keys and values are grouped apart already: drop --joint")

    def can_be_joint(self) -> bool:
        """Whether a map can serve K and V: in every layer the same query heads share both."""
        pairs = [(layer.attention.k_groups.of_head, layer.attention.v_groups.of_head) for layer in self.model.layers]
        return all(torch.equal(k, v) for k, v in pairs)

    def heads(self, layer: int, kind: str) -> int:
        attention = self.model.layers[layer].attention
        return (attention.v_groups if kind == "v" else attention.k_groups).n_group

    def costs(self, layer: int, kind: str):
        """A cost for `best_partitions`; a joint one adds both kinds, each as a share of what one group costs."""
        attention, found = self.model.layers[layer].attention, self.found[layer]
        if kind != "joint":
            return Costs(attention, kind, found)
        both = [Costs(attention, one, found) for one in "kv"]
        whole = [max(cost(np.arange(cost.n)[None]).item(), 1e-300) for cost in both]
        return lambda sets: sum(cost(sets) / total for cost, total in zip(both, whole))

    def __call__(self, layer: int, kind: str, g: int) -> tuple[float, Groups]:
        """Cost and members of g groups; kind is "k", "v" or "joint"."""
        if (layer, kind, g) not in self.known:
            n = self.heads(layer, kind)
            if self.grouping == "best":
                answers = best_partitions(n, self.costs(layer, kind), [g])
            else:
                rng = np.random.default_rng((self.seed, layer, kind == "v", g))
                groups = neighbours(n, g) if self.grouping == "neighbour" else random_groups(n, g, rng)
                answers = {g: (math.nan, groups)}
            self.known |= {(layer, kind, g): answer for g, answer in answers.items()}
        return self.known[layer, kind, g]

    def all_costs(self, layer: int, kind: str) -> list[float]:
        """Those of 1, 2, ... groups, as many as there are heads."""
        n = self.heads(layer, kind)
        if any((layer, kind, g) not in self.known for g in range(1, n + 1)):  # one computation answers for all
            answers = best_partitions(n, self.costs(layer, kind))
            self.known |= {(layer, kind, g): answer for g, answer in answers.items()}
        return [self.known[layer, kind, g][0] for g in range(1, n + 1)]

    def maps(self, counts: dict[tuple[int, str], int]) -> tuple[Maps, Maps]:
        """k_groups and v_groups of the model with so many groups in each (layer, kind)."""
        labels = {}
        for slot, g in counts.items():
            label = {head: i for i, group in enumerate(self(*slot, g)[1]) for head in group}
            labels[slot] = [label[head] for head in range(len(label))]
        return self.labelled(labels)

    def labelled(self, labels: dict[tuple[int, str], list[int]]) -> tuple[Maps, Maps]:
        """The same of a group number for each K or V head of each (layer, kind)."""
        result: dict[str, Maps] = {"k": [], "v": []}
        for layer, block in enumerate(self.model.layers):
            for kind, sources in (("k", block.attention.k_groups), ("v", block.attention.v_groups)):
                label = labels[layer, "joint" if self.joint else kind]
                result[kind].append(in_order([label[head] for head in sources.of_head.tolist()]))
        return result["k"], result["v"]

    def slots(self) -> list[tuple[int, str]]:
        """(layer, kind) of all that can be grouped by itself, keys first: where shares are uneven they get more."""
        kinds = ["joint"] if self.joint else ["k", "v"]
        return [(layer, kind) for kind in kinds for layer in range(len(self.model.layers))]

    def total(self, share: float, flag: str = "kv_budget") -> int:
        """Groups, over all slots, that a share of the source's cache allows. Raises UserError below one a slot."""
        sizes, least = sum(self.heads(*slot) for slot in self.slots()), math.ceil(1000 * self.least_share()) / 1000
        if not self.least_share() - 1e-9 <= share <= 1:  # nan, too
            raise UserError(f"{flag} is {share}: one head a layer needs {least}; give --{flag} {least} to 1")
        return int(share * sizes + 1e-9)

    def least_share(self) -> float:
        return len(self.slots()) / sum(self.heads(*slot) for slot in self.slots())

    def even(self, total: int) -> dict[tuple[int, str], int]:
        """`total` groups, spread as evenly over the slots as can be."""
        counts = dict.fromkeys(self.slots(), 1)
        for _ in range(total - len(counts)):
            counts[min(counts, key=lambda slot: counts[slot] / self.heads(*slot))] += 1
        return counts


def predictions(partition: Partitioner, known: dict[tuple[int, str], dict[int, float]]) -> dict[tuple, np.ndarray]:
    """The KL divergence that 1, 2, ... groups in each slot alone cause, from what was measured: known[slot][g]. A slot
    that was not measured has costs of its own, and the others' usual divergence for such a cost in their kind."""
    costs, rates = {slot: partition.all_costs(*slot) for slot in known}, {}
    for slot, measured in known.items():
        rates.setdefault(slot[1], []).extend(kl / max(costs[slot][g - 1], 1e-300) for g, kl in measured.items())
    rates = {kind: float(np.median(found)) if found else 1.0 for kind, found in rates.items()}
    return {
        slot: interpolated(measured, costs[slot]) if measured else rates[slot[1]] * np.array(costs[slot])
        for slot, measured in known.items()
    }


def in_order(labels: list[int]) -> list[int]:
    """The same groups, numbered as they first occur: [2, 0, 2] -> [0, 1, 0]."""
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return [number[label] for label in labels]


# ---- the command ----


@dataclass
class GroupConfig:
    """grouping"""

    ckpt: str  # the checkpoint; an adapter is merged first
    out: str | None = None  # the checkpoint to write
    groups: str | None = None  # a JSON file with k_groups and v_groups, as search_groups.py writes it
    kv_budget: float | None = None  # or: share of the checkpoint's KV cache to keep, spread evenly over the layers
    n_kv_head: int | None = None  # or: K and V groups of every layer; it need not divide n_head
    grouping: Literal["best", "neighbour", "random"] = "best"  # which heads: cheapest by the closed form; or baselines
    joint: bool = False  # one map for keys and values, as in other work
    merge: Literal["closed", "mean"] = "closed"  # how: the best shared head, or the mean of GQA's paper
    refit: Literal["none", "output", "all"] = "all"  # then fit wo, or wo, wq and wk, to what the layer did before
    calibration_tokens: int = 65536  # at most, of the train split, for the statistics and for refitting
    eval_tokens: int = 65536  # of the val split, for the perplexities before and after
    dataset: str | None = None  # prepared data of the same tokenizer (default: the checkpoint's own)
    seed: int = 0  # of the calibration text, and of random groups
    device: str = "auto"  # cuda, mps, cpu or auto
    overwrite: bool = False  # replace an existing checkpoint

    def __post_init__(self):
        for name in ("calibration_tokens", "eval_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give --{name} 1 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give --seed 0 to {2**32 - 1}")


def open_model(path: str, device: str) -> tuple[dict, Llama]:
    """A checkpoint and its model, an ordinary one in float32 or wider, in eval mode, on the device of that name; an
    Apple GPU has no float64, so there it is the CPU."""
    place, checkpoint = pick_device(device), load(path)
    if place.type == "mps":
        if device == "mps":
            raise UserError("--device mps computes no float64, which merging needs: give --device cpu")
        place = torch.device("cpu")
    if not checkpoint["tokenizer"]:
        raise UserError(f"{path} has no tokenizer, so no text says what its heads do: import it with --tokenizer")
    model = plain(build_model(checkpoint))
    wide = torch.promote_types(model.tok_embeddings.weight.dtype, torch.float32)
    return checkpoint, model.to(place, wide).eval().requires_grad_(False)


def calibration_blocks(tokens: np.ndarray, model: Llama, count: int, seed: int) -> torch.Tensor:
    """(N, T) tokens, at most `count`, from N places of the text, T the model's context up to 1,024. Raises UserError
    for too few."""
    T, least = min(model.config.block_size, 1024, len(tokens)), 4 * model.config.dim
    rows = min(count, len(tokens)) // T
    if len(tokens) // T * T < least:
        raise UserError(f"the train split has {len(tokens):,} tokens, and merging needs {least:,}: prepare more text")
    if rows * T < least:
        raise UserError(
            f"calibration_tokens is {count}, {rows} rows of {T}: give --calibration_tokens {-(-least // T) * T} or more"
        )
    places = np.random.default_rng(seed).choice(len(tokens) // T, rows, replace=False)
    blocks = np.stack([tokens[place * T : (place + 1) * T] for place in places])
    return torch.from_numpy(blocks.astype(np.int64)).to(model.tok_embeddings.weight.device)


def read_groups(path: Path, c: ModelConfig) -> tuple[Maps, Maps]:
    """The maps of a group file. Raises UserError for a file that is damaged, or of another shape than the model."""
    try:
        record = json.loads(path.read_text())
        maps = record["k_groups"], record["v_groups"]
        if not all(maps) or not all(type(g) is int for of_layer in maps for of_head in of_layer for g in of_head):
            raise ValueError
    except OSError:
        raise UserError(f"{path}: no such group file; make one with python search_groups.py") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} is no group file: it needs k_groups and v_groups, [layer][query head] -> group"
        ) from None
    try:
        replace(c, k_groups=maps[0], v_groups=maps[1])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return maps


def chosen_maps(config: GroupConfig, model: Llama, found: list[Statistics]) -> tuple[Maps, Maps]:
    """The maps that the flags ask for."""
    if config.groups is not None:
        return read_groups(Path(config.groups), model.config)
    partition = Partitioner(model, found, config.grouping, config.joint, config.seed)
    if config.kv_budget is not None:
        return partition.maps(partition.even(partition.total(config.kv_budget)))
    most = min(partition.heads(*slot) for slot in partition.slots())
    if not 1 <= config.n_kv_head <= most:
        raise UserError(f"n_kv_head is {config.n_kv_head}, and the model has {most}: give --n_kv_head 1 to {most}")
    return partition.maps(dict.fromkeys(partition.slots(), config.n_kv_head))


def perplexity_on(tokens: np.ndarray, model: Llama) -> float:
    context = min(model.config.block_size, 2048)
    return perplexity(mean_nll(window_nll(model, tokens, context, context, torch.float32, quiet=False)))


def group(config: GroupConfig, model: Llama, blocks: torch.Tensor) -> tuple[Llama, dict[str, float]]:
    """The model that the flags ask for, calibrated on tokens (N, T), and the seconds that each step took."""
    seconds, began = {}, time.perf_counter()

    def done(step: str) -> None:
        nonlocal began
        seconds[step], began = time.perf_counter() - began, time.perf_counter()

    found = statistics(model, blocks)
    done("statistics")
    maps = chosen_maps(config, model, found)
    done("partition")
    result = convert(model, *maps, found, config.merge)
    done("merge")
    if config.refit != "none":
        refit(result, model, blocks, rope_of(model, blocks), config.refit == "all", quiet=False)
    done("refit")
    return result, seconds


def save_grouped(config: GroupConfig, checkpoint: dict, result: Llama) -> None:
    """The checkpoint with the model in its place, in the number format that it had."""
    kept = {key: x for key, x in checkpoint.items() if key not in ("lora", "optimizers", "scaler")}
    weights = result.to("cpu", checkpoint["model"]["tok_embeddings.weight"].dtype).state_dict()
    save(Path(config.out), {**kept, "model": weights, "config": asdict(result.config), "grouped": asdict(config)})


def check(config: GroupConfig) -> None:
    """Raise UserError unless the flags say what to make, and where."""
    ways = {name: getattr(config, name) for name in ("groups", "kv_budget", "n_kv_head")}
    if sum(value is not None for value in ways.values()) != 1:
        raise UserError("which groups? give one of --kv_budget 0.5, --n_kv_head N and --groups FILE.json")
    if config.groups is not None and (config.joint or config.grouping != "best"):
        raise UserError(f"--groups {config.groups} says which heads share: drop --joint and --grouping")
    if not config.out:
        raise UserError("one name is missing: --out OUT.pt, the checkpoint to write")
    writable(Path(config.out), config.overwrite)


def main() -> None:
    config = GroupConfig(**parse(__doc__, GroupConfig))
    check(config)
    checkpoint, model = open_model(config.ckpt, config.device)
    tokenizer = read_tokenizer(checkpoint["tokenizer"])
    text, source = split_tokens(checkpoint, tokenizer, config.dataset, "train")
    val, val_source = split_tokens(checkpoint, tokenizer, config.dataset, "val")
    blocks, val = calibration_blocks(text, model, config.calibration_tokens, config.seed), val[: config.eval_tokens + 1]
    if config.groups is not None:
        read_groups(Path(config.groups), model.config)  # before the statistics, which take a while
    result, seconds = group(config, model, blocks)
    peak = peak_memory_bytes(blocks.device)
    stored, wide = checkpoint["model"]["tok_embeddings.weight"].dtype, result.norm.weight.dtype
    result = result.to(stored).to(wide)  # what is measured is what is saved
    before, after = perplexity_on(val, model), perplexity_on(val, result)
    save_grouped(config, checkpoint, result)
    print("head groups\n" + "\n".join(picture(result.config)))
    sizes = [m.config.kv_numbers_per_token * stored.itemsize for m in (model, result)]
    print(f"KV cache: {sizes[0]:,} -> {sizes[1]:,} bytes a token ({100 * sizes[1] / sizes[0]:.1f}%)")
    print(
        f"calibrated on {blocks.numel():,} tokens of {source}, seed {config.seed}: {config.merge}, refit {config.refit}"
    )
    print(" | ".join(f"{step} {s:.1f} s" for step, s in seconds.items()) + f" | peak memory {peak / 2**30:.2f} GiB")
    print(f"perplexity {before:.4f} -> {after:.4f}, x {after / before:.4f} | {len(val) - 1:,} tokens of {val_source}")
    dataset = f" --dataset {config.dataset}" if config.dataset else ""
    folder = Path(config.out).with_name(f"{Path(config.out).stem}-healed")
    heal = f"--init_from {config.out} --teacher {config.ckpt} --max_steps 40 --warmup_steps 5 --out_dir {folder}"
    print(f"--- next:\npython train.py {heal}{dataset}\npython eval_ppl.py {config.out} --split test{dataset}")


if __name__ == "__main__":
    exit_cleanly(main)
