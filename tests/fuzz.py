"""Damaged and hostile inputs to every reader, at random; a table of what became of them.

    OMP_NUM_THREADS=1 python tests/fuzz.py 1000 0               # inputs, and the seed of the damage

Each input is a good file in which bytes were cut, flipped, repeated or added, or one value was replaced. A
command that reads it must refuse it (exit code 2, one line) or accept it: its result is then the good file's,
or that of another valid file. Anything else is a fault: a traceback, more than a minute, memory beyond three
times the input plus 24 MiB, code that ran.
"""

import ctypes
import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from conftest import content, quick, refused, run, sharp_model
from corpus import write_corpus
from foreign import checkpoint_of, save_folder, their_model, write_llama2c

from checkpoint import save
from common import peak_memory_bytes
from data.tokenizer import Tokenizer
from study.bench import reset_peak_memory

SLACK = 24 * 2**20  # bytes that a command may take for itself, whatever it reads
FAULTS = ("traceback", "hang", "memory", "code run")
FEW = " --dataset {r}/data --calibration_tokens 256 --refit none"
SEARCH = "search_groups.py {r}/run/ckpt.pt --kv_budget 0.5 --method random --max_evals 3"
SEARCH += " --search_tokens 256" + FEW
GROUP = "gqa.py {r}/run/ckpt.pt --groups {f}/{n} --eval_tokens 64 --out {o}/x.pt" + FEW
GOOD = (  # commands that make good files in the folder {r}
    "data/prepare.py own --text {r}/corpus --vocab_size 400 --out {r}/data",
    "train.py --dataset {r}/data --batch_size 2 --max_steps 2"
    " --n_layer 2 --n_head 4 --dim 32 --out_dir {r}/run",
    "train.py --init_from {r}/run/ckpt.pt --max_steps 2 --lora_r 2 --out_dir {r}/adapted",
    "formats export {r}/adapted/ckpt.pt {r}/peft --adapter",
    "formats export {r}/adapted/ckpt.pt {r}/own/adapter.pt --adapter",
    "formats export {r}/run/ckpt.pt {r}/gguf/x.gguf",
    SEARCH + " --out {r}/log/x.json --log {r}/log/log.jsonl",
)
READERS = (  # files to damage; the command that reads {f}/{n} and may write to {o}; its result, if no text
    ("run/ckpt.pt", "train.py --resume --out_dir {f} --dataset {r}/data --max_steps 3", "{f}/ckpt.pt"),
    ("ours/ckpt.pt", "eval_ppl.py {f}/ckpt.pt --dataset {r}/data --max_tokens 40", ""),
    ("adapted/ckpt.pt", "checkpoint.py merge {f}/ckpt.pt --out {o}/x.pt", "{o}/x.pt"),
    ("groups/x.json", GROUP, "{o}/x.pt"),
    ("log/log.jsonl", SEARCH + " --out {o}/groups.json --log {f}/{n}", "{o}/groups.json"),
    ("data/meta.json data/val.bin data/tokenizer.model",
     "eval_ppl.py {r}/run/ckpt.pt --dataset {f} --max_tokens 40", ""),
    ("records/x.json records/x.jsonl records/x.jsonl.gz",
     "data/prepare.py x --from {f}/{n} --out {o}/x --tokenizer {r}/run/ckpt.pt", "{o}/x/train.bin"),
    ("hf/config.json hf/model.safetensors hf/tokenizer.model meta/params.json meta/consolidated.00.pth",
     "formats import {f} {o}/x.pt", "{o}/x.pt"),
    ("llama2c/model.bin llama2c/tok.bin",
     "formats import {f}/model.bin {o}/x.pt --tokenizer {f}/tok.bin", "{o}/x.pt"),
    ("peft/adapter_config.json peft/adapter_model.safetensors",
     "formats import {f} {o}/x.pt --base {r}/run/ckpt.pt", "{o}/x.pt"),
    ("gguf/x.gguf", "formats import {f}/{n} {o}/x.pt", "{o}/x.pt"),
    ("own/adapter.pt", "formats import {f}/{n} {o}/x.pt --base {r}/run/ckpt.pt", "{o}/x.pt"),
)  # fmt: skip


class Bomb:
    """Creates a file when it is unpickled."""

    marker = Path(tempfile.gettempdir(), f"code-has-run-{os.getpid()}")

    def __reduce__(self):
        return Path.touch, (self.marker,)


HOSTILE = [None, True, -1, 0, 1, 2**31, 10**30, 1e308, -1e-300, math.nan, math.inf]
HOSTILE += ["", "x", "../../x", "é" * 40, [], [[]], [0] * 9, {}, {"a": 1}]


def good_files(root: Path) -> Path:
    """The folder, filled with a good file of each kind."""
    write_corpus(root / "corpus")
    for line in GOOD:
        run(*line.format(r=root).split())
    model, tokenizer = sharp_model(vocab_size=400), (root / "data/tokenizer.model").read_bytes()
    records = [{"instruction": f"Count to {n}.", "input": "", "output": "one " * n} for n in range(1, 30)]
    lines = "\n".join(map(json.dumps, records)).encode()
    groups = {"k_groups": [[0, 0, 1, 2], [0, 1, 1, 1]], "v_groups": [[0, 0, 0, 0], [0, 1, 2, 3]]}
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}
    save_folder(their_model(vocab_size=400), root / "hf")
    save(root / "ours/ckpt.pt", checkpoint_of(model, tokenizer))
    files = {"groups/x.json": groups, "records/x.json": records, "meta/params.json": params}
    files = {name: json.dumps(value).encode() for name, value in files.items()}
    files |= {"records/x.jsonl": lines, "records/x.jsonl.gz": gzip.compress(lines)}
    files |= {"hf/tokenizer.model": tokenizer, "meta/tokenizer.model": tokenizer}
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    torch.save(model.state_dict(), root / "meta/consolidated.00.pth")
    (root / "llama2c").mkdir()
    write_llama2c(root / "llama2c", model, Tokenizer(tokenizer).sp)
    return root


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    start, flipped = rng.randrange(len(data)), bytearray(data)
    for _ in range(rng.randrange(1, 9)):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    piece, tail = data[start:][: 1 + int(2 ** rng.uniform(0, 12))], data[start:]
    others = b"", bytes(len(piece)), piece + piece, rng.randbytes(len(piece)) + piece
    cut = (data[:start] + new + tail[len(piece) :] for new in others)
    return rng.choice((data[:start], bytes(flipped), bytes(flipped), *cut))


def damaged_value(value: object, rng: random.Random, hostile: list) -> object:
    """The value with one part dropped or replaced by a hostile one."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        value = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        part = value.pop(key)
        if rng.random() < 0.1:
            return value
        part = damaged_value(part, rng, hostile)
        return {**value, key: part} if isinstance(value, dict) else [*value[:key], part, *value[key:]]
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        return rng.choice((value.flatten()[:1], value.double(), value.char(), value[..., None], value.t()))
    return rng.choice(hostile)


def damage(path: Path, rng: random.Random) -> None:
    """Damage a file: about half of those that have a structure in it, the others in their bytes."""
    kind, data = path.suffix if rng.random() < 0.6 else "", path.read_bytes()
    if kind in (".pt", ".pth"):
        found = torch.load(path, weights_only=True)
        torch.save(damaged_value(found, rng, [*HOSTILE, Bomb(), Bomb()]), path)
    elif kind in (".json", ".jsonl"):
        lines = data.split(b"\n") if kind == ".jsonl" else [data]
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(damaged_value(json.loads(lines[number] or "0"), rng, HOSTILE)).encode()
        path.write_bytes(b"\n".join(lines))
    elif kind == ".gz":
        path.write_bytes(gzip.compress(damaged_bytes(gzip.decompress(data), rng)))
    else:
        path.write_bytes(damaged_bytes(data, rng))


def attempt(line: str, size: int) -> tuple[str, subprocess.CompletedProcess | None]:
    """Run a command on an input of so many bytes: "refused", "accepted" or a fault; and what it printed."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    getattr(ctypes.CDLL(None), "malloc_trim", bool)(0)  # a run on the CPU lets malloc keep what is freed
    before, done = reset_peak_memory(torch.device("cpu")), None
    signal.alarm(60)
    try:
        done = quick(*line.split())
        if done.returncode:
            refused(done)
        what = "refused" if done.returncode else "accepted"
    except Exception:
        what = "hang" if done and done.returncode == 128 + signal.SIGINT else "traceback"
        traceback.print_exc()
    signal.alarm(0)
    if Bomb.marker.exists():
        Bomb.marker.unlink()
        what = "code run"
    elif peak_memory_bytes(torch.device("cpu")) - before > 3 * size + SLACK:
        what = "memory"
    return what, done


def trials(good: Path, root: Path, inputs: int, seed: int) -> dict[str, Counter]:
    """{file: {what became of it: count}} of so many inputs, spread evenly over the files."""
    readers, rights = [(file, *reader) for files, *reader in READERS for file in files.split()], {}
    counts = {file: Counter() for file, *_ in readers}
    for number in range(-len(readers), inputs):  # at first each undamaged
        file, line, result = readers[number % len(readers)]
        path, out, rng = root / file, root / "out", random.Random(f"{seed} {number}")
        for folder in (path.parent, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good / path.parent.name, path.parent)
        out.mkdir()
        if number >= 0:
            damage(path, rng)
        names = {"f": path.parent, "n": path.name, "o": out, "r": good}
        what, ran = attempt(line.format(**names), path.stat().st_size)
        if what == "accepted":
            got = content(Path(result.format(**names))) if result else re.findall("perplexity .*", ran.stdout)
            what = "the same" if got == rights.setdefault(file, got) else "another"
        assert number >= 0 or what == "the same", (file, what, ran)
        counts[file][what] += number >= 0
        if what in FAULTS:
            print(f"input {number}, {file}: {what}", file=sys.stderr, flush=True)
    return counts


def main() -> None:
    inputs, seed = map(int, sys.argv[1:])
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as root:
        good = good_files(Path(root, "good"))
        counts = trials(good, Path(root, "trials"), inputs, seed)
    counts["all"] = sum(counts.values(), Counter())
    for file, of_file in counts.items():
        print(f"{file:32}", dict(of_file))
    sys.exit(any(counts["all"][fault] for fault in FAULTS))


if __name__ == "__main__":
    main()
