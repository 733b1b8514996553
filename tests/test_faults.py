"""What happens around a run: kills, other processes, changed files, another environment, damaged inputs.

soak.py and fuzz.py do the same by the hundred; here a few of each.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ONE_THREAD, ROOT, command, quick, refused, small_run
from fuzz import trials

from checkpoint import load, save
from config import UserError
from data.prepare import PrepareConfig, prepare
from files import held, replacing


def test_a_second_run_in_a_folder_is_refused(tiny_data, tmp_path):
    flags = [*small_run(tiny_data, tmp_path / "run"), "--max_steps", 1]
    with held(tmp_path / "run"):
        refused(command("train.py", *flags), "run is in use by another process")
    assert command("train.py", *flags).returncode == 0
    with held(tmp_path / "own.partial"):
        done = command("data/prepare.py", "own", "--text", ROOT / "train.py", "--out", tmp_path / "own")
        refused(done, "own.partial is in use by another process")


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path):
    code = f"from files import *; lock = held(Path({str(tmp_path)!r})); lock.__enter__(); print(flush=True)"
    line = [sys.executable, "-c", code + "; input()"]
    process = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(UserError, match="in use"), held(tmp_path):
        pass
    process.kill()
    process.wait()
    with held(tmp_path):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.model"])
def test_data_of_other_bytes_and_the_same_size_are_noticed(tiny_data, tiny_run, tmp_path, name):
    shutil.copytree(tiny_data, tmp_path / "data")
    data = bytearray((tmp_path / "data" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "data" / name).write_bytes(data)
    done = quick("train.py", *small_run(tmp_path / "data", tmp_path / "run"), "--max_steps", 1)
    refused(done, str(tmp_path / "data"), "--overwrite")
    assert not (tmp_path / "run").exists()


def test_what_a_killed_preparation_left_is_cleared_away(tiny_data, tmp_path):
    (tmp_path / "own.partial").mkdir()
    (tmp_path / "own.partial" / "train.bin").write_bytes(b"half")
    shutil.copytree(tiny_data, tmp_path / "own")
    (tmp_path / "own" / "meta.json").unlink()  # killed while the old one was taken away
    prepare(PrepareConfig("own", text=[str(ROOT / "train.py")], vocab_size=400, out=str(tmp_path / "own")))
    names = {path.name for path in (tmp_path / "own").iterdir()}
    assert names == {"meta.json", "tokenizer.model", "train.bin", "val.bin", "test.bin"}
    assert not (tmp_path / "own.partial").exists()


def test_neither_locale_nor_hash_seed_nor_folder_change_a_run(tiny_data, tmp_path):
    """Nor can what is printed, in an encoding that lacks its letters, end it."""
    found = []
    for name, environment in (
        ("a", {}),
        (
            "b",
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
        ),
    ):
        line = [sys.executable, str(ROOT / "train.py"), *small_run(tiny_data, tmp_path / name), "--max_steps", 3]
        done = subprocess.run(
            list(map(str, line)), cwd=tmp_path, env={**ONE_THREAD, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(load(tmp_path / name / "ckpt.pt"))
    assert all(torch.equal(x, found[1]["model"][key]) for key, x in found[0]["model"].items())
    assert found[0]["tokenizer"] == found[1]["tokenizer"]


LIES = {  # each of these was once a traceback, or worse
    "train.lr": "x", "train.seed": -1, "train": [], "data": [], "data.splits": None,
    "step": -1, "tokens": None, "seconds": float("nan"),
    "optimizers": [], "optimizers.0": 3, "optimizers.0.state": {0: 3}, "optimizers.0.state.0": {},
    "optimizers.0.state.0.momentum_buffer": torch.zeros(3), "optimizers.1.state.0.step": torch.zeros(2, 2),
}  # fmt: skip


@pytest.mark.parametrize("place", LIES)
def test_training_state_that_lies_is_refused(tiny_run, tmp_path, place):
    checkpoint = load(tiny_run)
    *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
    part = checkpoint
    for key in path:
        part = part[key]
    part[last] = LIES[place]
    save(tmp_path / "ckpt.pt", checkpoint)
    before = (tmp_path / "ckpt.pt").read_bytes()
    refused(quick("train.py", "--resume", "--out_dir", tmp_path, "--max_steps", 31))
    assert (tmp_path / "ckpt.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_lost_folder_is_made_again(tmp_path):
    save(tmp_path / "run" / "ckpt.pt", {"a": 1})
    shutil.rmtree(tmp_path / "run")
    save(tmp_path / "run" / "ckpt.pt", {"a": 2})
    with pytest.raises(UserError, match="cannot write"), replacing(tmp_path / "run" / "other.pt", "wb") as file:
        os.remove(file.name)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ckpt.pt"]


def test_damaged_inputs_are_refused_or_harmless(tmp_path):
    readers = trials(tmp_path, inputs=64, seed=1)
    for name, reader in readers.items():
        assert set(reader.counts) <= {"refused", "accepted, same", "accepted, other"}, (name, reader.counts)
    assert sum(reader.counts["refused"] for reader in readers.values()) > 32
