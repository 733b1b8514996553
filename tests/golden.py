"""Record what the commands compute, bit for bit, or compare it with an earlier record.

    python tests/golden.py --write golden.json      # before a change to the code
    python tests/golden.py --compare golden.json    # after it; exit code 1 if anything differs

The commands run as a user would run them, on tiny models, with one thread on the CPU. A record holds for one
machine and one version of PyTorch: digests of what `content` finds in the files, and of what was printed.
"""

import json
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from conftest import ONE_THREAD, ROOT, command, content
from corpus import write_corpus
from foreign import save_folder, their_model

KEPT = (".pt", ".bin", ".mask", ".model", ".safetensors", "log.jsonl", "groups.json")

# of a flag that is given twice, the last value counts
TUNE = "train.py --dataset {data} --out_dir {out} --batch_size 4 --max_steps 30 --warmup_steps 5 --device cpu"
TUNE += " --dtype float32 --eval_tokens 0"
TRAIN = TUNE + " --n_layer 2 --n_head 4 --dim 32 --block_size 32"
TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2 {root}/"
GROUP = "gqa.py {plain} --out {out}.pt --calibration_tokens 2048 --eval_tokens 512 --device cpu"
EVAL = " --method all --json --max_tokens 2000 --device cpu"
SEARCH = "search_groups.py {plain} --out {out}/groups.json --search_tokens 1024 --device cpu"
SEARCH += " --calibration_tokens 2048"
GREEDY = " --temperature 0 --max_new_tokens 28 --device cpu"

# {out} is where the command writes, {part} what a part above wrote: of a run, its checkpoint
PARTS = {
    "data": "data/prepare.py golden --text {inputs}/corpus --vocab_size 400 --out {out}",
    "plain": TRAIN + " --batch_size 8 --max_steps 400 --eval_tokens 1024 --eval_every 200",
    "novel": TRAIN + " --novel",
    "gated": TRAIN + " --gated --n_kv_head 2 --no-tie_embeddings",
    "adamw": TRAIN + " --optimizer adamw",
    "bfloat16": TRAIN + " --dtype bfloat16",
    "accumulation": TRAIN + " --batch_size 2 --grad_accum 3",
    "activation_checkpoints": TRAIN + " --checkpoint_activations --dropout 0.1",
    "ddp": TORCHRUN + TRAIN,
    "fsdp": TORCHRUN + TRAIN + " --fsdp",
    "uneven": GROUP + " --groups {inputs}/groups.json --refit none",
    "uneven_trained": TUNE + " --init_from {uneven}",
    "distillation": TUNE + " --init_from {uneven} --teacher {plain}",
    "lora": TUNE + " --init_from {plain} --lora_r 4 --lora_dropout 0.1",
    "qlora": TUNE + " --init_from {plain} --lora_r 4 --quantize nf4 --lora_targets wq wv w1 w2",
    "lora_merged": "checkpoint.py merge {lora} --out {out}.pt",
    "lora_to_peft": "formats export {lora} {out} --adapter",
    "lora_from_peft": "formats import {lora_to_peft} {out}.pt --base {plain}",
    "to_hugging_face": "formats export {plain} {out}",
    "from_hugging_face": "formats import {inputs}/llama {out}.pt",
    "perplexity": "eval_ppl.py {plain}" + EVAL,
    "perplexity_bfloat16": "eval_ppl.py {uneven} --dtype bfloat16" + EVAL,
    "text_cached": "sample.py {uneven_trained} --prompt def" + GREEDY,
    "text_drawn": "sample.py {plain} --num_samples 2 --seed 3 --device cpu",
    "merge_closed": GROUP + " --kv_budget 0.5 --refit none",
    "merge_mean": GROUP + " --n_kv_head 2 --merge mean --grouping neighbour --refit none",
    "refit_output": GROUP + " --kv_budget 0.5 --refit output",
    "refit_all": GROUP + " --groups {inputs}/groups.json --refit all",
    "search": SEARCH + " --kv_budget 0.5 --max_evals 8",
    "random_search": SEARCH + " --groups_power 2 --max_evals 6 --method random --joint",
    "task_data": "data/prepare.py tasks --from {inputs}/tasks.json --tokenizer {plain} --out {out}",
    "task_tuning": TUNE + " --init_from {plain} --dataset {task_data} --lora_r 4 --block_size 96",
}


def write_inputs(folder: Path) -> None:
    """A corpus, a group file, instruction data, and a tiny model of the transformers library."""
    write_corpus(folder / "corpus")
    groups = {"k_groups": [[0, 1, 1, 2], [0, 0, 0, 1]], "v_groups": [[0, 0, 1, 0], [0, 1, 2, 3]]}
    (folder / "groups.json").write_text(json.dumps(groups))
    tasks = [{"instruction": "Double it.", "input": f"{i}", "output": f"It is {2 * i}."} for i in range(200)]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    save_folder(their_model(num_key_value_heads=2), folder / "llama")


def run_part(name: str, paths: dict[str, Path]) -> dict[str, str]:
    """Run a part, note the path that other parts use, and return its digests."""
    folder = paths["inputs"].with_name(name)
    words = [word.replace("{out}", f"{folder}/out").format_map(paths) for word in PARTS[name].split()]
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = command(*words, cwd=folder.parent, env=env, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-1500:]}"
    outs = (folder / "out/ckpt.pt", folder / "out.pt", folder / "out")
    paths[name] = next((path for path in outs if path.exists()), folder)
    files = [path for path in sorted(folder.rglob("*")) if path.name.endswith(KEPT)]
    found = {path.name: content(path) for path in files} or {"printed": done.stdout}
    if (log := folder / "out/groups.jsonl").exists():
        found["evaluations"] = log.read_text().splitlines()[1:]  # behind a line that describes the search
    return {f"{name}: {what}": sha256(repr(value).encode()).hexdigest() for what, value in found.items()}


def main() -> None:
    (action, record), after = sys.argv[1:], {}
    with tempfile.TemporaryDirectory(prefix="golden ") as folder:
        paths = {"inputs": Path(folder, "inputs"), "root": ROOT}
        write_inputs(paths["inputs"])
        for name in PARTS:
            after |= run_part(name, paths)
    if action == "--write":
        Path(record).write_text(json.dumps(after, indent=1) + "\n")
        return
    before = json.loads(Path(record).read_text())
    for name in before | after:
        print(f"{'equal     ' if before.get(name) == after.get(name) else 'DIFFERENT '} {name}")
    sys.exit(before != after)


if __name__ == "__main__":
    main()
