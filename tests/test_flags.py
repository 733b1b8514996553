"""Flags that no other test compares with something else change what their command computes, and without them
the values that `--help` tells are used."""

import json
from pathlib import Path

import pytest
from conftest import records, run, small_run

from checkpoint import load

# a command, and a variant a line: all results differ, but with = it is the command's own
VARIANTS = """
sample.py {run} --num_samples 5
    --seed 1
    --temperature 0
    --prompt x
    --max_new_tokens 9
    --top_p 0.3
    = --temperature 0.8 --top_p 0.95
eval_ppl.py {run} --max_tokens 300 --method all --json
    --context 16
    --stride 4
    --method sliding
    --kv_bits 4
    = --context 32 --stride 16 --split val
gqa.py {run} --kv_budget 0.5 --calibration_tokens 1024 --eval_tokens 200
    --joint
    --grouping neighbour
    --refit none
    --refit output
    --seed 1
    --calibration_tokens 2048
    = --eval_tokens 100 --refit all --merge closed --grouping best
gqa.py {run} --kv_budget 0.5 --eval_tokens 200 --grouping random {mean}
    --seed 1
    --grouping best
search_groups.py {run} --kv_budget 0.5 --max_evals 2 --search_tokens 200 --calibration_tokens 512
    --method random
    = --refit all --merge closed --method knapsack --log {out}.log
search_groups.py {run} --kv_budget 0.5 --max_evals 3 --search_tokens 200 --method random {mean}
    --seed 1
train.py {new} --max_steps 3 --dtype float32 --warmup_steps 1
    --momentum 0.9
    --optimizer adamw --lr 0.01
    --dropout 0.1
    --dtype bfloat16
    --teacher {run}
    --teacher {run} --distil_weight 1
    --novel
    --gated
    --kv_bits 4
    --n_kv_head 2
    --head_dim 16
    --hidden_dim 64
    --no-tie_embeddings
    --rope_theta 100
    --norm_eps 0.1
    = --lr 0.01 --min_lr 0 --weight_decay 0.1 --grad_clip 1 --momentum 0.8
    = --checkpoint_activations --eval_every 1 --head_dim 8 --hidden_dim 96 --n_kv_head 4
train.py {new} --init_from {run} --max_steps 3 --dtype float32
    --lr 0.01
    --optimizer adamw
    --lora_r 4
    --lora_r 4 --lora_alpha 8
    --lora_r 4 --lora_dropout 0.5
    = --lr 0.001 --optimizer muon --lora_r 0
train.py {new} --init_from {run} --max_steps 3 --dtype float32 --lora_r 4
    --lr 0.001
    = --lr 0.005 --optimizer adamw --lora_alpha 16 --lora_dropout 0 --lora_targets wq wk wv wo
train.py {new} --max_steps 3 --dropout 0.2 --eval_every 1 --optimizer adamw
    --seed 1
    = --lr 0.002 --warmup_steps 10 --eval_tokens 0
    = --eval_every 2
"""
BLOCKS = [block.split("\t") for block in VARIANTS.strip().replace("\n    ", "\t").split("\n")]


def result(out: Path, line: str) -> object:
    """What a command has computed: no flag, name or time."""
    name, *flags = line.split()
    flags += [] if name in ("sample.py", "eval_ppl.py", "train.py") else ["--out", out]
    printed = run(name, *flags).stdout
    if name == "eval_ppl.py":
        return [json.loads(printed)[key] for key in ("blocks", "sliding", "block_mean")]
    if name == "search_groups.py":
        log = Path(json.loads(out.read_text())["search"]["log"])
        return [[record[key] for key in ("k_groups", "v_groups", "loss")] for record in records(log)[1:]]
    if name == "sample.py":
        return printed
    weights = load(out / "ckpt.pt" if name == "train.py" else out)["model"]
    sample = printed.partition("--- a sample")[2].partition("--- next")[0]
    return {name: (x.dtype, x.tolist()) for name, x in weights.items()}, sample


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0].split()[0])
def test_a_flag_does_something_and_its_default_is_what_it_says(block, tiny_run, tiny_data, tmp_path):
    base, *variants = block
    results, mean = {}, "--merge mean --refit none --calibration_tokens 512"  # which a mean does not read
    for number, variant in enumerate(["", *variants]):
        out = tmp_path / str(number)
        new = " ".join(map(str, small_run(tiny_data, out)))
        names = {"run": tiny_run, "out": out, "new": new, "mean": mean}
        line = f"{base} {variant.removeprefix('=')}".format(**names)
        results[variant] = result(out, line)
    for variant in [variant for variant in results if variant.startswith("=")]:
        assert results.pop(variant) == results[""], f"{base} {variant}"
    first: dict = {}
    for variant, found in results.items():
        assert first.setdefault(str(found), variant) == variant, f"{base} {variant} is as {first[str(found)]}"
