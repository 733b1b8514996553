"""Figures, scores of answers and the study: what can be known of them in advance."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import quick, records, refused, run, sharp_model, to_hugging_face
from nltk import edit_distance  # rouge-score needs it
from PIL import Image  # matplotlib needs it, too
from rouge_score.rouge_scorer import RougeScorer

from checkpoint import build, load
from common import IGNORE, UserError
from data.instruct import encoded
from data.loader import Examples, read_meta
from study import run as study
from study import score, tables
from study.plot import attention_weights, curve, draw_together


@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 2}])
def test_attention_maps_equal_those_of_transformers(settings):
    model, ids = sharp_model(**settings), [1, 5, 9, 33, 2, 60, 7]
    theirs = to_hugging_face(model)(torch.tensor([ids]), output_attentions=True).attentions
    assert torch.allclose(attention_weights(model, ids), torch.cat(theirs), atol=1e-5)


def test_every_figure_is_drawn(tiny_run, tiny_data, tmp_path):
    for action in ("loss", "attention", "similarity", "groups", "architecture"):
        source = tiny_run.parent if action == "loss" else tiny_run
        curves = ["--train", "--x", "epochs"] if action == "loss" else []
        run("study", "plot", action, source, *curves, "--out", tmp_path / f"{action}.png")
        for name, paper in ((action, (255, 255, 255)), (f"{action}-dark", (13, 17, 23))):
            picture = Image.open(tmp_path / f"{name}.png").convert("RGB")
            assert picture.getpixel((0, 0)) == paper
            assert len(picture.resize((64, 64)).getcolors(4096)) > 20, "it is nearly empty"
    (at,), _, (own,) = curve(tiny_run.parent, "epochs")
    losses = [record["loss"] for record in records(tiny_run.parent / "log.jsonl") if "loss" in record]
    blocks = (tiny_data / "train.bin").stat().st_size // 2 // 32 - 1  # an epoch cuts the text somewhere
    assert own == pytest.approx(np.mean(losses)) and at == pytest.approx(30 * 4 / blocks), "30 steps"


def test_heads_that_share_are_counted(tmp_path):
    found = {"a": ([[0, 0, 1]], [[0, 1, 2]]), "b": ([[0, 1, 1]], [[0, 0, 0]])}
    for name, (k, v) in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"k_groups": k, "v_groups": v}))
    figure = draw_together([tmp_path / "a.json", tmp_path / "b.json"])
    k, v = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert np.array_equal(k, [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]])
    assert np.array_equal(v, (np.ones((3, 3)) + np.eye(3)) / 2)
    (tmp_path / "b.json").write_text('{"k_groups": [[0, 1]], "v_groups": [[0, 1]]}')
    refused(quick("study", "plot", "together", tmp_path / "a.json", tmp_path / "b.json"), "b.json")


def test_what_models_answer_is_kept_and_scored(tiny_run, tmp_path):
    texts = ["red green blue cat dog bird"[i % 5 * 4 :] + f" {i}" for i in range(60)]
    tasks = [{"instruction": "Repeat.", "input": text, "output": text} for text in texts]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    data, paths = tmp_path / "tasks", [tmp_path / f"{steps}" / "ckpt.pt" for steps in (1, 20)]
    run("data/prepare.py", "tasks", "--from", f"{data}.json", "--tokenizer", tiny_run, "--out", data)
    for path in paths:
        size = ["--block_size", 160, "--max_steps", path.parent.name, "--out_dir", path.parent]
        run("train.py", "--init_from", tiny_run, "--dataset", data, *size)
    examples = Examples(*read_meta(str(data)), "train", 160)
    tokens = examples.lengths[examples.epoch(16, 0, 0)[0]].sum()  # without padding
    assert load(paths[0])["tokens"] == tokens
    done = quick("study", "score", paths[1], "--base", paths[0], "--max_new_tokens", 20, "--json")
    summary, *kept = map(json.loads, (tmp_path / "20/ckpt-answers-tasks-test.jsonl").open())
    assert summary == json.loads(done.stdout) and len(kept) == summary["examples"]
    for name, path in zip(("base", "ckpt"), paths):
        pairs, (model, tokenizer), nats, count = [], build(load(path)), 0.0, 0
        for row in kept:
            pairs.append((row["output"], row["answers"][name]))
            prompt, answer = encoded(row, tokenizer)
            log_p = model(torch.tensor([[*prompt, *answer]])).log_softmax(-1)[0, len(prompt) - 1 : -1]
            nats, count = nats - log_p[range(len(answer)), answer].sum().item(), count + len(answer)
        references, answers = zip(*pairs)
        rouge = [RougeScorer(["rougeL"]).score(*pair)["rougeL"].fmeasure for pair in pairs]
        assert summary[name]["loss"] == pytest.approx(nats / count, rel=1e-5)
        assert summary[name]["bleu"] == sacrebleu.corpus_bleu(answers, [references]).score
        assert summary[name]["rougeL"] == pytest.approx(100 * np.mean(rouge))
        assert summary[name]["chrf"] == sacrebleu.corpus_chrf(answers, [references]).score
        likeness = [1 - edit_distance(*pair) / max(map(len, pair)) for pair in pairs]
        assert summary[name]["edit"] == pytest.approx(100 * np.mean(likeness))
        assert summary[name]["exact_match"] == 100 * np.mean([a == b for a, b in pairs])
    found = score.texts_scores(["the cat sat on a red mat"], ["the cat sat on a mat"])
    assert found["bleu1"] == pytest.approx(100 * 6 / 7)
    assert found["bleu"] == pytest.approx(100 * (6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)
    f1 = [score.word_f1(*pair) for pair in (("The cat sat", "the cat, the dog"), ("?", "?"), ("?", "a"))]
    assert f1 == pytest.approx([2 * 2 / 7, 1, 0])


@pytest.mark.parametrize("sign, share", [(1, 100.0), (-1, 0.0)])
def test_a_choice_is_right_where_the_own_reference_has_the_least_loss(tiny_run, monkeypatch, sign, share):
    """The loss stands in for a model: 0 for the text that the prompt contains, else 1, and the contrary. A
    text that does not fit the context, whose loss would mean nothing, is no choice."""
    texts, asked = [f"word {i % 7}" for i in range(9)], []
    records = [{"instruction": "Repeat.", "input": text, "output": text} for text in texts]
    _, tokenizer = build(load(tiny_run))
    model = sharp_model(block_size=max(sum(map(len, encoded(r, tokenizer))) for r in records))

    def loss(model, batches, dtype):
        ((x, y),) = batches
        asked.append(tokenizer.decode([i for i in y[0].tolist() if i != IGNORE][:-1]))
        assert x.shape[1] <= model.config.block_size
        return sign * float(f"{asked[-1]}\n" not in tokenizer.decode(x[0].tolist())), 1

    monkeypatch.setattr(score, "mean_loss", loss)
    long = {**records[0], "instruction": "Say.", "output": "word " * 99}
    assert score.choice(model, tokenizer, [*records, long]) == share
    assert len(asked) == 4 * 10 and len({*asked[:4]}) == 4, "four that differ"
    asked.clear()
    twice = {**records[1], "output": "a word"}  # is as right
    assert score.choice(model, tokenizer, [records[1], twice, *records[2:6]])
    assert "a word" not in asked[:4]


def test_a_model_writes_on_from_the_train_split(tiny_run, tiny_data, tmp_path):
    _, tokenizer = build(load(tiny_run))
    flags = "study", "write", tiny_run, tmp_path / "own", "--dataset", tiny_data, "--tokens"
    run(*flags, 9000)
    run(*flags, 3000, "--overwrite")
    refused(quick(*flags, 3000), "--overwrite")
    texts = [path.read_text("utf-8") for path in (tmp_path / "own").iterdir()]
    for split in ("train", "val"):
        ids = np.fromfile(tiny_data / f"{split}.bin", np.uint16).tolist()
        begins = tuple({tokenizer.decode(ids[i : i + 4]) for i in range(len(ids) - 3)})
        assert all(text.startswith(begins) for text in texts) == (split == "train") and len(texts) == 128


def test_every_step_has_flags_that_exist(monkeypatch):
    monkeypatch.setattr("common.Parser.parse_intermixed_args", lambda self: sys.exit(self.parse_args() and 7))
    other = {"ckpt": "smol.pt", "dataset": "wiki", "shape": "--dim 768", "parts": ["tuning"], "only": "multi"}
    unlike = {}  # but for numbers and checkpoints
    for config in ({"parts": [*study.STEPS]}, {"parts": [*study.STEPS], "fast": True}, other):
        steps = study.steps(study.StudyConfig(**config))
        assert not set("[]<>") & set("".join(steps.values()))
        unlike |= {re.sub(r"\d+|\S+\.pt", "", line): line for line in steps.values()}
    for words in (shlex.split(line.removeprefix("-m ")) for line in unlike.values()):
        if "begin" in words:
            words += ["--out_dir", "x"]  # as `study run` does
        functions = "download", "first_lines"
        assert words[0] in functions or quick(*words).returncode == 7, words
    assert "/smol.pt --" in steps["tuning-multi30k-before"]
    for only, base in (("-naive-", False), ("^attention$", True)):  # who reads the base
        assert ("base" in study.steps(study.StudyConfig(parts=["attention"], only=only))) == base


def test_steps_are_skipped_resumed_or_leave_no_log(tmp_path, tiny_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = "--n_layer 1 --n_head 2 --dim 16 --block_size 16 --eval_tokens 64 --max_steps 3"
    line, log = f"train.py --dataset {tiny_data} {shape}", tmp_path / "logs" / "short.txt"
    study.run("short", line)
    log.write_text(line)
    study.run("short", line)
    assert log.read_text() == line
    with pytest.raises(UserError, match=r"step bad: .*none of the commands.*-m study nosuch"):
        study.run("bad", "-m study nosuch")  # which finds our package from another folder
    assert not log.with_name("bad.txt").exists()
    log.unlink()  # as if killed before it was written
    with pytest.raises(UserError, match="begun is of another command"):
        study.run("short", f"{line} --lr 1")
    study.run("short", line)


def test_tables_hold_what_the_logs_say(tmp_path, monkeypatch):
    """At 5 layers novel's perplexity is 1.1 of plain's, then 0.9; groups double it, 1.5 times when healed."""
    monkeypatch.chdir(tmp_path)

    def written(name: str, *log: dict, **printed) -> None:
        for end, seconds in (("begun", 60), ("txt", 180)):
            Path("logs", f"{name}.{end}").write_text("...\nnote: ...\n" + json.dumps(printed))
            os.utime(f"logs/{name}.{end}", (0, seconds))
        if log:  # that of the run NAME of NAME-test
            (folder := Path(name.rpartition("-")[0])).mkdir()
            (folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in log))

    Path("logs").mkdir()
    both = [f"depth-short-5-{kind}-{seed}" for kind in ("plain", "novel") for seed in "01"]
    first = {"params": 9, "trainable": 7, "step": 0, "epochs": 2.0, "train": {"max_steps": 4}}
    last, seen = {"step": 3, "tokens": 1, "seconds": 60.0}, {"step": 3, "val_loss": 3.0}  # not of all
    for name, perplexity in zip([*both, "tuning-few-full-0"], (10.0, 20.0, 11.0, 18.0, 0)):
        written(f"{name}-test", first, last, *[seen] * (name == both[0]), blocks=perplexity)
    evaluated = {"step": 2, "loss": 3.0, "val_loss": 2.0}, {"step": 4, "loss": 1.0, "val_loss": 2.5}
    written("few-full-own", first, *evaluated, blocks=40.0)
    scores, answer = dict.fromkeys(tables.SCORES, 5.0), {"ckpt": "a\u2028line"}
    Path("tuning-few-lora8-0").mkdir()
    answer = json.dumps({"input": "", "output": "", "answers": answer}, ensure_ascii=False)
    Path("tuning-few-lora8-0/ckpt-answers-few.jsonl").write_text(f"{{}}\n{answer}\n")
    for name in ("tuning-few-full-0-score", "tuning-few-before"):
        written(name, ckpt=scores, examples=8)
    written("depth-latency", rows=[{"ckpt": f"{both[0]}/x.pt", "p5": 1.0, "median": 2.0, "p95": 3.0}])
    written("depth-pace", rows=[{"variant": "slow", "ms": 7.0}])
    for protocol in ("sliding", "block_mean"):  # of a merge that is not yet healed
        written(f"published-original-before-{protocol}", **{protocol: 20.0})
    written("tuning-few-full-0-own", blocks=40.0)
    for way, rate in (("naive", 2048.0), ("sdpa", 4096.0)):
        written(f"attention-{way}-512", rows=[{"train_tok_s": rate, "eval_tok_s": 1.0, "peak": 2**21}])
    for when, original, grouped in (("before", 10.0, 20.0), ("after", 8.0, 12.0)):
        written(f"{when}-base", blocks=original, kv_bytes_per_token=64)
        for merge in study.LOOPS["merge"]:
            written(f"{when}-{merge}-1of2", blocks=grouped, kv_bytes_per_token=32)
    tables.report(study.LOOPS)  # of a study that was interrupted
    for recipe in study.LOOPS["recipe"]:
        for when, ppl in (("before", 20.0), ("after", 15.0), ("after16", 15.0), ("first", 18.0)):
            ppl /= 2 if recipe == "original" else 1
            written(f"published-{recipe}-{when}-block_mean", block_mean=ppl, kv_bytes_per_token=32)
            written(f"published-{recipe}-{when}-sliding", sliding=ppl - 5)
    tables.report(study.LOOPS)
    text = Path("tables.md").read_text()
    assert "| short | 5 | plain | 9 | 3 | 60 ± 0 | 15 ± 5 | 1 ± 0 | 1 | 2 | 3 |" in text
    assert "| short | 5 | novel | 9 | 3 | 60 ± 0 | 14.5 ± 3.5 | 1 ± 0.1 |" in text
    assert f"| few | full | 8 |{' 5 |' * len(tables.SCORES)} 40 | 60 | 7 |" in text
    assert f"| few | no | 8 | 5.000000 |{' 5 |' * (len(tables.SCORES) - 1)}" in text
    assert "| full | 2.000000 | 1 | 2.500000 | 1.000000 | 40 |" in text and "| slow | 7 |" in text
    assert r"> 'a\u2028line'" in text
    assert "| 512 | naive | 2,000" in text and "| 512 | sdpa | 1,000" in text
    healed = "32 | 20.00 (2.000) | 15.00 (3.000)" + " | 15.00 (2.000) | 10.00 (4.000)" * 2
    healed += " | 18.00 (2.400) | 13.00 (5.200)"
    assert text.count(f"| {healed} |") == len(study.LOOPS["recipe"]) - 1
    drawn = ("groups", "depth", "lengths", "published")
    assert all(Path(f"figures/{name}-dark.png").exists() for name in drawn)
    assert "| few | 2 |" in text and "| depth | 12 |" in text
    assert f"| all | {2 * len(list(Path('logs').glob('*.txt')))} |" in text  # minutes
    assert text.count(" | 2.000 -> 1.500 |") == len(study.LOOPS["merge"])
