"""Kill preparing, training and searching at random moments, a hundred times, and see that nothing is lost.

    python tests/soak.py --kills 100 --seed 0

Each is killed by SIGKILL, which lets nothing be tidied up, and then given the same command again (training with
--resume), until it ends. After each kill what is on the disk must be whole, and at most one interval between
checkpoints behind; in the end it must be, bit for bit, what an undisturbed one left, without any other file.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import OWN_TEXT, command, start_command

from checkpoint import load

EVERY = 10  # steps between checkpoints


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def killed(rng: random.Random, longest: float, *line) -> bool:
    """Start a command and kill it after some time, unless it ends before."""
    process = start_command(*line)
    try:
        said = process.communicate(timeout=rng.uniform(longest / 10, longest))[0]
        done = "already prepared" in said or "groups.json exists" in said  # it was killed when all was there
        assert process.returncode == 0 or done, said
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True


def preparing(root: Path, name: str) -> tuple[list, Callable]:
    out = root / name / "own"
    line = ["data/prepare.py", "own", "--text", *OWN_TEXT, "--vocab_size", 400, "--out", out]

    def check() -> None:
        assert not out.exists() or (out / "meta.json").exists(), "a data set appeared in part"

    return line, check


def training(root: Path, name: str) -> tuple[list, Callable]:
    out = root / name
    line = ["train.py", "--dataset", root / "whole-prepare" / "own", "--out_dir", out, "--eval_every", EVERY]
    line += ["--n_layer", 2, "--n_head", 4, "--dim", 32, "--block_size", 32, "--batch_size", 4, "--dropout", 0.1]
    line += ["--eval_tokens", 512, "--max_steps", 1500, "--novel"]
    last = 0

    def check() -> None:
        nonlocal last
        if not (out / "ckpt.pt").exists():
            assert last == 0, "the checkpoint is gone"
            return
        step = load(out / "ckpt.pt")["step"]
        logged = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        steps = [json.loads(text)["step"] for text in logged[:-1]]  # the last line may be half written
        assert step >= last and max(steps, default=0) - step <= EVERY, f"at {max(steps)}, the checkpoint at {step}"
        last = step
        line.append("--resume") if "--resume" not in line else None

    return line, check


def searching(root: Path, name: str) -> tuple[list, Callable]:
    out = root / name / "groups.json"
    line = ["search_groups.py", root / "whole-train" / "ckpt.pt", "--kv_budget", 0.5, "--out", out]
    line += ["--max_evals", 60, "--calibration_tokens", 8192, "--search_tokens", 4096]
    known = 0

    def check() -> None:
        nonlocal known
        log = out.with_suffix(".jsonl")
        text = log.read_text() if log.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()[: text.count("\n")]]
        assert len(lines) >= known, "measurements were lost"
        known = len(lines)

    return line, check


def same(root: Path, kind: str, name: str) -> None:
    """What is left must be what the undisturbed one left, times and names aside."""
    whole, ours = files(root / f"whole-{kind}"), files(root / name)
    assert whole.keys() == ours.keys(), f"other files: {set(ours) ^ set(whole)}"
    if kind == "prepare":
        assert whole == ours
    elif kind == "train":
        a, b = (load(root / folder / "ckpt.pt") for folder in (f"whole-{kind}", name))
        assert all(torch.equal(x, b["model"][key]) for key, x in a["model"].items()), "other weights"
        for one, other in zip(a["optimizers"], b["optimizers"], strict=True):
            moments = [(x, other["state"][i][k]) for i, of in one["state"].items() for k, x in of.items()]
            assert all(torch.equal(x, y) for x, y in moments), "other moments"
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"]
        a, b = ([json.loads(line) for line in text["log.jsonl"].splitlines()] for text in (whole, ours))
        a, b = ([(r["step"], r["loss"], r["norm"]) for r in log if "loss" in r] for log in (a, b))
        assert a == b, "another log"
    else:
        a, b = (json.loads(text["groups.json"]) for text in (whole, ours))
        assert all(a[key] == b[key] for key in ("k_groups", "v_groups", "loss", "kl", "judged")), "another answer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    config = parser.parse_args()
    rng = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind, make, share in (("prepare", preparing, 0.2), ("train", training, 0.6), ("search", searching, 0.2)):
            line, _ = make(root, f"whole-{kind}")
            began = time.monotonic()
            done = command(*line)
            assert done.returncode == 0, done.stderr
            longest, kills, ended, round_ = time.monotonic() - began, 0, 0, 0
            while kills < round(share * config.kills):
                name, round_ = f"{kind}-{round_}", round_ + 1
                line, check = make(root, name)
                while killed(rng, min(longest, 8.0), *line):
                    kills += 1
                    check()
                same(root, kind, name)
                ended += 1
                shutil.rmtree(root / name)
            print(f"{kind}: {kills} kills in {ended} runs, each ended with the undisturbed one's bits", flush=True)


if __name__ == "__main__":
    main()
