"""A user's mistake ends with exit code 2, one line that names what was wrong, and nothing written."""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import fields
from typing import get_type_hints

import pytest
from conftest import quick, refused, sharp_model
from foreign import checkpoint_of, save_folder, their_model

import common
from checkpoint import load, save
from lora import LoRAConfig, adapt

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
    --resume --overwrite                     --overwrite
    --fsdp                                   torchrun
    --lora_r 2                               --init_from
    --teacher run/ckpt.pt --block_size 48    --block_size
    --out_dir run                            --resume
    --out_dir /proc/none                     /proc/none
train.py --out_dir run --resume
    --n_layer 3                              --n_layer
    --out_dir new                            --resume
    --out_dir moved                          not the data
train.py --init_from run/ckpt.pt --max_steps 1 --out_dir new
    --dim 48                                 --dim
    --dataset other                          other has another tokenizer
    --quantize nf4                           --lora_r
    --lora_alpha 3                           --lora_r
    --lora_r 2 --lora_targets wq w9          --lora_targets w9
    --init_from lora.pt --lora_r 8           --lora_r
data/prepare.py --out new mine
    --tokenizer run/ckpt.pt                  --text
    --text latin.txt                         latin.txt
    --text text.txt --vocab_size 9           --vocab_size
    --text text.txt --tokenizer nosuch.pt    nosuch.pt
    --from torn.json                         torn.json
    --from tasks.json --fields a,b           --fields
    --parallel text.txt tasks.json           tasks.json
eval_ppl.py run/ckpt.pt
    --text nosuch.txt                        nosuch.txt
    --text latin.txt                         latin.txt
    --stride 100 --context 10                --stride
    --dataset tasks                          study score
sample.py
    run/ckpt.pt --prompt '\udcff'            UTF-8
    run/ckpt.pt --prompt x --instruction y   --instruction
    bare.pt                                  --tokenizer
checkpoint.py
    show hf                                  formats import hf
    merge lora.pt                            --out
    merge run/ckpt.pt --out new.pt           adapter
    merge lora.pt --out run/ckpt.pt          --overwrite
gqa.py run/ckpt.pt --out new.pt --calibration_tokens 1024
    --seed 1                                 --kv_budget
    --n_kv_head 5                            --n_kv_head
    --groups torn.json                       torn.json
    --groups tasks.json                      tasks.json
search_groups.py run/ckpt.pt --out new.json --calibration_tokens 1024
    --kv_budget 0.01                         --kv_budget
    --objective os.system('x')               --objective
    --kv_budget 0.5 --search_tokens 4        --search_tokens
    --kv_budget 0.5 --log torn.json          torn.json
-m formats
    import nosuch new.pt                     nosuch
    import hf new.pt --tokenizer text.txt    text.txt
    import text.txt new.pt --base bare.pt    text.txt
    export run/ckpt.pt hf                    hf exists
    export lora.pt new                       checkpoint.py merge
    export run/ckpt.pt new.pt --adapter      --lora_r
-m study
    score run/ckpt.pt --dataset data         eval_ppl.py
    plot loss data                           log.jsonl
    plot groups run/ckpt.pt --out new.jpg    --out
    attention                                --init_from
"""
MODULES = ["train", "eval_ppl", "sample", "gqa", "search_groups", "data.prepare", "formats.__main__"]


def cases():
    """(command line, what the error must name) for each indented line of MISTAKES."""
    for block in re.split(r"\n(?=\S)", MISTAKES.strip()):
        command, *rows = block.split("\n    ")
        for flags, word in (re.split("  +", row) for row in rows):
            yield f"{command} {flags}", word


@pytest.fixture(scope="module")
def room(tiny_data, tiny_run, tmp_path_factory):
    """A folder with the files that MISTAKES names."""
    room, saved, lora = tmp_path_factory.mktemp("room"), load(tiny_run), LoRAConfig(2)
    shutil.copytree(tiny_data, room / "data")
    train = shutil.copytree(tiny_data, room / "flipped") / "train.bin"
    train.write_bytes(train.read_bytes()[::-1])  # of the same size
    shutil.copytree(tiny_run.parent, room / "run")
    (room / "text.txt").write_text("some words\n" * 99)
    (room / "latin.txt").write_text("Bj\xf6rk", "latin1")
    (room / "torn.json").write_text("{")
    records = [{"instruction": f"Repeat {n}.", "output": f"{n}"} for n in range(40)]
    (room / "tasks.json").write_text(json.dumps(records))
    save(room / "bare.pt", {**saved, "tokenizer": None})
    save(room / "lora.pt", {**checkpoint_of(adapt(sharp_model(), lora)), "lora": vars(lora)})
    again = {"train": {**saved["train"], "overwrite": True}}  # a guard must not take it from there
    save(room / "moved/ckpt.pt", {**saved, **again, "data": {"splits": {"train": {"sha256": "0"}}}})
    save_folder(their_model(), room / "hf", "safetensors")
    other = ["--text", room / "text.txt", "--vocab_size", 270, "--out", room / "other"]
    tasks = ["--from", room / "tasks.json", "--tokenizer", tiny_run, "--out", room / "tasks"]
    assert not any(quick("data/prepare.py", "x", *flags).returncode for flags in (other, tasks))
    return room


@pytest.mark.parametrize("line, word", list(cases()))
def test_a_mistake_is_one_line_that_names_it(line, word, room, monkeypatch):
    monkeypatch.chdir(room)
    before = {path: path.stat().st_mtime_ns for path in room.rglob("*")}
    refused(quick(*shlex.split(line.removeprefix("-m "))), word)
    assert {path: path.stat().st_mtime_ns for path in room.rglob("*")} == before


@pytest.mark.parametrize("module", MODULES)
def test_every_flag_has_a_help_and_every_number_has_bounds(module):
    found = vars(importlib.import_module(module)).items()
    for cls in [value for name, value in found if name.endswith("Config")]:
        common.add_flags(common.Parser(), cls)  # which asserts that there is a help
        kinds = get_type_hints(cls).items()
        numbers = {name for name, kind in kinds if common.is_a(1, kind) or common.is_a(1.5, kind)}
        bounded = {field.name for field in fields(cls) if "bounds" in field.metadata}
        assert numbers - bounded <= {"kv_budget"}  # whose lower bound depends on the model
