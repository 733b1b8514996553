"""Record what the commands compute, bit for bit, or compare it with an earlier record.

    python tests/golden.py --write golden.json                     # before a change to the code
    python tests/golden.py --compare golden.json                   # after it; exit code 1 if a value differs

The commands run as a user would run them, on tiny models, with one thread on the CPU. A record holds for one
machine and one version of PyTorch. Weights are recorded as the SHA-256 of their names, dtypes, shapes and
bytes, floats as float.hex().
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from corpus import write_corpus
from safetensors.torch import load_file

Values = dict[str, str]  # what a reader finds in the path that a command wrote and in what it printed


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        total.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        total.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def checkpoint(out: Path, printed: str) -> Values:
    """The weights, and the 4-bit codes and scales once more on their own."""
    tensors = torch.load(out, weights_only=True, map_location="cpu")["model"]
    packed = {name: x for name, x in tensors.items() if x.dtype == torch.uint8}
    return {"weights": digest(tensors)} | ({"4-bit codes": digest(packed)} if packed else {})


def run(out: Path, printed: str) -> Values:
    """The training losses at some steps, the last validation loss if there is one, and the weights."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    loss = {record["step"]: record["loss"] for record in records if "loss" in record}
    values = {f"loss at step {step}": loss[step].hex() for step in (1, 10, 30)}
    if "val_loss" in records[-1]:
        values["validation loss"] = records[-1]["val_loss"].hex()
    return values | checkpoint(out / "ckpt.pt", printed)


def safetensors(out: Path, printed: str) -> Values:
    files = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    return {"tensors": digest({name: x for file in files for name, x in file.items()})}


def tokens(out: Path, printed: str) -> Values:
    files = [path for path in sorted(out.iterdir()) if path.suffix in (".model", ".bin", ".mask")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def text(out: Path, printed: str) -> Values:
    return {"text": printed}


def perplexity(out: Path, printed: str) -> Values:
    record = json.loads(printed)
    return {name: record[name].hex() for name in ("blocks", "sliding", "block_mean", "bits_per_byte")}


def search(out: Path, printed: str) -> Values:
    """Each grouping that was evaluated, and the one that was chosen."""
    values = {}
    for number, line in enumerate(out.with_suffix(".jsonl").read_text().splitlines()):
        record = json.loads(line)
        if "loss" in record:  # the first line describes the search
            measured = f"loss {record['loss'].hex()} kl {record['kl'].hex()}"
            values[f"evaluation {number}"] = f"{measured} {record['k_groups']} {record['v_groups']}"
    chosen = json.loads(out.read_text())
    return values | {"chosen": f"{chosen['k_groups']} {chosen['v_groups']}"}


def write_inputs(folder: Path) -> None:
    """A corpus, a group file, instruction data, and a tiny model of the transformers library."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_corpus(folder / "corpus")
    groups = {"k_groups": [[0, 1, 1, 2], [0, 0, 0, 1]], "v_groups": [[0, 0, 1, 0], [0, 1, 2, 3]]}
    (folder / "groups.json").write_text(json.dumps(groups))
    tasks = [{"instruction": "Double it.", "input": f"{i}", "output": f"It is {2 * i}."} for i in range(200)]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llama")


# of a flag that is given twice, the last value counts
TUNE = "train.py --dataset {data} --out_dir {out} --batch_size 4 --max_steps 30 --warmup_steps 5 --device cpu"
TUNE += " --dtype float32 --eval_tokens 0"
TRAIN = TUNE + " --n_layer 2 --n_head 4 --dim 32 --block_size 32"
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2 "
GROUP = "gqa.py {plain} --out {out} --calibration_tokens 2048 --eval_tokens 512 --device cpu"
EVAL = " --method all --json --max_tokens 2000 --device cpu"
SEARCH = "search_groups.py {plain} --out {out} --calibration_tokens 2048 --search_tokens 1024 --device cpu"
STORIES = "-m formats import {shared}/stories260K.bin {out} --tokenizer {shared}/tok512.bin"
GREEDY = " --temperature 0 --max_new_tokens 28 --device cpu"

# {part: (reader, command)}. {out} is where the command writes, {part} what a part above wrote: of a run, its
# checkpoint.
PARTS = {
    "data": (tokens, "data/prepare.py golden --text {inputs}/corpus --vocab_size 400 --out {out}"),
    "plain": (run, TRAIN + " --batch_size 8 --max_steps 400 --eval_tokens 1024 --eval_every 200"),
    "novel": (run, TRAIN + " --novel"),
    "gated": (run, TRAIN + " --gated --n_kv_head 2 --no-tie_embeddings"),
    "adamw": (run, TRAIN + " --optimizer adamw"),
    "bfloat16": (run, TRAIN + " --dtype bfloat16"),
    "accumulation": (run, TRAIN + " --batch_size 2 --grad_accum 3"),
    "activation_checkpoints": (run, TRAIN + " --checkpoint_activations --dropout 0.1"),
    "ddp": (run, TORCHRUN + TRAIN),
    "fsdp": (run, TORCHRUN + TRAIN + " --fsdp"),
    "uneven": (checkpoint, GROUP + " --groups {inputs}/groups.json --refit none"),
    "uneven_trained": (run, TUNE + " --init_from {uneven}"),
    "distillation": (run, TUNE + " --init_from {uneven} --teacher {plain}"),
    "lora": (run, TUNE + " --init_from {plain} --lora_r 4 --lora_dropout 0.1"),
    "qlora": (run, TUNE + " --init_from {plain} --lora_r 4 --quantize nf4 --lora_targets wq wv w1 w2"),
    "lora_merged": (checkpoint, "checkpoint.py merge {lora} --out {out}"),
    "lora_to_peft": (safetensors, "-m formats export {lora} {out} --adapter"),
    "lora_from_peft": (checkpoint, "-m formats import {lora_to_peft} {out} --base {plain}"),
    "to_hugging_face": (safetensors, "-m formats export {plain} {out}"),
    "from_hugging_face": (checkpoint, "-m formats import {inputs}/llama {out}"),
    "stories": (checkpoint, STORIES),
    "stories_text": (text, "sample.py {stories} --prompt Once" + GREEDY),
    "perplexity": (perplexity, "eval_ppl.py {plain}" + EVAL),
    "perplexity_bfloat16": (perplexity, "eval_ppl.py {uneven} --dtype bfloat16" + EVAL),
    "text_cached": (text, "sample.py {uneven_trained} --prompt def" + GREEDY),
    "text_drawn": (text, "sample.py {plain} --num_samples 2 --seed 3 --device cpu"),
    "merge_closed": (checkpoint, GROUP + " --kv_budget 0.5 --refit none"),
    "merge_mean": (checkpoint, GROUP + " --n_kv_head 2 --merge mean --grouping neighbour --refit none"),
    "refit_output": (checkpoint, GROUP + " --kv_budget 0.5 --refit output"),
    "refit_all": (checkpoint, GROUP + " --groups {inputs}/groups.json --refit all"),
    "search": (search, SEARCH + " --kv_budget 0.5 --max_evals 8"),
    "random_search": (search, SEARCH + " --groups_power 2 --max_evals 6 --method random --joint"),
    "task_data": (tokens, "data/prepare.py tasks --from {inputs}/tasks.json --tokenizer {plain} --out {out}"),
    "task_tuning": (run, TUNE + " --init_from {plain} --dataset {task_data} --lora_r 4 --block_size 96"),
}


def run_part(name: str, root: Path, paths: dict[str, Path]) -> Values:
    """Run a part, note the path that other parts use, and read the values."""
    read, command = PARTS[name]
    out = paths["inputs"].with_name(name + {checkpoint: ".pt", search: ".json"}.get(read, ""))
    words = [word.replace("{out}", str(out)).format_map(paths) for word in command.split()]
    words = [str(root / word) if word.endswith(".py") else word for word in words]
    settings = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    how = {"cwd": out.parent, "env": {**os.environ, **settings, "PYTHONDONTWRITEBYTECODE": "1"}}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, **how)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-1500:]}")
    paths[name] = out / "ckpt.pt" if read is run else out
    return {f"{name}: {what}": value for what, value in read(out, done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, help="the JSON file to write")
    action.add_argument("--compare", type=Path, help="the JSON file to compare with")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the project")
    parser.add_argument("--shared", type=Path, help="folder with stories260K.bin and tok512.bin to import")
    parser.add_argument("--only", default="", help="run only parts with this in their name")
    args = parser.parse_args()
    wanted = {name for name in PARTS if args.only in name and (args.shared or "stories" not in name)}
    needed, after, failed = set(wanted), {}, False
    for name in reversed(PARTS):
        needed |= set(re.findall(r"{(\w+)}", PARTS[name][1])) if name in needed else set()
    with tempfile.TemporaryDirectory(prefix="golden ") as folder:
        paths = {"inputs": Path(folder, "inputs"), "shared": args.shared and args.shared.resolve()}
        write_inputs(paths["inputs"])
        for name in (name for name in PARTS if name in needed):
            try:
                after |= run_part(name, args.root.resolve(), paths)
            except Exception as error:  # the other parts may still run
                failed = True
                print(f"FAILED     {name}: {error!r}", flush=True)
    if args.write:
        args.write.write_text(json.dumps(after, indent=1, ensure_ascii=False) + "\n")
        sys.exit(failed)
    before = json.loads(args.compare.read_text())
    for name in (name for name in before | after if name.split(":")[0] in wanted):
        old, new = before.get(name, "missing"), after.get(name, "missing")
        failed |= old != new
        print(f"equal      {name}" if old == new else f"DIFFERENT  {name}\n    old {old}\n    new {new}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
