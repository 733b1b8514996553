"""Every mistake ends with one line that names the remedy, exit code 2, and nothing lost or half written."""

import os
import resource
import shutil

import pytest
import torch
from conftest import ROOT, command, quick, small_run

from checkpoint import load


def refused(done, *words):
    """Exit code 2, one line on stderr that has the words, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr or done.stdout}"
    assert "Traceback" not in done.stderr and "error: " in lines[-1], done.stderr
    assert sum("error: " in line for line in lines) == 1 and len(lines[-1]) < 500
    for word in words:
        assert str(word) in lines[-1], lines[-1]


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
        (["--batch_size", 0], ["batch_size is 0"]),
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


@pytest.mark.parametrize("script", ["eval_ppl.py", "sample.py"])
def test_damaged_and_foreign_checkpoints(tiny_run, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in broken_checkpoints(tiny_run, tmp_path):
        refused(quick(script, path))
    refused(quick(script, tmp_path / "nothing.pt"), "nothing.pt", "no such checkpoint")
    refused(quick(script, tmp_path), "no such checkpoint")
    assert not (tmp_path / "evil-was-here").exists()


def test_evaluation_flags(tiny_run, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Bj\u00f6rk".encode("latin1"))
    (tmp_path / "empty.txt").write_text("")
    for flags, words in [
        (["--text", tmp_path / "no.txt"], ["no.txt", "no such file"]),
        (["--text", tmp_path / "latin.txt"], ["not UTF-8", "iconv"]),
        (["--text", tmp_path / "empty.txt"], ["too few"]),
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
    from data.prepare import PrepareConfig, prepare

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
    flags = [*small_run(tiny_data, tmp_path), "--max_steps", 50, "--lr", 1e30, "--warmup_steps", 0, "--grad_clip", 0]
    refused(command("train.py", *flags), "step ", "--lr", "ckpt.pt keeps")
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "ckpt.pt")["model"].values())


def limited(megabytes: int):
    """Files of at most so many bytes for the child, as on a full disk."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, megabytes << 20))


def test_a_full_disk_keeps_the_previous_checkpoint(tiny_data, tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent, tmp_path / "run")
    path = tmp_path / "run" / "ckpt.pt"
    flags = [*small_run(tiny_data, tmp_path / "run"), "--max_steps", 40, "--lr", 0.01, "--resume"]
    done = command("train.py", *flags, preexec_fn=lambda: limited(0))
    refused(done)
    assert load(path)["step"] == 30 and path.read_bytes() == tiny_run.read_bytes()
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_one_line(tiny_data, tmp_path):
    tmp_path.chmod(0o500)
    refused(command("train.py", *small_run(tiny_data, tmp_path / "run")), "Permission denied")


def test_a_path_that_cannot_be_written_is_one_line(tiny_data):
    refused(command("train.py", *small_run(tiny_data, "/proc/none"), "--max_steps", 1), "/proc/none")


def test_help_explains_every_flag():
    for script in ("train.py", "eval_ppl.py", "sample.py", "data/prepare.py"):
        done = quick(script, "--help")
        assert done.returncode == 0 and "(default: " in done.stdout, done.stderr
