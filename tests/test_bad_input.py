"""Every mistake ends with one line that names the remedy, exit code 2, and nothing lost or half written."""

import dataclasses
import os
import resource
import shutil
import signal

import pytest
import torch
from conftest import ROOT, command, quick, refused, small_run

from checkpoint import load
from config import NO_FLAG, comments, exit_cleanly
from data.prepare import PrepareConfig, prepare
from eval_ppl import EvalConfig
from model import ModelConfig
from sample import SampleConfig
from train import TrainConfig


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--n_layers", 6], ["--n_layers", "did you mean --n_layer?"]),
        (["--n_layer", "six"], ["--n_layer", "six"]),
        (["--dim", 100, "--n_head", 8], ["dim 100", "n_head 8", "--n_head"]),
        (["--dim", 24, "--n_head", 8], ["head_dim is 3", "even"]),
        (["--n_kv_head", 3, "--n_head", 8], ["n_kv_head 3", "--n_kv_head"]),
        (["--vocab_size", 300], ["vocab_size 300", "400", "drop --vocab_size"]),
        (["--block_size", 10**6], ["train tokens", "--block_size"]),
        (["--attention", "flash"], ["flash", "naive"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--device", "cpu:x"], ["cpu:x", "cpu"]),
        (["--batch_size", 0], ["batch_size is 0"]),
        (["--lr", "nan"], ["lr is nan"]),
        (["--seed", 2**70], ["seed is", "--seed"]),
        (["--lr", -1], ["lr is -1"]),
        (["--dataset", "nosuch"], ["nosuch", "prepare.py"]),
        (["--resume"], ["no run in", "drop --resume"]),
        (["--resume", "--overwrite"], ["one of them"]),
        (["--init_from", "missing.pt"], ["missing.pt", "no such checkpoint"]),
    ],
)
def test_impossible_training_flags(tiny_data, tmp_path, flags, words):
    refused(quick("train.py", "--dataset", tiny_data, "--out_dir", tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run").exists()


def test_a_directory_with_a_run_is_not_overwritten(tiny_data, tiny_run, tmp_path):
    before = tiny_run.read_bytes()
    refused(
        command("train.py", *small_run(tiny_data, tiny_run.parent)), "already holds a run", "--resume", "--overwrite"
    )
    shape = ["--n_layer", 3, "--resume"]
    refused(command("train.py", "--dataset", tiny_data, "--out_dir", tiny_run.parent, *shape), "--n_layer 3", "has 2")
    assert tiny_run.read_bytes() == before


def broken_checkpoints(good, folder):
    """Files that are no checkpoints."""
    data = good.read_bytes()
    contents = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "text": b"not a checkpoint\n" * 99,
        "head": data[:100],
    }
    for name, content in contents.items():
        (folder / f"{name}.pt").write_bytes(content)
    saved = load(good)
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(saved | {"config": {**saved["config"], "n_layer": 3}}, folder / "layers.pt")
    torch.save(saved | {"config": {**saved["config"], "flux": 3}}, folder / "newer.pt")
    torch.save(saved | {"config": {**saved["config"], "n_head": 7}}, folder / "heads.pt")
    torch.save(saved | {"tokenizer": b"junk"}, folder / "tokenizer.pt")
    torch.save(saved | {"model": {}}, folder / "weightless.pt")
    torch.save({"model": Evil()}, folder / "evil.pt")
    return list(folder.glob("*.pt"))


class Evil:
    """Would create a file if it were unpickled."""

    def __reduce__(self):
        return open, ("evil-was-here", "w")


@pytest.mark.parametrize("line", [["eval_ppl.py"], ["sample.py"], ["train.py", "--dataset", "DATA", "--init_from"]])
def test_damaged_and_foreign_checkpoints(tiny_run, tiny_data, tmp_path, line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [tiny_data if word == "DATA" else word for word in line]
    for path in broken_checkpoints(tiny_run, tmp_path):
        refused(quick(*line, path))
    refused(quick(*line, tmp_path / "nothing.pt"), "nothing.pt", "no such checkpoint")
    refused(quick(*line, tmp_path), "no such checkpoint")
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil-was-here").exists()
    assert not (tmp_path / "evil-was-here").exists()


def test_evaluation_flags(tiny_run, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Bj\u00f6rk".encode("latin1"))
    (tmp_path / "empty.txt").write_text("")
    for flags, words in [
        (["--text", tmp_path / "no.txt"], ["no.txt", "no such file"]),
        (["--text", tmp_path / "latin.txt"], ["not UTF-8", "iconv"]),
        (["--text", tmp_path / "empty.txt"], ["too short"]),
        (["--stride", 100, "--context", 10], ["--stride"]),
        (["--context", 0], ["--context"]),
        (["--max_tokens", 0], ["--max_tokens"]),
        (["--split", "train"], ["train", "val"]),
        (["--dataset", "nosuch"], ["prepare.py"]),
    ]:
        refused(quick("eval_ppl.py", tiny_run, *flags), *words)


def test_sampling_flags(tiny_run):
    for flags, words in [
        (["--temperature", -1], ["temperature -1"]),
        (["--temperature", "nan"], ["temperature nan"]),
        (["--prompt", "broken \udcff"], ["not valid UTF-8"]),
        (["--top_p", 0], ["top_p 0"]),
        (["--max_new_tokens", 0], ["--max_new_tokens"]),
        (["--prompt", "word " * 100], ["context 32", "shorten"]),
    ]:
        refused(quick("sample.py", tiny_run, *flags), *words)


def test_sampling_is_reproducible_and_the_cache_changes_nothing(tiny_run):
    runs = [command("sample.py", tiny_run, "--prompt", "def ", "--seed", 3, *f) for f in ([], [], ["--no_cache"])]
    assert runs[0].returncode == 0 and runs[0].stdout.startswith("def ") and len(runs[0].stdout) > 20, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout
    assert "context of 32 tokens is full" in runs[0].stderr


def test_data_with_another_tokenizer_is_noticed(tiny_run, tmp_path):
    other = prepare(PrepareConfig("x", text=[str(ROOT / "model.py")], vocab_size=350, out=str(tmp_path / "other")))
    refused(quick("eval_ppl.py", tiny_run, "--dataset", other), "another tokenizer")
    refused(
        command("train.py", "--dataset", other, "--init_from", tiny_run, "--out_dir", tmp_path / "run"),
        "another tokenizer",
    )
    assert not (tmp_path / "run").exists()


def test_changed_data_is_noticed_on_resume(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    flags = [*small_run(tmp_path / "data", tmp_path / "run"), "--max_steps", 2]
    assert command("train.py", *flags).returncode == 0
    meta = (tmp_path / "data" / "meta.json").read_text()
    sha = load(tmp_path / "run" / "ckpt.pt")["data"]["splits"]["train"]["sha256"]
    (tmp_path / "data" / "meta.json").write_text(meta.replace(sha, "0" * 64))
    refused(command("train.py", *flags, "--resume"), "not the data of the run")


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tiny_data, tmp_path):
    explode = ["--lr", 10, "--warmup_steps", 0, "--grad_clip", 0, "--max_steps", 50]
    for every in (1, 100):  # noticed by the loss before a save, by the loss of the next step
        flags = [*small_run(tiny_data, tmp_path / str(every)), *explode, "--eval_every", every]
        refused(command("train.py", *flags), "diverged", "step", "--lr", "ckpt.pt keeps step 0")
        saved = load(tmp_path / str(every) / "ckpt.pt")
        assert saved["step"] == 0 and all(tensor.abs().max() < 2 for tensor in saved["model"].values())


def small_files_only():
    """Files of at most 60,000 bytes, as on a disk that is nearly full: a log fits, a checkpoint does not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_keeps_the_previous_checkpoint(tiny_data, tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent, tmp_path / "run")
    path, log = tmp_path / "run" / "ckpt.pt", (tmp_path / "run" / "log.jsonl").read_text()
    flags = [*small_run(tiny_data, path.parent), "--max_steps", 40, "--lr", 0.01, "--resume"]
    refused(
        command("train.py", *flags, preexec_fn=small_files_only), "cannot write", "ckpt.pt", "File too large", "kept"
    )
    assert load(path)["step"] == 30 and path.read_bytes() == tiny_run.read_bytes()
    assert (tmp_path / "run" / "log.jsonl").read_text().startswith(log)
    assert not list(path.parent.glob("*.tmp"))
    fresh = [*small_run(tiny_data, tmp_path / "fresh"), "--max_steps", 2]
    refused(command("train.py", *fresh, preexec_fn=small_files_only), "cannot write", "ckpt.pt", "File too large")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_one_line(tiny_data, tmp_path):
    tmp_path.chmod(0o500)
    refused(command("train.py", *small_run(tiny_data, tmp_path / "run")), "Permission denied")


def test_a_path_that_cannot_be_written_is_one_line(tiny_data):
    refused(command("train.py", *small_run(tiny_data, "/proc/none"), "--max_steps", 1), "/proc/none")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--text", "README.md"], ["stdlib is not your text"]),
        (["mine", "--text", "nosuch.txt"], ["nosuch.txt", "no such file"]),
        (["mine", "--from", "README.md"], ["--text FILE"]),
        (["mine"], ["unknown data set", "stdlib", "--text FILE"]),
        (["shakespeare", "--from", "nosuch.txt"], ["nosuch.txt", "does not exist"]),
        (["wikitext2", "--from", ROOT / "LICENSE"], ["zip"]),
        (["mine", "--text", ROOT / "model.py", "--tokenizer", ROOT / "LICENSE"], ["no SentencePiece model"]),
        (["mine", "--text", ROOT / "model.py", "--tokenizer", "x", "--vocab_size", 300], ["drop --vocab_size"]),
        (["mine", "--text", ROOT / "model.py", "--tokenizer", "nosuch.model"], ["nosuch.model", "no such file"]),
        (["mine", "--text", ROOT / "model.py", "--vocab_size", 100], ["--vocab_size", "or more"]),
        (["mine", "--text", ROOT / "model.py", "--vocab_size", 10**5], ["--vocab_size", "at most"]),
    ],
)
def test_preparation_flags(tmp_path, flags, words):
    refused(quick("data/prepare.py", *flags, "--out", tmp_path / "out"), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, code", [(RuntimeError("CPU: not enough memory: 9 bytes"), 2), (MemoryError(), 2)])
def test_too_little_memory_is_one_line(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as leave:
        exit_cleanly(main)
    assert leave.value.code == code and "memory" in capsys.readouterr().err


def test_a_bug_shows_its_traceback():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        exit_cleanly(main)


@pytest.mark.parametrize(
    "script, classes",
    [
        ("train.py", [ModelConfig, TrainConfig]),
        ("eval_ppl.py", [EvalConfig]),
        ("sample.py", [SampleConfig]),
        ("data/prepare.py", [PrepareConfig]),
    ],
)
def test_help_explains_every_flag(script, classes):
    text = " ".join(quick(script, "--help").stdout.split())
    for cls in classes:
        for field in dataclasses.fields(cls):
            shown = field.metadata == NO_FLAG or f"--{field.name.rstrip('_')} " in text or f" {field.name} " in text
            assert shown, field.name
        assert all(help_text.split(" (")[0][:30] in text for help_text in comments(cls).values())
