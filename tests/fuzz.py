"""Damaged and hostile inputs to every reader, by chance; a table of what became of them.

    python tests/fuzz.py --inputs 1000 --seed 0

Each input is a good file in which bytes were cut, flipped, doubled or added, or a value put in the place of another. A
command reads it, inside this process. It must refuse it in one line (exit code 2), or accept it: the result is then
that of the undamaged file, or else the damage made another valid file, such as another text. Anything else is a fault:
a traceback, more than a minute, memory of more than three times the input and 24 MiB. --keep FOLDER keeps those.
"""

import argparse
import copy
import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import OWN_TEXT, quick, sharp_model
from foreign import checkpoint_of, save_folder, their_model, write_llama2c, write_llama2c_tokenizer

from checkpoint import load, save
from data.prepare import PrepareConfig, prepare
from device import peak_memory_bytes, reset_peak_memory
from tokenizer import Tokenizer

SLACK = 24 * 2**20  # bytes that the command may take for itself, whatever it reads
HOSTILE = [None, True, -1, 0, 1, 2**31, 10**30, 1e308, -1e-300, math.nan, math.inf, "", "x", "../../x", [], {}, [[]]]
HOSTILE += [[0] * 9, {"a": 1}, "é" * 40]
CPU = torch.device("cpu")


class Hang(BaseException):
    """More than a minute."""


def ring(*_) -> None:
    raise Hang


@dataclass
class Reader:
    """A command, the good file that it reads, and what says whether two results are the same."""

    file: str  # in a folder of its own
    read: Callable[[Path, Path], list]  # the folder, and a place for output -> the command line
    result: Callable[[Path, str], object]  # the same, and what it printed -> what can be compared
    counts: Counter = field(default_factory=Counter)
    most: int = 0  # bytes of memory that one input took


# ---- damage ----


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    data, start = bytearray(data), rng.randrange(len(data))
    length = min(len(data) - start, 1 + int(2 ** rng.uniform(0, 12)))
    how = rng.choice(("cut", "flip", "flip", "delete", "repeat", "insert", "zero"))
    if how == "cut":
        return bytes(data[:start])
    if how == "flip":
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    piece = {"delete": b"", "repeat": data[start : start + length] * 2, "insert": rng.randbytes(length)}
    data[start : start + length] = piece.get(how, bytes(length))
    return bytes(data)


def damaged_value(value: object, rng: random.Random) -> object:
    """The same with one of its values, however deep, replaced by a hostile one, dropped or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        value = copy.copy(value)
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        how = rng.random()
        if how < 0.1:
            del value[key]
        elif how < 0.15 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = damaged_value(value[key], rng)
        return value
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        return rng.choice((value[:1], value.double(), value.to(torch.int8), value[..., None], value.flatten()))
    return rng.choice(HOSTILE)


def damaged_file(path: Path, rng: random.Random) -> None:
    """Half of those that have a structure are damaged in it, else in their bytes."""
    if path.suffix == ".pt" and rng.random() < 0.7:
        torch.save(damaged_value(torch.load(path, weights_only=True), rng), path)
    elif path.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(damaged_value(json.loads(lines[number]), rng))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".gz" and rng.random() < 0.5:
        path.write_bytes(gzip.compress(damaged_bytes(gzip.decompress(path.read_bytes()), rng)))
    else:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))


# ---- the readers ----


def weights(path: Path) -> dict:
    checkpoint = load(path)
    return {"config": checkpoint["config"], **{k: (x.dtype, x.tolist()) for k, x in checkpoint["model"].items()}}


def readers(root: Path) -> dict[str, Reader]:
    """Make a good file for each, in a folder of its name."""
    data, run = root / "data", root / "run"
    prepare(PrepareConfig("own", text=OWN_TEXT[:3], vocab_size=400, out=str(data)))
    shape = ["--n_layer", 2, "--n_head", 4, "--dim", 32, "--block_size", 32, "--batch_size", 2, "--eval_tokens", 64]
    trained = ["--dataset", data, "--max_steps", 2, "--out_dir"]
    good = (
        quick("train.py", *shape, *trained, run),
        quick("train.py", "--init_from", run / "ckpt.pt", "--lora_r", 2, "--batch_size", 2, *trained, root / "tuned"),
    )
    assert not any(done.returncode for done in good), good
    ckpt, tokenizer = run / "ckpt.pt", (data / "tokenizer.model").read_bytes()
    few = ["--dataset", data, "--calibration_tokens", 256, "--refit", "none"]
    folders = {
        name: root / "good" / name for name in ("run", "adapter", "groups", "log", "data", "hf", "llama2c", "records")
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
    shutil.copy(ckpt, folders["run"])
    shutil.copy(root / "tuned" / "ckpt.pt", folders["adapter"])
    groups = {"k_groups": [[0, 0, 1, 2], [0, 1, 1, 1]], "v_groups": [[0, 0, 0, 0], [0, 1, 2, 3]]}
    (folders["groups"] / "groups.json").write_text(json.dumps(groups))
    found = ["--kv_budget", 0.5, "--method", "random", "--max_evals", 3, "--search_tokens", 64, *few, "--overwrite"]
    assert quick("search_groups.py", ckpt, *found, "--out", folders["log"] / "log.json").returncode == 0
    (folders["log"] / "log.json").unlink()
    shutil.copytree(data, folders["data"], dirs_exist_ok=True)
    save_folder(their_model(vocab_size=400), folders["hf"], "safetensors")
    (folders["hf"] / "tokenizer.model").write_bytes(tokenizer)
    write_llama2c(folders["llama2c"] / "model.bin", sharp_model(vocab_size=400, tie_embeddings=True))
    write_llama2c_tokenizer(folders["llama2c"] / "tok.bin", Tokenizer(tokenizer).sp)
    records = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join("one" * n)} for n in range(1, 30)]
    (folders["records"] / "records.json").write_text(json.dumps(records))
    (folders["records"] / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    save(root / "small.pt", checkpoint_of(sharp_model(vocab_size=400), tokenizer))

    def resume(f: Path, out: Path) -> list:
        out.mkdir(exist_ok=True)
        shutil.copy(f / "ckpt.pt", out / "ckpt.pt")
        return ["train.py", "--resume", "--out_dir", out, "--dataset", data, "--max_steps", 3]

    def searched(out: Path, said: str) -> object:
        record = json.loads(out.with_suffix(".json").read_text())
        return record["k_groups"], record["v_groups"]

    def stored(out: Path, said: str) -> object:
        return weights(out.with_suffix(".pt"))

    def searching(f: Path, out: Path) -> list:
        return ["search_groups.py", ckpt, *found, "--out", out.with_suffix(".json"), "--log", f / "log.jsonl"]

    return {
        "checkpoint, resumed": Reader("run/ckpt.pt", resume, lambda out, said: weights(out / "ckpt.pt")),
        "checkpoint, evaluated": Reader(
            "run/ckpt.pt", lambda f, out: ["eval_ppl.py", f / "ckpt.pt", "--dataset", data, "--max_tokens", 40],
            lambda out, said: re.findall(r"perplexity [\d.]+", said),
        ),
        "adapter, merged": Reader(
            "adapter/ckpt.pt",
            lambda f, out: ["lora.py", "merge", f / "ckpt.pt", "--out", out.with_suffix(".pt")], stored
        ),
        "group file": Reader(
            "groups/groups.json", lambda f, out: ["gqa.py", ckpt, "--groups", f / "groups.json", "--out",
                                                  out.with_suffix(".pt"), "--eval_tokens", 64, *few], stored
        ),
        "log of a search": Reader("log/log.jsonl", searching, searched),
        **{f"data set: {name}": Reader(
            f"data/{name}", lambda f, out: ["eval_ppl.py", ckpt, "--dataset", f, "--max_tokens", 40],
            lambda out, said: re.findall(r"perplexity [\d.]+", said),
        ) for name in ("meta.json", "val.bin", "tokenizer.model")},
        **{f"Hugging Face: {name}": Reader(
            f"hf/{name}", lambda f, out: ["checkpoint.py", "import", f, out.with_suffix(".pt")], stored
        ) for name in ("config.json", "model.safetensors", "tokenizer.model")},
        **{f"llama2.c: {name}": Reader(
            f"llama2c/{name}", lambda f, out: ["checkpoint.py", "import", f / "model.bin", out.with_suffix(".pt"),
                                               "--tokenizer", f / "tok.bin"], stored
        ) for name in ("model.bin", "tok.bin")},
        **{f"instructions: {name}": Reader(
            f"records/{name}", lambda f, out, name=name: ["data/prepare.py", "mine", "--from", f / name, "--out", out,
                                                          "--tokenizer", root / "small.pt"],
            lambda out, said: (out / "train.bin").read_bytes()
        ) for name in ("records.json", "records.jsonl")},
    }  # fmt: skip


# ---- the trials ----


def outcome(reader: Reader, folder: Path, out: Path, right: object) -> str:
    """What became of one input."""
    size = (folder / Path(reader.file).name).stat().st_size
    before = peak_memory_bytes(CPU)
    reset_peak_memory(CPU)
    before = min(before, peak_memory_bytes(CPU))
    try:
        signal.alarm(60)
        done = quick(*reader.read(folder, out))
    except Hang:
        return "hang"
    except Exception:
        traceback.print_exc()
        return "traceback"
    finally:
        signal.alarm(0)
    grown = peak_memory_bytes(CPU) - before
    reader.most = max(reader.most, grown)
    if grown > 3 * size + SLACK:
        return "memory"
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    if done.returncode:
        return "refused" if done.returncode == 2 and len(errors) == 1 and len(errors[0]) < 600 else "traceback"
    return "accepted, same" if reader.result(out, done.stdout) == right else "accepted, other"


def clear(out: Path) -> None:
    for path in out.parent.glob(out.name + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def trials(root: Path, inputs: int, seed: int, keep: Path | None = None) -> dict[str, Reader]:
    """So many inputs, spread evenly over the readers."""
    signal.signal(signal.SIGALRM, ring)
    found, out, rights = readers(root), root / "out" / "x", {}
    out.parent.mkdir()
    for number in range(inputs):
        name, reader = list(found.items())[number % len(found)]
        good = root / "good" / Path(reader.file).parent
        if name not in rights:
            done = quick(*reader.read(good, out))
            assert done.returncode == 0, (name, done.stderr)
            rights[name] = reader.result(out, done.stdout)
            clear(out)
        folder, rng = root / "in", random.Random(f"{seed} {number}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        damaged_file(folder / Path(reader.file).name, rng)
        what = outcome(reader, folder, out, rights[name])
        reader.counts[what] += 1
        if what in ("hang", "traceback", "memory"):
            print(f"input {number}, {name}: {what}", file=sys.stderr, flush=True)
            if keep:
                shutil.copytree(folder, keep / str(number), dirs_exist_ok=True)
        clear(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    config = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as root:
        found = trials(Path(root), config.inputs, config.seed, config.keep)
    columns = ("refused", "accepted, same", "accepted, other", "traceback", "hang", "memory")
    print(f"{'':30}" + "".join(f"{column:>17}" for column in columns) + "   most memory")
    for name, reader in found.items():
        print(f"{name:30}" + "".join(f"{reader.counts[c]:>17}" for c in columns) + f"{reader.most / 2**20:>10.1f} MiB")
    total = sum((reader.counts for reader in found.values()), Counter())
    print(f"{'all':30}" + "".join(f"{total[c]:>17}" for c in columns))
    sys.exit(any(total[fault] for fault in columns[3:]))


if __name__ == "__main__":
    main()
