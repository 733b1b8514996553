"""A mistake, a damaged file, a full disk: exit code 2, one line that names what is wrong, nothing lost.

fuzz.py and soak.py damage and kill by the hundred, at random; here are the cases that chance would not find.
"""

import io
import json
import re
import resource
import shlex
import shutil
import struct
import zipfile
from itertools import product
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ONE_THREAD, command, content, quick, refused, run, sharp_model, small_run
from foreign import change_json, checkpoint_of
from fuzz import FAULTS, Bomb, attempt, good_files, trials

from checkpoint import load, save
from formats.models import FIELDS
from train import STREAM

MISTAKES = """
train.py --dataset data --max_steps 1 --dim 32 --out_dir new
    --n_layers 6                             --n_layers
    --lr nan                                 --lr
    --n_head 7                               --n_head
    --n_kv_head 3                            --n_kv_head
    --vocab_size 300                         --vocab_size
    --block_size 1000000                     --block_size
    --dataset nosuch                         data/prepare.py nosuch
    --dataset flipped                        flipped
    --dataset masked                         masked
    --dataset kindless                       kindless is damaged
    --resume --overwrite                     --overwrite
    --fsdp                                   torchrun
    --lora_r 2                               --init_from
    --teacher run/ckpt.pt --block_size 300   --block_size
    --teacher ''                             --teacher
    --teacher alien.pt                       another tokenizer
    --teacher run/ckpt.pt --out_dir run --overwrite    another --out_dir
    --distil_weight 0.3                      --teacher
    --optimizer adamw --momentum 0.9         --momentum
    --out_dir run                            --resume
    --out_dir /proc/none                     /proc/none
train.py --out_dir run --resume
    --out_dir new                            --resume
    --out_dir moved                          not the data
    --out_dir moved_train                    not the data
train.py --init_from run/ckpt.pt --max_steps 1 --out_dir new
    --dim 48                                 --dim
    --dataset other                          other has another tokenizer
    --init_from odd.pt                       dataset 3
    --lora_alpha 3                           --lora_r
    --lora_r 0 --quantize nf4                --quantize is
    --init_from lora.pt --lora_r 8           --lora_r
data/prepare.py --out new mine
    --tokenizer run/ckpt.pt                  --text
    --text latin.txt                         latin.txt
    --text text.txt --vocab_size 9           --vocab_size
    --text text.txt --out /                  --out
    --text text.txt --tokenizer nosuch.pt    nosuch.pt
    --from nosuch.json --tokenizer bare.pt   bare.pt
    --text text.txt ''                       text.txt ''
    --text text.txt --fields a,b             records
    --from tasks.json --fields a,b           --fields
    --parallel text.txt tasks.json           tasks.json
eval_ppl.py run/ckpt.pt
    --text latin.txt                         latin.txt
    --stride 100 --context 10 --method all   --stride 1 to 10
    --stride 4 --method block_mean           --method sliding
    --text text.txt --dataset data           --text
    --dataset tasks                          study score
    --dataset other                          another tokenizer
sample.py
    run/ckpt.pt --prompt '\udcff'            UTF-8
    run/ckpt.pt --prompt x --instruction y   --instruction
    bare.pt                                  --tokenizer
    nan.pt                                   inf or nan
checkpoint.py
    show hf                                  formats import hf
    merge run/ckpt.pt --out new.pt           adapter
    merge lora.pt --out run/ckpt.pt          --overwrite
gqa.py run/ckpt.pt --out new.pt --calibration_tokens 1024
    --seed 1                                 --kv_budget
    --n_kv_head 5                            --n_kv_head
    --n_kv_head 2 --latent                   --kv_budget
    --kv_budget 0.5 --latent --merge mean    --latent
    --kv_budget 0.5 --cache_tokens           --latent
    --kv_budget 0.01 --latent                --kv_budget 0.063 to 1
    --groups tasks.json                      tasks.json
    --kv_budget 0.5 --out run/ckpt.pt/x.pt   cannot write
    --kv_budget 0.5 --out lora.pt            --overwrite
    --kv_budget 0.5 --overwrite --out run/ckpt.pt       the checkpoint itself
search_groups.py run/ckpt.pt --out new.json --calibration_tokens 1024
    --kv_budget 0.5 --search_tokens 4        --search_tokens
    --kv_budget 0.5 --log new.json           --log
-m formats
    import nosuch new.pt                     nosuch
    import hf new.pt --tokenizer text.txt    text.txt
    import text.txt new.pt --base bare.pt    text.txt
    export run/ckpt.pt hf                    hf exists
    export run/ckpt.pt new.pt                --adapter
    export novel.pt new                      --novel
    export latent.pt new                     --cache_tokens
    export five.pt new                       n_head
    export lora.pt new                       checkpoint.py merge
    export run/ckpt.pt new.pt --adapter      --lora_r
    import hf new.gguf                       import writes a .pt
    import lora.pt new.pt --base run/ckpt.pt --block_size 64    --block_size
-m study
    score run/ckpt.pt --dataset data         eval_ppl.py
    plot loss data                           log.jsonl
    plot loss bytes                          log.jsonl is damaged
    plot groups run/ckpt.pt --out new.jpg    --out
    plot groups latent.pt                    latents
    begin foo                                llama2.c
    begin scaled --n_layer 6 --resume        --out_dir
    begin scaled --init_from run/ckpt.pt     --init_from
    begin nanoGPT=x.py --out_dir x --teacher run/ckpt.pt        --teacher
    compare-speed data/meta.json             --overwrite
    compare-speed new.jsonl --device cuda    --device
    memory --batch_size 6                    --batch_size
    decode --dim 64 --ckpts run/ckpt.pt      --kv_bits only
    attention                                --init_from
    attention --init_from lora.pt            checkpoint.py
"""
# a command line and what its error must name, for each indented line of MISTAKES
BLOCKS = (block.split("\n    ") for block in re.split(r"\n(?=\S)", MISTAKES.strip()))
CASES = [f"{command} {row}".rsplit("  ", 1) for command, *rows in BLOCKS for row in rows]


@pytest.fixture(scope="module")
def room(good, tmp_path_factory):
    """A folder with the files that MISTAKES names."""
    room = shutil.copytree(good, tmp_path_factory.mktemp("room") / "files")
    data, saved = room / "data", load(ckpt := room / "run/ckpt.pt")
    train = shutil.copytree(data, room / "flipped") / "train.bin"
    train.write_bytes(train.read_bytes()[::-1])  # of the same size
    change_json(shutil.copytree(data, room / "kindless") / "meta.json", kind=0)
    (shutil.copytree(room / "run", room / "bytes") / "log.jsonl").write_bytes(b"\xff\n")
    (room / "text.txt").write_text("some words\n" * 99)
    (room / "latin.txt").write_text("Bj\xf6rk", "latin1")
    shutil.copy(room / "records/x.json", room / "tasks.json")
    shutil.copy(room / "adapted/ckpt.pt", room / "lora.pt")
    save(room / "bare.pt", {**saved, "tokenizer": None})
    save(room / "alien.pt", {**saved, "tokenizer": b"{}"})
    save(room / "nan.pt", {**saved, "model": {name: torch.nan * x for name, x in saved["model"].items()}})
    latent = {"k_latent": [[1] * 4] * 2, "v_latent": [6, 6], "t_latent": [1, 0]}
    shapes = {"latent": latent, "novel": {"novel": True}, "five": {"n_head": 5, "head_dim": 6}}
    for name, shape in shapes.items():
        save(room / f"{name}.pt", checkpoint_of(sharp_model(**shape)))
    save(room / "odd.pt", {**saved, "train": {"dataset": 3}})
    again = {"train": {**saved["train"], "overwrite": True}}  # a guard must not take it from there
    for name, split in (("moved", "val"), ("moved_train", "train")):
        splits = {**saved["data"]["splits"], split: {"sha256": "0"}}
        save(room / name / "ckpt.pt", {**saved, **again, "data": {"splits": splits}})
    run("data/prepare.py", "x", "--text", room / "text.txt", "--vocab_size", 270, "--out", room / "other")
    run("data/prepare.py", "x", "--from", room / "tasks.json", "--tokenizer", ckpt, "--out", room / "tasks")
    mask = shutil.copytree(room / "tasks", room / "masked") / "train.mask"
    mask.write_bytes(mask.read_bytes()[::-1])
    return room


@pytest.mark.parametrize("line, word", CASES)
def test_a_mistake_is_one_line_that_names_it(line, word, room, monkeypatch):
    monkeypatch.chdir(room)
    before = {path: path.stat().st_mtime_ns for path in room.rglob("*")}
    refused(quick(*shlex.split(line.removeprefix("-m "))), word)
    assert {path: path.stat().st_mtime_ns for path in room.rglob("*")} == before


READERS = {"llama2c": "formats import {f}/model.bin {o} --tokenizer {f}/tok.bin"}
READERS["ours"] = "checkpoint.py show {f}/ckpt.pt"
DAMAGED_STATE = {  # each of these was once a traceback, or worse
    "train.lr": "x", "train.seed": -1, "train": [], "data": [], "data.splits": None, "step": "x",
    "tokens": None, "seconds": torch.nan, "optimizers": [], "optimizers.0": 3, "optimizers.0.state": {0: 3},
    "optimizers.0.state.0": {}, "optimizers.1.state.0.step": torch.zeros(2, 2), "log_size": -1,
    "optimizers.0.state.0.momentum_buffer": torch.zeros(()), "scaler": {"scale": "x"},
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return good_files(tmp_path_factory.mktemp("good"))


@pytest.fixture
def copied(good, tmp_path):
    """Copies a file with its folder; returns its path."""
    return lambda name: shutil.copytree((good / name).parent, (tmp_path / name).parent) / Path(name).name


def check_refused(path: Path, *words, data: bytes | None = None) -> None:
    """With these bytes, the model in a file's folder must be refused, within time and memory."""
    if data is not None:
        path.write_bytes(data)
    folder, line = path.parent, READERS.get(path.parent.name, "formats import {f} {o}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    what, done = attempt(line.format(f=folder, o=folder.with_name("out.pt")), size)
    assert what == "refused", (what, words)
    refused(done, *words)
    assert [file.name for file in folder.parent.iterdir()] == [folder.name], "something was written"


def test_absurd_settings(copied):
    path = copied("hf/config.json")
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    absurd = (0, -1, 10**40, 10**400, float("nan"), float("inf"), "1", [], {})
    cases = [(theirs, value) for theirs, *_ in FIELDS.values() for value in absurd]
    cases += [("rope_parameters", value) for value in (3, "x", [1], {"rope_type": []}, {"rope_theta": "x"})]
    cases += [("architectures", value) for value in (3, "x", [1], {"a": 1}, [None])]
    for name, value in cases:
        check_refused(path, path.parent, data=json.dumps({**config, name: value}).encode())


def test_headers_of_llama2c_that_lie(copied):
    path = copied("llama2c/model.bin")
    data = path.read_bytes()
    for place, value in product(range(0, 28, 4), (0, -1, 1, 2**31 - 1, -(2**31), 3, 2**20)):
        check_refused(path, "model.bin", data=data[:place] + struct.pack("<i", value) + data[place + 4 :])
    for other in (b"24ka" + struct.pack("<i", 1), b"PK"):  # a later version; a file of torch's
        check_refused(path, "--version 0", data=other + data)


def test_tensors_that_lie_and_missing_shards(copied):
    path = copied("hf/model.safetensors")
    tensors = safetensors.torch.load(path.read_bytes())
    for name, x in list(tensors.items())[:6]:
        wrong = [x[..., :-2].contiguous(), torch.full_like(x, torch.nan), torch.full_like(x, -torch.inf)]
        wrong += [x.to(kind) for kind in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)]
        others = {key: value for key, value in tensors.items() if key != name}
        for case in (others, {**tensors, "x": x.clone()}, *({**others, name: value} for value in wrong)):
            check_refused(path, path.parent, data=safetensors.torch.save(case))
    path.unlink()
    shard = path.with_name("model-00001-of-00002.safetensors")
    check_refused(shard, path.parent, data=safetensors.torch.save({name: tensors[name] for name in others}))


@pytest.mark.parametrize("file", ["meta/consolidated.00.pth", "ours/ckpt.pt"])
def test_pickles_neither_run_code_nor_fill_the_memory(file, copied):
    path = copied(file)
    whole = torch.load(path, weights_only=True)
    state = whole.get("model", whole)
    name, x = next(iter(state.items()))
    huge, shared = torch.zeros(1).expand(2**20, 2**20), torch.zeros(max(map(torch.numel, state.values())))
    wrong = [huge, Bomb(), "x", x.to_sparse(), x.to("meta"), x.to(torch.int32), x.flip(0).T.contiguous().T]
    states = [{**state, name: value} for value in wrong] + [{**state, "x": x}, dict.fromkeys(state, huge)]
    states += [{key: shared[: value.numel()].view(value.shape) for key, value in state.items()}]
    states = [{**whole, "model": state} if "model" in whole else state for state in states]
    for found in (*states, Bomb(), [], None, 3, {}, {3: 4}, torch.ones(3)):
        torch.save(found, path)
        check_refused(path)
    torch.save(Bomb(), path, _use_new_zipfile_serialization=False)
    check_refused(path, path)
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    for target in ("data/0", "data.pkl"):  # 64 MiB of zeros, in a thousandth of the space
        with zipfile.ZipFile(buffer) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in stored.namelist():
                packed.writestr(entry, stored.read(entry) + bytes(2**26 if entry.endswith(target) else 0))
        check_refused(path, path)


def test_inputs_damaged_at_random(good, tmp_path):
    found = trials(good, tmp_path, inputs=63, seed=1)
    assert not any(counts[fault] for counts in found.values() for fault in FAULTS), found
    assert sum(counts["refused"] for counts in found.values()) > 32


@pytest.mark.parametrize("place", DAMAGED_STATE)
def test_a_training_state_that_lies(place, tiny_run, tmp_path):
    checkpoint = part = load(tiny_run)
    *keys, last = (int(key) if key.isdigit() else key for key in place.split("."))
    for key in keys:
        part = part[key]
    part[last] = DAMAGED_STATE[place]
    save(tmp_path / "ckpt.pt", checkpoint)
    before = (tmp_path / "ckpt.pt").read_bytes()
    refused(quick("train.py", "--resume", "--out_dir", tmp_path, "--max_steps", 31, "--dtype", "float16"))
    assert (tmp_path / "ckpt.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_neither_locale_nor_hash_seed_nor_folder_change_a_run(tiny_data, tmp_path):
    strange = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONHASHSEED": "7"}
    run("train.py", *small_run(tiny_data, tmp_path / "a"), "--max_steps", 3)
    flags = [*small_run(tiny_data, tmp_path / "b"), "--max_steps", 3]
    done = command("train.py", *flags, cwd=tmp_path, env={**ONE_THREAD, **strange})
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "a/ckpt.pt") == content(tmp_path / "b/ckpt.pt")


@pytest.mark.parametrize("every", [1, 100])  # noticed before it is saved, or by the loss of the next step
def test_a_diverging_run_keeps_the_last_good_checkpoint(tiny_data, tmp_path, every):
    explode = ["--lr", 10, "--warmup_steps", 0, "--grad_clip", 0, "--max_steps", 50, "--eval_every", every]
    done = quick("train.py", *small_run(tiny_data, tmp_path), *explode)
    refused(done, "--lr", f"at step {min(every, 2)}:")
    saved = load(tmp_path / "ckpt.pt")
    for E in (saved["model"].pop(name) for name in ("tok_embeddings.weight", "output.weight")):
        assert E.norm(dim=1).max() < 1.001 * STREAM * E.shape[1] ** 0.5  # still as begin_embeddings made them
    assert saved["step"] == 0 and all(x.abs().max() < 2 for x in saved["model"].values())


def test_a_full_disk_keeps_the_checkpoint_written_before(tiny_run, tiny_data, tmp_path):
    out, most = shutil.copytree(tiny_run.parent, tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for how in (["--out_dir", out, "--resume"], [*small_run(tiny_data, out), "--overwrite"]):
        log = (out / "log.jsonl").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, most[1]))  # a log fits
        try:
            done = quick("train.py", *how, "--max_steps", 40)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
        refused(done, "cannot write", "ckpt.pt", "kept")
        assert (out / "ckpt.pt").read_bytes() == tiny_run.read_bytes() and not list(out.glob("*.tmp"))
    assert (out / "log.jsonl").read_bytes() == log
