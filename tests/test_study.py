"""Figures and the study: what can be known of them without looking."""

import json
import math
import shlex
import shutil

import pytest
import torch
from conftest import quick, refused, sharp_model, to_hugging_face
from PIL import Image  # matplotlib needs it, too

import study
import study_report
from bench import BenchConfig
from checkpoint import CheckpointConfig, load
from compare_groups import CompareConfig
from config import UserError, parse
from data.prepare import PrepareConfig
from eval_ppl import EvalConfig
from eval_text import AnswerConfig
from gqa import GroupConfig
from lora import LoRAConfig
from model import ModelConfig
from plot import attention_weights, curve
from search_groups import SearchConfig
from settings import TrainConfig

FLAGS = {
    "train.py": [TrainConfig, ModelConfig, LoRAConfig], "bench.py": [BenchConfig, ModelConfig, LoRAConfig],
    "eval_ppl.py": [EvalConfig], "eval_text.py": [AnswerConfig], "gqa.py": [GroupConfig],
    "search_groups.py": [SearchConfig], "checkpoint.py": [CheckpointConfig], "data/prepare.py": [PrepareConfig],
    "compare_groups.py": [CompareConfig],
}  # fmt: skip


def test_a_curve_is_read_from_a_log_that_is_still_written(tmp_path):
    lines = [
        {"step": 0},
        {"step": 1, "loss": 5.0, "seconds": 2.5},
        {"step": 1, "val_loss": 4.5},
        {"step": 2, "loss": 4.0},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 2, "val_lo')
    assert curve(str(tmp_path), "seconds") == ([2.5], [4.5])
    with pytest.raises(UserError, match="out/RUN"):
        curve(str(tmp_path / "none"), "seconds")


@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 2}])
def test_attention_maps_are_hugging_faces(settings):
    model = sharp_model(**settings)
    ids = [1, 5, 9, 33, 2, 60, 7]
    theirs = to_hugging_face(model)(torch.tensor([ids]), output_attentions=True).attentions
    assert torch.allclose(attention_weights(model, ids), torch.cat(theirs), atol=1e-5)


def test_every_figure_is_drawn(tiny_run, tmp_path):
    for number, action in enumerate(("loss", "attention", "similarity", "groups", "architecture")):
        of, out, dark = tiny_run.parent if action == "loss" else tiny_run, tmp_path / f"{action}.png", number % 2
        done = quick("plot.py", action, of, "--out", out, *["--dark"] * dark)
        assert done.returncode == 0, done.stderr
        picture = Image.open(out).convert("RGB")
        assert picture.getpixel((0, 0)) == ((13, 17, 23) if dark else (255, 255, 255))
        assert len(picture.resize((64, 64)).getcolors(4096)) > 20, "it is nearly empty"
    refused(quick("plot.py", "attention", tiny_run, "--text", "x" * 999), "--text has")
    refused(quick("plot.py", "attention", tiny_run, tiny_run), "one checkpoint")
    refused(quick("plot.py", "loss", tiny_run.parent, "--out", tmp_path / "a.jpg"), "a.jpg", ".png")


@pytest.mark.parametrize("size", [study.Size(), study.FAST])
def test_every_step_of_the_study_has_flags_that_exist(size, tmp_path):
    steps = {name: step for part in study.PARTS.values() for name, step in part(size, tmp_path).items()}
    for line in filter(lambda step: isinstance(step, str), steps.values()):
        script, *words = shlex.split(line)
        assert shlex.split(line) == line.split(), "the study cuts at spaces"
        if script in FLAGS:
            parse("", *FLAGS[script], argv=words)
    assert len(steps) > 40


def test_a_done_step_is_skipped_and_a_failed_one_says_how_to_try(tmp_path, tiny_run):
    (tmp_path / "logs").mkdir()
    study.run("show", f"checkpoint.py show {tiny_run}", tmp_path)
    log = tmp_path / "logs" / "show.txt"
    assert "parameters by part" in log.read_text()
    log.write_text(log.read_text().splitlines()[0] + "\nkept")
    study.run("show", f"checkpoint.py show {tiny_run}", tmp_path)
    assert log.read_text().endswith("kept")
    with pytest.raises(UserError, match="another command"):
        study.run("show", "checkpoint.py show other.pt", tmp_path)
    with pytest.raises(UserError, match=r"step bad failed: .*nosuch.pt.* python checkpoint.py show nosuch.pt"):
        study.run("bad", "checkpoint.py show nosuch.pt", tmp_path)
    assert not (tmp_path / "logs" / "bad.txt").exists()


def test_an_interrupted_run_of_the_study_goes_on(tmp_path, tiny_data):
    (tmp_path / "logs").mkdir()
    shape = "--n_layer 1 --n_head 2 --dim 16 --block_size 16 --batch_size 2 --eval_tokens 64"
    line = f"train.py --dataset {tiny_data} {shape} --max_steps 3 --out_dir {tmp_path}/run"
    study.run("run", line, tmp_path)
    weights = load(tmp_path / "run" / "ckpt.pt")["model"]
    (tmp_path / "logs" / "run.txt").rename(tmp_path / "logs" / "run.begun")  # as if killed before its last words
    with pytest.raises(UserError, match="another command"):
        study.run("run", line.replace("--max_steps 3", "--max_steps 4"), tmp_path)
    study.run("run", line, tmp_path)
    assert "continued from step 3" in (tmp_path / "logs" / "run.txt").read_text()
    assert all(torch.equal(weights[name], p) for name, p in load(tmp_path / "run" / "ckpt.pt")["model"].items())


@pytest.mark.parametrize(
    "seeds, val, test, mean",
    [
        (2, "30.00 (20.00, 40.00)", "15.00 (10.00, 20.00)", "Mean 1.0000, standard deviation 0.1414, over 2 pairs"),
        (1, "20.00", "10.00", "Mean 1.1000, over 1 pairs"),
    ],
)
def test_tables_hold_ratios_of_each_seed(tmp_path, seeds, val, test, mean):
    """At 5 layers novel's perplexity is 1.1 of plain's with the first seed and 0.9 with the second."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "figures").mkdir()
    rows = []
    for kind, perplexities in (("", (10.0, 20.0)), ("-novel", (11.0, 18.0))):
        for seed, perplexity in enumerate(perplexities[:seeds]):
            name = f"depth-5{kind}-{seed}"
            (tmp_path / name).mkdir()
            scored = {"blocks": perplexity, "bits_per_byte": 1.25, "tokens": 9}
            (tmp_path / "logs" / f"{name}-test.txt").write_text("python ...\n" + json.dumps(scored))
            records = [{"step": 0, "params": 1000}, {"step": 1, "loss": 3.0, "ms": 9.0, "seconds": 60.0, "tokens": 9}]
            records += [{"step": 1, "val_loss": math.log(2 * perplexity), "bits_per_byte": 1.5}]
            (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        rows += [{"ckpt": f"x/depth-5{kind}-0/ckpt.pt", "median": 9.0, "p5": 8.0, "p95": 11.0}]
    (tmp_path / "logs" / "depth-latency-eager.txt").write_text(json.dumps({"rows": rows}))
    study_report.report(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert f"| 5 | plain | 1,000 | 1.0 min | {val} | {test} | 1.2500 |" in text
    assert f"5 layers {', '.join(['1.1000', '0.9000'][:seeds])}" in text and mean in text
    assert (tmp_path / "figures" / "depth.png").exists() and (tmp_path / "figures" / "depth-dark.png").exists()


def test_tables_of_groups_hold_ratios_to_the_original_treated_alike(tmp_path, tiny_run):
    """A perplexity of 10, 8 when healed; grouped 20, 12 when healed: ratios of 2 and 1.5."""
    for folder in ("logs", "base", "figures"):
        (tmp_path / folder).mkdir()
    shutil.copy(tiny_run, tmp_path / "base" / "ckpt.pt")
    shutil.copy(tiny_run, tmp_path / "ours-1of2.pt")
    for name in ("base", *(f"{merge}-1of2" for merge in study.MERGES)):
        for when, perplexity in (
            (("before", 10.0), ("after", 8.0)) if name == "base" else (("before", 20.0), ("after", 12.0))
        ):
            found = {"blocks": perplexity, "tokens": 9, "kv_bytes_per_token": 64 if name == "base" else 32}
            (tmp_path / "logs" / f"{when}-{name}.txt").write_text("python ...\n" + json.dumps(found))
    study_report.report(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| bytes a token of the cache | 32 (0.500) |" in text
    assert text.count(" | 2.000 -> 1.500 |") == len(study.MERGES)
    for name in ("groups", "heads", "similarity", "attention", "architecture"):
        assert (tmp_path / "figures" / f"{name}-dark.png").exists()


def test_tables_of_tuning_and_attention_hold_what_was_printed(tmp_path):
    for folder in ("logs", "tuning-lora8-answers", "figures"):
        (tmp_path / folder).mkdir()
    score = {"ckpt": {"loss": 3.25, "bleu": 4.5, "rouge1": 30.0, "rouge2": 10.0, "rougeL": 29.0}}
    rows = [{"attention": "naive", "pretraining_tp": 2, "val_loss": 3.3, "training_s": 5.0, "step_ms": 90.0,
             "peak": 2**30, "generation_s": 0.5}]  # fmt: skip
    memory = {"full fine-tune": {"peak": 3 * 2**20, "tokens_per_s": 700.0}}
    logs = {
        "tuning-lora8-score": score,
        "attention": {"rows": rows, "bench": {"steps": 5}},
        "tuning-memory": {"rows": memory},
    }
    for name, found in logs.items():
        (tmp_path / "logs" / f"{name}.txt").write_text("python ...\nnote: of what\n" + json.dumps(found))
    records = [{"step": 0, "trainable": 1000}, {"step": 1, "loss": 3.0, "ms": 9.0, "seconds": 90.0}]
    records += [{"step": 1, "val_loss": 3.5, "peak_memory_bytes": 2**29}]
    folder = tmp_path / "tuning-lora8-answers"
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "ckpt.pt").write_bytes(b"0" * 200_000)
    study_report.report(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| lora8 | 1,000 | 0.2 MB | 1.5 min | 0.50 GiB | 3.250 | 4.50 | 30.0 / 10.0 / 29.0 |" in text
    assert "| naive | 2 | 3.300000 | 5.0 s | 90 ms | 1024 MiB | 0.500 s |" in text
    assert "50 steps" in text and "| full fine-tune | 3.0 | 700 |" in text
