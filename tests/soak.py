"""Kill preparing, training and searching at random moments, a hundred times, and check that nothing is lost.

    python tests/soak.py 100 0               # kills of all three together, and the seed of the moments

After SIGKILL the same command is started again (training with --resume), until one ends by itself. After
each kill the files must be whole, and at most one checkpoint interval behind; in the end they must be those
of an undisturbed run, bit for bit, and no others.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import command, content, records, start_command
from corpus import write_corpus

from checkpoint import load

COMMANDS = {  # name: share of the kills, and line; {o}: its output, {r}: output of the undisturbed ones
    "prepare": (0.2, "data/prepare.py own --text {r}/corpus --vocab_size 400 --out {o}/own"),
    "train": (0.6, "train.py --dataset {r}/prepare/own --out_dir {o} --n_layer 2 --n_head 4 --dim 32 --novel "
                   "--block_size 32 --batch_size 4 --dropout 0.1 --eval_every 10 --max_steps 1500"),
    "search": (0.2, "search_groups.py {r}/train/ckpt.pt --out {o}/groups.json --kv_budget 0.5 --max_evals 60 "
                    "--calibration_tokens 8192 --search_tokens 2048"),
}  # fmt: skip
ENDED = "is prepared: use it", "groups.json exists"  # where one was killed after its work


def killed(seconds: float, line: str) -> bool:
    """Start a command and kill it after some seconds, unless it ends before."""
    process = start_command(*line.split())
    try:
        printed = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    assert process.returncode == 0 or any(words in printed for words in ENDED), printed
    return False


def progress(folder: Path) -> int:
    """Steps in the checkpoint, or measurements in the log. What stands in the folder must be whole."""
    assert not (folder / "own").exists() or (folder / "own/meta.json").exists(), "a data set appeared in part"
    if not (folder / "ckpt.pt").exists():
        return len(records(folder / "groups.jsonl"))
    step = load(folder / "ckpt.pt")["step"]
    logged = max((record["step"] for record in records(folder / "log.jsonl")), default=0)
    assert logged - step <= 10, f"logged {logged}, the checkpoint has {step}"
    return step


def contents(folder: Path) -> dict:
    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    most, rng = int(sys.argv[1]), random.Random(int(sys.argv[2]))
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder), Path(folder, "killed")
        write_corpus(root / "corpus")
        for name, (share, line) in COMMANDS.items():
            began, kills, runs = time.monotonic(), 0, 0
            done = command(*line.format(r=root, o=root / name).split())
            assert done.returncode == 0, done.stderr
            shortest, line = min(8.0, time.monotonic() - began), line.format(r=root, o=out)
            while kills < round(share * most):
                last, longest, runs = 0, shortest, runs + 1
                while killed(longest * rng.uniform(0.1, 1), line + " --resume" * (out / "ckpt.pt").exists()):
                    kills, before, last = kills + 1, last, progress(out)
                    longest *= 1.05  # a busy machine takes longer to begin
                    assert last >= before, f"{before} became {last}"
                assert contents(out) == contents(root / name), "another result"
                shutil.rmtree(out)
            print(f"{name}: {kills} kills in {runs} runs, each with the undisturbed one's result", flush=True)


if __name__ == "__main__":
    main()
