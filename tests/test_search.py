"""The search for groups, against counts of our own and, where it spends and parts, against all choices."""

import copy
import fcntl
import json
import math
from itertools import combinations, product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import content, quick, records, refused, run, sharp_model
from foreign import checkpoint_of
from test_gqa import grouped, variant

import search_groups
from checkpoint import build_model, load, save
from gqa import merge
from model import Llama
from partition import best_partitions, exact_partitions, greedy_partitions, improve, knapsack
from refit import divergence, sensitivity
from search_groups import Judge, budget, even_counts, head_counts

SMALL = ["--calibration_tokens", 1024, "--search_tokens", 512]
HALF = ["--kv_budget", 0.5, "--refit", "none"]


def search(ckpt, out, *flags) -> tuple[dict, list[dict]]:
    """The group file, and the evaluations in the log."""
    run("search_groups.py", ckpt, "--out", out, *SMALL, *flags)
    found = json.loads(out.read_text())
    return found, records(Path(found["search"]["log"]))[1:]


def nll(model: Llama, tokens: np.ndarray) -> float:
    """Nats a token over whole blocks of the model's context, in float64."""
    T, x = model.config.block_size, torch.from_numpy(np.asarray(tokens, np.int64))
    blocks, targets = x[:-1].unfold(0, T, T), x[1:].unfold(0, T, T)
    with torch.no_grad():
        return -model(blocks).double().log_softmax(-1).gather(-1, targets[..., None]).mean().item()


def test_judge_measures_loss_and_divergence():
    model, other = (sharp_model(seed).requires_grad_(False) for seed in (0, 7))
    tokens = np.random.default_rng(0).integers(64, size=5 * 64 + 1).astype(np.uint16)
    loss, divergence = Judge(model, tokens)(other).values()
    blocks = torch.from_numpy(tokens[:-1].astype(np.int64)).view(5, 64)
    ours, theirs = other(blocks).double().softmax(-1), model(blocks).double().softmax(-1)
    assert loss == pytest.approx(nll(other, tokens), rel=1e-5)
    assert divergence == pytest.approx((theirs * (theirs / ours).log()).sum(-1).mean().item(), rel=1e-5)
    assert Judge(model, tokens)(model)["kl"] < 1e-6


def test_what_is_reported_was_read_neither_by_the_search_nor_by_the_choice(tiny_run, tiny_data, tmp_path):
    val = np.fromfile(tiny_data / "val.bin", np.uint16)
    marked = {"train": {"train": np.full(3000, 40)}, "test": {"test": np.full(3000, 41)}, "none": {}}
    for third in range(3):
        marked[f"third {third}"] = {"val": val.copy()}
        marked[f"third {third}"]["val"][third * 512 + 1 : (third + 1) * 512] = 42
    seen, reported = {}, {}
    for name, splits in marked.items():
        data = variant(tiny_data, tmp_path / name, **splits)
        flags = ["--max_evals", 3, "--method", "random", "--merge", "mean"]  # all are judged
        found, evaluations = search(tiny_run, data / "x.json", *HALF, *flags, "--dataset", data)
        seen[name] = [record["loss"] for record in evaluations]
        reported[name] = {str(row["k_groups"] + row["v_groups"]): row["loss"] for row in found["judged"]}
    assert [name for name in seen if seen[name] != seen["none"]] == ["third 0"]
    assert list(reported["third 2"]) == list(reported["none"]), "the choice has read the last third"
    for name, rows in reported.items():
        both = rows.keys() & reported["none"].keys()
        assert both and all(rows[row] == reported["none"][row] for row in both) == (name != "third 2"), name


def group_count(found: dict) -> int:
    return sum(len(set(of_head)) for of_head in found["k_groups"] + found["v_groups"])


def test_search_keeps_to_the_budget_and_reports_what_gqa_makes_of_it(tiny_run, tiny_data, tmp_path):
    out, third = tmp_path / "found.json", np.fromfile(tiny_data / "val.bin", np.uint16)[1024 : 1024 + 513]
    found, _ = search(tiny_run, out, "--kv_budget", 0.5, "--max_evals", 20, "--refit", "output")
    assert group_count(found) == 8 and found["share"] == 0.5 and found["evals"] <= 20
    assert all(group_count(row) == 8 for row in found["judged"]) and len(found["judged"]) >= 3
    flags = ["--groups", out, "--refit", "output", "--calibration_tokens", 1024]
    small, _ = grouped(tiny_run, tmp_path / "x.pt", *flags)
    assert small["config"]["k_groups"] == found["k_groups"] == found["judged"][0]["k_groups"]
    assert found["loss"] == pytest.approx(nll(build_model(small), third), rel=1e-6)


def test_the_published_search_runs_as_published(tiny_run, tiny_data, tmp_path):
    """Random joint maps, means of heads, nothing refitted."""
    flags = ["--method", "random", "--joint", "--merge", "mean", "--refit", "none", "--max_evals", 12]
    found, evaluations = search(tiny_run, tmp_path / "x.json", *flags, "--groups_power", 2)
    assert len(evaluations) == 12 == found["evals"] and len(set(map(group_count, evaluations))) > 2
    model, first = build_model(load(tiny_run)), np.fromfile(tiny_data / "val.bin", np.uint16)[: 512 + 1]
    for record in evaluations:
        assert record["k_groups"] == record["v_groups"] and record["groups"] == group_count(record) / 2
        small = merge(model, (record["k_groups"], record["v_groups"]), [], "mean")
        assert record["loss"] == pytest.approx(nll(small, first), rel=1e-5)
    best = sorted(evaluations, key=lambda record: math.exp(record["loss"]) * record["groups"] ** 2)[:3]
    judged = [row["k_groups"] for row in found["judged"] if row["name"].startswith("found")]
    assert {str(row) for row in judged} == {str(record["k_groups"]) for record in best}


def test_search_without_a_budget_covers_all(tiny_run, tmp_path):
    """A power of 0 minimises the perplexity, a large one the number of groups."""
    flags = ["--max_evals", 24, "--refit", "none", "--groups_power"]
    found, seen = search(tiny_run, tmp_path / "ppl.json", *flags, 0)
    assert group_count(seen[0]) == 16 and found["loss"] <= found["original_loss"] + 0.01
    assert group_count(search(tiny_run, tmp_path / "groups.json", *flags, 10)[0]) == 4


@pytest.mark.parametrize("method", ["knapsack", "random"])
def test_interrupted_search_continues(tiny_run, tmp_path, method):
    """Stopped after five evaluations, with half a line written: the same answer, nothing measured twice."""
    whole, cut, log = (tmp_path / name for name in ("whole/groups.json", "groups.json", "groups.jsonl"))
    flags = [*HALF, "--max_evals", 12, "--method", method]
    search(tiny_run, whole, *flags)
    five = iter([Judge.__call__] * 5 + [mock.Mock(side_effect=KeyboardInterrupt)])
    with mock.patch.object(Judge, "__call__", lambda *args: next(five)(*args)):
        assert quick("search_groups.py", tiny_run, "--out", cut, *SMALL, *flags).returncode == 130
    before = log.read_text().splitlines()
    log.write_text("\n".join([*before, '{"note": "half a li']))
    assert not cut.exists() and len(before) >= 5
    run("search_groups.py", tiny_run, "--out", cut, *SMALL, *flags)
    after = [line for line in log.read_text().splitlines() if line.endswith("}")]
    assert after[: len(before)] == before and len(set(after)) == len(after) and content(cut) == content(whole)


def test_a_log_serves_one_search_at_a_time_and_later_ones_reuse_it(tiny_run, tmp_path):
    log = tmp_path / "log.jsonl"
    flags = ["--method", "random", "--max_evals", 4, "--log", log, "--refit", "none", "--merge", "mean"]
    with open(log, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = quick("search_groups.py", tiny_run, "--out", tmp_path / "x.json", *SMALL, *flags, *HALF)
        refused(done, "in use", "--log")
    for name, share in (("half", 0.5), ("more", 0.75), ("again", 0.5)):
        search(tiny_run, tmp_path / f"{name}.json", *flags, "--kv_budget", share)
    assert len({record["loss"] for record in records(log)[1:]}) == 8 == len(records(log)) - 1


def test_foreign_logs_stay_as_they_are(tiny_run, tmp_path):
    """Another model, other text or settings, or damaged: refused, and not a byte changed."""
    log, changed, checkpoint = tmp_path / "mine.jsonl", tmp_path / "changed.pt", load(tiny_run)
    flags = [*HALF, "--max_evals", 3, "--log", log]
    search(tiny_run, tmp_path / "mine.json", *flags)
    header, first = records(log)[:2]
    checkpoint["model"]["layers.0.feed_forward.w1.weight"] *= 1.01
    save(changed, checkpoint)
    others = "--seed 1", "--calibration_tokens 512", "--search_tokens 256", "--refit output", "--merge mean"
    trials = [(tiny_run, more.split(), log.read_text()) for more in others] + [(changed, [], log.read_text())]
    for damage in ({"loss": "x"}, {"kl": math.nan}, {"groups": None}):
        trials.append((tiny_run, [], f"{json.dumps(header)}\n{json.dumps(first | damage)}\n"))
    for ckpt, more, text in trials:
        log.write_text(text)
        done = quick("search_groups.py", ckpt, "--out", tmp_path / "x.json", *SMALL, *flags, *more)
        refused(done, "mine.jsonl", "--log")
        assert log.read_text() == text


def test_the_predicted_divergence_is_that_of_a_small_error():
    """Of the whole model, in float64. In the last layer no position's error reaches another's prediction."""
    model = sharp_model(n_layer=1).double().requires_grad_(False)
    rng, other = torch.Generator().manual_seed(0), copy.deepcopy(model)
    tokens, attention = torch.randint(64, (64, 64), generator=rng), other.layers[0].attention
    found = sensitivity(model, tokens)[0]
    for weight in attention.parameters():
        weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=rng)
    steep = torch.cat([g.flatten(0, 1) for *_, g in found])  # where an error costs most
    attention.wo.weight += 0.01 * torch.linalg.eigh(steep.T @ steep).eigenvectors[:, -1:]
    with torch.no_grad():
        ours, theirs = (part(tokens).log_softmax(-1) for part in (other, model))
    exact = F.kl_div(ours, theirs, log_target=True, reduction="sum").item() / tokens.numel()
    assert divergence(attention, found) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("refitted, of_keys", [("all", 0.3), ("output", 1), ("none", 1)])
def test_predictions_are_divergences_of_models(tiny_run, tmp_path, refitted, of_keys):
    """With fewer groups in one layer. Refitting wq and wk is said to leave three tenths of what keys lose."""
    config = search_groups.SearchConfig(str(tiny_run), str(tmp_path / "x.json"), 0.5, refit=refitted)
    config.calibration_tokens, config.search_tokens = 1024, 512
    search, least = search_groups.Search(config), {}
    found, gradients = search_groups.predict(search), sensitivity(search.model, search.blocks)
    for g, slot in product((3, 2, 1), search.heads):  # fewer groups are never better
        small = merge(search.model, search.maps({**search.heads, slot: g}), search.stats)
        lost = divergence(small.layers[slot[0]].attention, gradients[slot[0]])
        least[slot] = max(lost, least.get(slot, 0.0))
        left = of_keys if slot[1] == "k" else 1
        assert found[slot][g - 1] == pytest.approx(left * least[slot], rel=1e-4) and found[slot][3] == 0


@pytest.mark.parametrize("layers, right", [(2, False), (30, False), (2, True)])
def test_moves_find_what_predictions_do_not_show(tiny_run, tmp_path, monkeypatch, layers, right):
    """A made-up KL, and predictions that wish for its opposite; right ones are followed in their order."""
    model = sharp_model(n_layer=layers, dim=16, hidden_dim=16, vocab_size=400, block_size=32)
    wish = {slot: 3 if sum(map(ord, slot[1])) + slot[0] & 1 else 1 for slot in head_counts(model)}

    def judged(_, maps) -> dict[str, float]:
        if isinstance(maps, Llama):
            return {"loss": 0, "kl": 0}
        counts = {(layer, kind): max(maps["kv".index(kind)][layer]) + 1 for layer, kind in wish}
        lost = 0.01 * sum((counts[slot] - best) ** 2 for slot, best in wish.items())
        return {"loss": -lost, "kl": lost}  # a budget is spent by KL

    g = np.arange(1.0, 5.0)
    told = {slot: (g - best) ** 2 if right else (g - 4) ** 2 * (4 - best) for slot, best in wish.items()}
    told = {slot: 0.01 * lost for slot, lost in told.items()}
    monkeypatch.setattr(search_groups, "predict", lambda search: told)
    monkeypatch.setattr(search_groups, "merge", lambda model, maps, *rest: maps)
    monkeypatch.setattr(Judge, "__call__", judged)
    saved = load(tiny_run)
    save(tmp_path / "x.pt", saved | checkpoint_of(model, saved["tokenizer"]))
    found, seen = search(tmp_path / "x.pt", tmp_path / "x.json", *HALF)
    if right:
        lost = [record["kl"] for record in seen]
        assert lost == sorted(lost) and lost[0] == 0 and len(lost) > 5
        return
    best = {note: min(r["kl"] for r in seen if r["note"] == note) for note in ("knapsack", "move")}
    assert len(seen) <= found["evals"] <= 60 and best["move"] < best["knapsack"]
    assert found["kl"] <= best["move"] and (layers > 2 or found["kl"] == 0)


def test_healing_brings_a_grouped_model_back(tiny_run, tiny_data, tmp_path):
    """To a teacher whose attention matters."""
    teacher, small, checkpoint = tmp_path / "teacher.pt", tmp_path / "small.pt", load(tiny_run)
    for name, x in checkpoint["model"].items():
        if ".attention." in name:
            checkpoint["model"][name] = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    save(teacher, checkpoint)
    grouped(teacher, small, "--n_kv_head", 1, "--merge", "mean", "--refit", "none")
    flags = ["--init_from", small, "--teacher", teacher, "--distil_weight", 1, "--batch_size", 4]
    flags += ["--warmup_steps", 0, "--lr", 0.005, "--min_lr", 0.005, "--eval_tokens", 0, "--max_steps", 40]
    run("train.py", *flags, "--out_dir", tmp_path)
    healed = load(tmp_path / "ckpt.pt")
    assert healed["grouped"] == load(small)["grouped"]
    judge = Judge(build_model(checkpoint), np.fromfile(tiny_data / "val.bin", np.uint16)[: 8 * 32 + 1])
    before, after = (judge(build_model(part))["kl"] for part in (load(small), healed))
    assert after < 0.9 * before, (before, after)


@pytest.mark.parametrize("n", range(1, 8))
def test_the_partition_is_the_cheapest_of_all(n):
    rng = np.random.default_rng(n)
    table = {s: rng.random() * len(s) for size in range(1, n + 1) for s in combinations(range(n), size)}

    def cost(sets):
        return np.array([table[tuple(s)] for s in sets.tolist()])

    least = dict.fromkeys(range(1, n + 1), math.inf)
    for labels in product(*map(range, range(1, n + 1))):  # each head's: some head up to itself
        groups = [tuple(h for h in range(n) if labels[h] == label) for label in set(labels)]
        least[len(groups)] = min(least[len(groups)], sum(map(table.get, groups)))
    for g, (total, groups) in best_partitions(n, cost).items():
        assert len(groups) == g and sorted(h for group in groups for h in group) == list(range(n))
        assert math.isclose(total, least[g]) and math.isclose(total, sum(table[tuple(x)] for x in groups))
        assert best_partitions(n, cost, [g]) == {g: (total, groups)}, "asked alone"


def test_many_heads_are_parted_well():
    points = np.random.default_rng(0).normal(size=(5, 3))[np.arange(20) % 5]
    points = points + 0.01 * np.random.default_rng(1).normal(size=points.shape)

    def spread(sets):
        return points[sets].var(axis=1).sum(-1) * sets.shape[1]

    assert best_partitions(20, spread, [5])[5][1] == [[i, i + 5, i + 10, i + 15] for i in range(5)]
    points = np.random.default_rng(0).normal(size=(8, 2))
    exact, greedy = (parted(8, spread, range(2, 8)) for parted in (exact_partitions, greedy_partitions))
    ratios = [greedy[g][0] / exact[g][0] for g in exact]
    assert min(ratios) > 1 - 1e-9 and np.median(ratios) < 1.001 and max(ratios) < 1.5, ratios
    pairs = {(0, 1): 0, (2, 3): 0}  # moving one head alone would cost more
    better = improve([[0, 3], [1, 2]], lambda sets: [pairs.get(tuple(s), len(s) % 2 + 1) for s in sets])
    assert sorted(better) == [[0, 1], [2, 3]]


def test_knapsack_is_the_best_of_all_choices():
    rng = np.random.default_rng(0)
    values = [np.sort(rng.random(n))[::-1] for n in (3, 1, 4, 2)]
    found, sums = knapsack([(x, g, g) for g, x in enumerate(value.tolist(), 1)] for value in values), {}
    for choice in np.ndindex(3, 1, 4, 2):
        total = sum(choice) + 4
        sums[total] = min(sums.get(total, math.inf), sum(value[g] for value, g in zip(values, choice)))
    assert found.keys() == sums.keys()
    for total, (least, counts) in found.items():
        assert math.isclose(least, sums[total]) and sum(counts) == total
        assert math.isclose(sum(v[g - 1] for v, g in zip(values, counts)), least)


def test_shares_are_spread_in_proportion_to_the_heads():
    heads = {(0, "k"): 4, (1, "k"): 2, (0, "v"): 4, (1, "v"): 2}
    assert even_counts(heads, 6) == {(0, "k"): 2, (1, "k"): 1, (0, "v"): 2, (1, "v"): 1}
    assert budget(heads, 0.5) == 6 and budget(heads, 0.6) == 7, "never more than the share"
    assert budget({(0, "k"): 49}, 1 / 49) == 1  # 1 / 49 * 49 < 1
