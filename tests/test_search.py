"""The search for groups, the commands around it, and healing."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, quick, refused, sharp_model, small_run

import search_groups
from checkpoint import build_model, load, save
from config import UserError
from cross_entropy import IGNORE
from evaluations import Judge
from objective import Objective
from train import distilled

SMALL = ["--calibration_tokens", 1024, "--search_tokens", 512]
NAMES = ("ppl", "loss", "groups", "kv_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def grouped(tiny_run, folder):
    """The tiny run with half of its cache, unevenly grouped."""
    done = quick("gqa.py", tiny_run, "--out", folder / "half.pt", "--kv_budget", 0.5, "--calibration_tokens", 2048)
    assert done.returncode == 0, done.stderr
    assert "50.0%" in done.stdout and "perplexity" in done.stdout
    return folder / "half.pt"


# ---- the objective ----


def test_objective_is_the_arithmetic_that_it_says():
    values = {"ppl": 20.5, "loss": 3.0, "groups": 97.0, "kv_bytes": 4096.0}
    for text in ("ppl*groups**2/144", "-loss + 2*(kv_bytes - 1)/3", "ppl ** 0.5", "groups", "+loss*1e3"):
        assert Objective(text, NAMES)(**values) == pytest.approx(eval(text, {}, values), rel=1e-12)
    assert Objective("ppl*(kv_bytes - 256)**0.5", NAMES)(**values) > 0  # no number for few bytes
    with pytest.raises(UserError, match=r"no number at ppl 20\.5, loss 3, groups 97, kv_bytes 4096"):
        Objective("ppl/(groups - 97)", NAMES)(**values)


@pytest.mark.parametrize(
    "text",
    ["", "ppl*", "__import__('os')", "ppl.real", "ppl if 1 else 2", "groups[0]", "heads", "9**9**9**9 + ppl",
     "(-ppl)**0.5", "ppl/(groups-groups)", "1+1", "lambda: ppl", "ppl and 1", "'a'*ppl", "True*ppl",
     "(" * 300 + "ppl" + ")" * 300, "ppl\0"],
)  # fmt: skip
def test_objective_refuses_everything_else(text):
    with pytest.raises(UserError, match="objective"):
        Objective(text, NAMES)


# ---- measuring ----


def test_judge_measures_loss_and_divergence():
    model, other = sharp_model().requires_grad_(False), sharp_model(seed=7).requires_grad_(False)
    tokens = np.random.default_rng(0).integers(64, size=5 * 64 + 1).astype(np.uint16)
    loss, divergence = Judge(model, tokens)(other)
    x = torch.from_numpy(tokens.astype(np.int64))
    blocks, targets = x[:-1].view(5, 64), x[1:].view(5, 64)
    ours, theirs = other(blocks).double().softmax(-1), model(blocks).double().softmax(-1)
    assert loss == pytest.approx(-ours.gather(-1, targets[..., None]).log().mean().item(), rel=1e-5)
    assert divergence == pytest.approx((theirs * (theirs / ours).log()).sum(-1).mean().item(), rel=1e-5)
    assert Judge(model, tokens)(model)[1] < 1e-6


# ---- searching ----


def search(tiny_run, out, *flags, refit="output"):
    return quick("search_groups.py", tiny_run, "--out", out, *SMALL, "--refit", refit, *flags)


def test_search_keeps_to_the_budget_and_does_not_lose_to_its_baselines(tiny_run, folder):
    out = folder / "found.json"
    done = search(tiny_run, out, "--kv_budget", 0.5, "--max_evals", 20)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert sum(max(groups) + 1 for groups in found["k_groups"] + found["v_groups"]) == 8 and found["share"] == 0.5
    names = [row["name"] for row in found["judged"]]
    assert any("neighbours" in name for name in names) or any("evenly" in name for name in names)
    assert found["loss"] == min(row["loss"] for row in found["judged"])
    assert {len(row["k_groups"]) for row in found["judged"]} == {2}
    assert np.array(found["similarity"]["k0"]).shape == (4, 4) and np.array(found["together"]["v1"]).shape == (4, 4)
    done = quick("gqa.py", tiny_run, "--out", folder / "found.pt", "--groups", out, "--calibration_tokens", 1024)
    assert done.returncode == 0, done.stderr
    assert load(folder / "found.pt")["config"]["k_groups"] == found["k_groups"]
    refused(search(tiny_run, out, "--kv_budget", 0.5), "exists", "--overwrite")


@pytest.mark.parametrize("method", ["knapsack", "random", "anneal"])
def test_interrupted_search_continues(tiny_run, folder, method, monkeypatch):
    """Whole; and interrupted in its sixth evaluation, with half a line written: the same answer, nothing measured
    twice."""
    whole, cut = folder / f"{method}-whole.json", folder / f"{method}-cut.json"
    flags = ["--kv_budget", 0.5, "--max_evals", 12, "--method", method]
    assert search(tiny_run, whole, *flags, refit="none").returncode == 0
    original, calls = search_groups.Evaluations.__call__, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 6:
            self.file.write('{"note": "half a li')
            self.file.flush()
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(search_groups.Evaluations, "__call__", interrupted)
    assert search(tiny_run, cut, *flags, refit="none").returncode == 130 and not cut.exists()
    monkeypatch.undo()
    before = cut.with_suffix(".jsonl").read_text().splitlines()[:-1]
    assert search(tiny_run, cut, *flags, refit="none").returncode == 0
    after = cut.with_suffix(".jsonl").read_text().splitlines()
    assert after[: len(before)] == before and len(set(after)) == len(after)
    ours, theirs = (json.loads(path.read_text()) for path in (cut, whole))
    assert (ours["k_groups"], ours["v_groups"], ours["loss"]) == (
        theirs["k_groups"],
        theirs["v_groups"],
        theirs["loss"],
    )


def test_objective_search_covers_all_budgets(tiny_run, folder):
    """Where groups cost nothing the original is the answer, where they cost everything multi-query attention."""
    for objective, total in (("loss", None), ("groups", 4)):
        out = folder / f"{objective}.json"
        done = search(tiny_run, out, "--objective", objective, "--max_evals", 24, refit="none")
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        groups = sum(max(of) + 1 for of in found["k_groups"] + found["v_groups"])
        if total:
            assert groups == total
        else:
            assert found["loss"] <= found["original_loss"] + 0.01


def test_bad_searches_are_refused(tiny_run, folder):
    for flags, words in (
        (["--kv_budget", 0.01], ["kv_budget is 0.01", "0.25"]),
        ([], ["--kv_budget", "--objective"]),
        (["--kv_budget", 0.5, "--objective", "ppl"], ["one of"]),
        (["--objective", "os.system('x')"], ["--objective"]),
        (["--objective", ""], ["--objective"]),
        (["--kv_budget", 0.5, "--max_evals", 0], ["max_evals is 0"]),
        (["--kv_budget", 0.5, "--search_tokens", 4], ["search_tokens is 4"]),
        (["--kv_budget", 0.5, "--calibration_tokens", 8], ["calibration_tokens is 8"]),
    ):
        out = folder / "bad.json"
        refused(quick("search_groups.py", tiny_run, "--out", out, *flags), *words)
        assert not out.exists() and not out.with_suffix(".jsonl").exists()
    log = folder / "other.jsonl"
    log.write_text('{"model": "another"}\n')
    refused(search(tiny_run, folder / "x.json", "--kv_budget", 0.5, "--log", log), "other.jsonl", "another --log")
    assert log.read_text() == '{"model": "another"}\n'


def test_foreign_logs_are_left_alone(tiny_run, folder):
    """Another model, other text, or no log at all: refused, and not a byte changed."""
    log, out = folder / "mine.jsonl", folder / "y.json"
    flags = ["--kv_budget", 0.5, "--max_evals", 5, "--log", log]
    assert search(tiny_run, folder / "mine.json", *flags, refit="none").returncode == 0
    good = log.read_text()
    for more in (["--seed", 1], ["--calibration_tokens", 512], ["--search_tokens", 256], ["--refit", "output"]):
        refused(search(tiny_run, out, *flags, *more, refit="none"), "mine.jsonl", "another --log")
    other, checkpoint = folder / "other.pt", load(tiny_run)
    checkpoint["model"]["layers.0.feed_forward.w1.weight"] *= 1.01
    save(other, checkpoint)
    refused(search(other, out, *flags, refit="none"), "another model")
    header, record = good.splitlines()[0], json.loads(good.splitlines()[1])
    changes = [{"kl": "x"}, {"kl": math.nan}, {"k_groups": None}, {"v_groups": [[0, 0, 0, True]] * 2},
               {"k_groups": record["k_groups"][:1]}, {"note": 1}]  # fmt: skip
    damaged = [{"a": 1}, [1], *({**record, **change} for change in changes)]
    contents = {f"{header}\n{json.dumps(line)}\n": "damaged log" for line in damaged} | {header + "[" * 10**5: "no log"}
    contents |= dict.fromkeys(("my notes\nfor the year", '{"step": 1}\n{"step": 2}', "[1]\n", "[" * 10**5), "no log")
    for content, word in contents.items():
        log.write_text(content)
        refused(search(tiny_run, out, *flags, refit="none"), "mine.jsonl", word)
        assert log.read_text() == content
    log.write_bytes(b"\xff\xfe\x00")
    refused(search(tiny_run, out, *flags, refit="none"), "no log")
    for name in (".", folder, "same.jsonl"):
        refused(search(tiny_run, name, "--kv_budget", 0.5), "--out")


def test_the_best_of_what_was_judged_is_the_answer_and_walls_are_climbed(tiny_run, folder, monkeypatch):
    measure = lambda self, maps: (loss(maps) if type(maps) is tuple else 0, 0)  # noqa: E731
    monkeypatch.setattr(search_groups.Judge, "__call__", measure)
    wish = {(0, "k"): 1, (1, "k"): 3, (0, "v"): 3, (1, "v"): 1}

    def loss(maps) -> float:
        counts = {(layer, kind): max(maps["kv".index(kind)][layer]) + 1 for layer, kind in wish}
        away = sum((counts[slot] - wish[slot]) ** 2 for slot in wish)
        if sum(counts.values()) != 8:  # what layers do alone misleads
            return 0.01 * sum((counts[slot] - 4 + wish[slot]) ** 2 for slot in wish)
        return 0.01 * away + 0.03 * (away == 2)  # and what is wished for lies behind a wall

    def made_up(self, maps, note):
        value = loss(maps)
        return {"note": note, "loss": value, "kl": value, "k_groups": maps[0], "v_groups": maps[1],
                **self.sizes(*maps)}  # fmt: skip

    monkeypatch.setattr(search_groups.Evaluations, "measure", made_up)
    monkeypatch.setattr(search_groups, "grouped", lambda original, k, v, *rest: (k, v))
    monkeypatch.setattr(
        search_groups.Judge, "__call__", lambda self, maps: (loss(maps) if type(maps) is tuple else 0, 0)
    )
    for method in ("knapsack", "anneal"):
        out = folder / f"wish-{method}.json"
        done = search(tiny_run, out, "--kv_budget", 0.5, "--max_evals", 80, "--method", method, refit="none")
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        assert found["loss"] == 0, (method, found["k_groups"], found["v_groups"])
        losses = [row["loss"] for row in found["judged"]]
        assert losses == sorted(losses) and len(losses) >= 3


# ---- the command gqa.py ----


def test_grouped_checkpoint_is_one_file_that_everything_reads(grouped, folder, tiny_run):
    for script, *args in (
        ("eval_ppl.py", grouped, "--max_tokens", 500),
        ("sample.py", grouped, "--max_new_tokens", 8),
        ("checkpoint.py", "show", grouped),
        ("checkpoint.py", "export", grouped, folder / "hf"),
        ("gqa.py", grouped, "--out", folder / "mqa.pt", "--n_kv_head", 1, "--calibration_tokens", 1024),
        ("gqa.py", grouped, "--out", folder / "fewer.pt", "--kv_budget", 0.75, "--calibration_tokens", 1024),
    ):
        done = quick(script, *args)
        assert done.returncode == 0, (script, done.stderr)
        assert script != "checkpoint.py" or args[0] != "show" or "merged: closed" in done.stdout
    model = build_model(load(folder / "mqa.pt"))
    assert model.config.kv_numbers_per_token == 2 * 2 * model.config.head_dim
    assert not {"optimizers", "scaler"} & set(load(grouped))
    from transformers import AutoModelForCausalLM

    x = torch.arange(5, 25)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="eager").eval()
    assert_close(build_model(load(grouped))(x), theirs(x).logits, 1e-5)


def test_adapters_are_merged_and_novel_layers_kept(tiny_run, tiny_data, folder):
    lora = [*small_run(tiny_data, folder / "lora")[:4], "--init_from", tiny_run, "--lora_r", 2, "--quantize", "nf4"]
    done = quick("train.py", *lora, "--max_steps", 4, "--batch_size", 4)
    assert done.returncode == 0, done.stderr
    done = quick("train.py", *small_run(tiny_data, folder / "novel"), "--novel", "--max_steps", 4)
    assert done.returncode == 0, done.stderr
    for name in ("lora", "novel"):
        out = folder / f"{name}-grouped.pt"
        done = quick(
            "gqa.py", folder / name / "ckpt.pt", "--out", out, "--kv_budget", 0.5, "--calibration_tokens", 1024
        )
        assert done.returncode == 0, done.stderr
        checkpoint = load(out)
        assert "lora" not in checkpoint and checkpoint["config"]["novel"] == (name == "novel")
        assert not any("lora" in key or "codes" in key for key in checkpoint["model"])


def test_same_seed_same_bits(tiny_run, grouped, folder):
    again = folder / "again.pt"
    assert quick("gqa.py", tiny_run, "--out", again, "--kv_budget", 0.5, "--calibration_tokens", 2048).returncode == 0
    ours, theirs = load(again)["model"], load(grouped)["model"]
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_bad_grouping_is_refused(tiny_run, grouped, folder):
    groups = json.loads(json.dumps({"k_groups": [[0, 0, 1, 1]] * 2, "v_groups": [[0, 0, 0, 1]] * 2}))
    files = {
        "layers": {**groups, "k_groups": groups["k_groups"][:1]},
        "heads": {**groups, "v_groups": [[0, 0, 1]] * 2},
        "skips": {**groups, "v_groups": [[0, 0, 2, 2]] * 2},
        "kinds": {**groups, "v_groups": [["a", 0, 1, 1]] * 2},
        "none": {"groups": []},
        "empty": {"k_groups": [], "v_groups": []},
        "list": [1, 2],
        "truths": {**groups, "v_groups": [[False, False, True, True]] * 2},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "torn.json").write_text("{")
    (folder / "deep.json").write_text("[" * 10**5)
    out = folder / "never.pt"
    out.write_bytes(b"mine")
    for flags, words in (
        (["--groups", folder / "layers.json"], ["k_groups has 1 layers, n_layer is 2"]),
        (["--groups", folder / "heads.json"], ["v_groups[0] is [0, 0, 1]"]),
        (["--groups", folder / "skips.json"], ["v_groups[0] is [0, 0, 2, 2]", "skip none"]),
        (["--groups", folder / "kinds.json"], ["no group file"]),
        (["--groups", folder / "none.json"], ["no group file"]),
        (["--groups", folder / "empty.json"], ["no group file"]),
        (["--groups", folder / "split.json", "--joint"], ["drop --joint"]),
        (["--groups", folder / "list.json"], ["no group file"]),
        (["--groups", folder / "truths.json"], ["no group file"]),
        (["--groups", folder / "deep.json"], ["no group file"]),
        (["--groups", ""], ["no such group file"]),
        (["--groups", folder / "torn.json"], ["no group file"]),
        (["--groups", folder / "missing.json"], ["no such group file", "search_groups.py"]),
        (["--kv_budget", 0.1], ["kv_budget is 0.1", "0.25"]),
        (["--kv_budget", 1.5], ["kv_budget is 1.5"]),
        (["--kv_budget", math.nan], ["kv_budget is nan"]),
        (["--n_kv_head", 5], ["n_kv_head is 5", "1 to 4"]),
        (["--n_kv_head", 0], ["n_kv_head is 0"]),
        (["--n_kv_head", 2, "--kv_budget", 0.5], ["give one of"]),
        ([], ["--kv_budget", "--groups"]),
        (["--n_kv_head", 2, "--calibration_tokens", 64], ["calibration_tokens is 64"]),
        (["--n_kv_head", 2, "--dataset", "nowhere"], ["nowhere"]),
    ):
        refused(quick("gqa.py", tiny_run, "--out", out, "--overwrite", *flags), *words)
        assert out.read_bytes() == b"mine", flags
    refused(quick("gqa.py", tiny_run, "--out", out, "--n_kv_head", 2), "exists", "--overwrite")
    refused(quick("gqa.py", tiny_run, "--n_kv_head", 2), "--out")
    k_groups = load(grouped)["config"]["k_groups"]
    split = {"k_groups": [[0, 1, 2, 3]] * 2, "v_groups": [[0, 1, 2, 3]] * 2}
    (folder / "split.json").write_text(json.dumps(split))
    done = quick("gqa.py", grouped, "--out", folder / "s.pt", "--groups", folder / "split.json")
    refused(done, "can only be united", k_groups[0])
    apart = folder / "apart.pt"
    maps = {"k_groups": [[0, 0, 1, 2]] * 2, "v_groups": [[0, 1, 1, 0]] * 2}
    (folder / "apart.json").write_text(json.dumps(maps))
    assert quick("gqa.py", tiny_run, "--out", apart, "--groups", folder / "apart.json").returncode == 0
    done = quick("gqa.py", apart, "--out", folder / "s.pt", "--kv_budget", 0.5, "--joint")
    refused(done, "grouped apart", "--joint")
    done = search(apart, folder / "apart-found.json", "--kv_budget", 0.5, "--max_evals", 6, refit="none")
    assert done.returncode == 0, done.stderr


# ---- healing ----


def test_distilled_loss_is_the_weighted_sum():
    model, teacher = sharp_model().double(), sharp_model(seed=3).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(64, (3, 20), generator=generator) for _ in range(2))
    y[0, :7] = IGNORE
    for weight in (0.0, 0.3, 1.0):
        loss = distilled(model, teacher, x, y, weight)
        logits, theirs = model(x), teacher(x).softmax(-1).detach()
        kept = (y != IGNORE)[..., None]
        kl = (kept * theirs * (theirs.log() - logits.log_softmax(-1))).sum()
        ce = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction="sum")
        assert_close(loss, (1 - weight) * ce + weight * kl, 1e-12)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = torch.autograd.grad((1 - weight) * ce + weight * kl, list(model.parameters()))
        for ours, other in zip(gradients, expected):
            assert_close(ours, other, 1e-9)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("lora", [0, 2])
def test_healing_brings_a_grouped_model_back_and_resumes(tiny_run, tiny_data, folder, lora):
    """Towards a teacher whose attention says something, in one file; a run in two parts ends with the bits of one."""
    teacher, grouped = folder / "teacher.pt", folder / "grouped.pt"
    checkpoint, generator = load(tiny_run), torch.Generator().manual_seed(0)
    for name, x in checkpoint["model"].items():
        if ".attention." in name:
            checkpoint["model"][name] = torch.randn(x.shape, generator=generator)
    save(teacher, checkpoint)
    how = ["--n_kv_head", 1, "--merge", "mean", "--refit", "none", "--calibration_tokens", 1024, "--overwrite"]
    assert quick("gqa.py", teacher, "--out", grouped, *how).returncode == 0
    base = ["--dataset", tiny_data, "--init_from", grouped, "--teacher", teacher, "--batch_size", 4, "--eval_every", 16]
    base += ["--warmup_steps", 0, "--lr", 0.005, "--min_lr", 0.005, "--eval_tokens", 512]
    base += ["--distil_weight", 1, *(["--lora_r", lora] if lora else [])]
    whole, cut = folder / f"healed-{lora}", folder / f"healed-cut-{lora}"
    done = quick("train.py", *base, "--out_dir", whole, "--max_steps", 40)
    assert done.returncode == 0 and "KL divergence from" in done.stdout, done.stderr
    judge = Judge(build_model(load(teacher)), np.fromfile(tiny_data / "val.bin", dtype=np.uint16)[: 8 * 32 + 1])
    before, after = (judge(build_model(load(path)))[1] for path in (grouped, whole / "ckpt.pt"))
    assert after < 0.9 * before, (before, after)
    assert quick("train.py", *base, "--out_dir", cut, "--max_steps", 16).returncode == 0
    assert quick("train.py", "--resume", "--out_dir", cut, "--max_steps", 40).returncode == 0
    ours, theirs = load(cut / "ckpt.pt"), load(whole / "ckpt.pt")
    assert ours["step"] == 40 and all(torch.equal(ours["model"][name], x) for name, x in theirs["model"].items())
    assert ours["grouped"] == theirs["grouped"] == load(grouped)["grouped"]
    shown = quick("checkpoint.py", "show", cut / "ckpt.pt").stdout
    assert f"taught by {teacher}" in shown and f"of {teacher}, merged: mean" in shown
    done = quick("train.py", "--resume", "--out_dir", cut, "--teacher", grouped, "--max_steps", 44)
    refused(done, "--teacher", "drop --teacher")


def test_bad_teachers_are_refused(grouped, tiny_run, tiny_data, folder):
    flags = [*small_run(tiny_data, folder / "no"), "--max_steps", 2]
    refused(quick("train.py", *flags, "--teacher", folder / "missing.pt"), "missing.pt", "no such checkpoint")
    refused(quick("train.py", *flags, "--distil_weight", 0.5), "--teacher")
    refused(quick("train.py", *flags, "--teacher", tiny_run, "--distil_weight", 2), "distil_weight is 2")
    refused(quick("train.py", *flags, "--teacher", tiny_run, "--block_size", 48), "reads 32 tokens", "--block_size 32")
    refused(quick("train.py", *flags, "--teacher", tiny_run, "--vocab_size", 500), "vocab_size 400")
    assert not (folder / "no").exists()


# ---- the comparison ----


def test_comparison_is_what_the_commands_give(tiny_run, folder):
    """Its cells are the perplexities of what gqa.py writes; its table is their mean over seeds."""
    log, cells = folder / "compare.jsonl", {}
    assert search(tiny_run, folder / "compare.json", "--kv_budget", 0.5, "--max_evals", 10).returncode == 0
    flags = ["--shares", 0.5, "--seeds", 2, "--calibration_tokens", 1024]
    done = quick("compare_groups.py", tiny_run, *flags, "--eval_tokens", 10**6, "--log", log)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("seed "):
            seed, _, ratio, name = line.split(" | ")
            cells[name, int(seed.removeprefix("seed "))] = float(ratio.removeprefix("x "))

    def whole_test(path) -> float:
        return json.loads(quick("eval_ppl.py", path, "--split", "test", "--json").stdout)["blocks"]

    ways = {
        "neighbours, mean (GQA's paper)": ["--joint", "--grouping", "neighbour", "--merge", "mean", "--refit", "none"],
        "K and V apart": ["--refit", "none"],
    }
    for name, how in ways.items():
        made = ["--out", folder / "made.pt", "--kv_budget", 0.5, "--calibration_tokens", 1024, "--seed", 1]
        assert quick("gqa.py", tiny_run, *made, *how, "--overwrite").returncode == 0
        assert cells[name, 1] == pytest.approx(whole_test(folder / "made.pt") / whole_test(tiny_run), abs=1e-4)
        assert f"| {name} | {(cells[name, 0] + cells[name, 1]) / 2:.3f}"[:-1] in done.stdout
    assert {"+ knapsack", "+ wo refitted", "+ wq and wk refitted"} <= {name for name, _ in cells}
    again = [folder / "made.pt", "--shares", 0.5, "--seeds", 1, "--calibration_tokens", 1024]
    refused(quick("compare_groups.py", *again, "--log", log), "another model")
    refused(quick("compare_groups.py", *again, "--log", folder / "none.jsonl"), "none.jsonl: no such log")
    refused(quick("compare_groups.py", tiny_run, "--shares", 0.1), "shares is 0.1", "--shares 0.25 to 1")
    few = ["--kv_budget", 0.5, "--max_evals", 2, "--method", "random"]
    assert search(tiny_run, folder / "few.json", *few, refit="none").returncode == 0
    refused(quick("compare_groups.py", tiny_run, "--log", folder / "few.jsonl"), "few.jsonl lacks single layers")
    done = quick("compare_groups.py", *again)  # keys and values are grouped apart already: no row of joint groups
    assert done.returncode == 0 and "K and V apart" in done.stdout and "joint" not in done.stdout, done.stderr


def test_comparison_reads_the_log_of_a_model_with_layers_of_one_head(tiny_run, folder):
    """Such a layer cannot be grouped, so no search measures it."""
    heads, one = [0, 1, 2, 3], folder / "one.pt"
    (folder / "one.json").write_text(json.dumps({"k_groups": [[0] * 4, heads], "v_groups": [heads, heads]}))
    made = ["--groups", folder / "one.json", "--out", one, "--refit", "none", "--calibration_tokens", 1024]
    assert quick("gqa.py", tiny_run, *made).returncode == 0
    found = search(one, folder / "found-one.json", "--kv_budget", 0.6, "--max_evals", 8, refit="none")
    assert found.returncode == 0, found.stderr
    flags = ["--shares", 0.6, "--seeds", 1, "--calibration_tokens", 1024, "--eval_tokens", 512]
    done = quick("compare_groups.py", one, *flags, "--log", folder / "found-one.jsonl")
    assert done.returncode == 0 and "+ knapsack" in done.stdout, done.stderr
