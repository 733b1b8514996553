"""Every experiment of docs/results.md, from nothing to tables and figures; needs requirements-dev.txt.

    python -m study run                          # all of it, under three hours on 2 cores
    python -m study run --fast                   # ten minutes: tiny models and few steps, meaningless numbers
    python -m study run --parts depth groups     # some of it

The parts are depth (fewer, richer layers), groups (five ways of merging heads, before and after healing),
tuning (full, LoRA, QLoRA, memory savers), attention (backends and sliced products in a QLoRA run), speed
(beside transformers) and foreign (merging heads of two models that others have trained; downloads them).

OUT/logs keeps the command of each step with its output. Finished steps are skipped, and an interrupted run or
search continues. Tables go to OUT/tables.md, figures to OUT/figures.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import build, load
from common import UserError, compiler_missing, held, parse, replacing, sha256_of
from data.corpora import download
from study.report import report

ROOT = Path(__file__).resolve().parent.parent
# A step a line: its name, then arguments of python, or a function's name and its. Steps run in OUT, train.py
# writes into OUT/NAME. A name with [seed] is a step for each entry of LOOPS["seed"], [seed]: <seed>.
STEPS = {
    "depth": """
depth-[variant]-[seed]: train.py <variant> --seed [seed] --batch_size 8 <compile>
    --max_steps 240 --warmup_steps 16 --eval_every 40 --eval_tokens 16384
depth-[variant]-[seed]-test: eval_ppl.py depth-[variant]-[seed]/ckpt.pt <test>
depth-latency-[way]: -m study latency <way> --steps 30 --json --ckpts <models>
depth-[variant]-answers: train.py --init_from depth-[variant]-0/ckpt.pt <tune>
depth-[variant]-score: -m study score depth-[variant]-answers/ckpt.pt <score>
""",
    "groups": """
base: train.py --n_layer 6 --max_steps 500
before-base: eval_ppl.py base/ckpt.pt <test>
heal-base: train.py --init_from base/ckpt.pt <heal>
after-base: eval_ppl.py heal-base/ckpt.pt <test>
search-[share]: <search> --kv_budget <share> --refit output --out groups-[share].json --log search.jsonl
merge-[merge]-[share]: gqa.py base/ckpt.pt <merge> --calibration_tokens 65536 --eval_tokens 2048
    --out [merge]-[share].pt --overwrite
before-[merge]-[share]: eval_ppl.py [merge]-[share].pt <test>
heal-[merge]-[share]: train.py --init_from [merge]-[share].pt <heal>
after-[merge]-[share]: eval_ppl.py heal-[merge]-[share]/ckpt.pt <test>
objective-random: <search> --objective ppl*groups**2 --method random --joint --refit none --out random.json
objective-ours: <search> --objective ppl*groups**2 --refit output --out ours.json --log search.jsonl
figure-heads[page]: -m study plot groups <ours> --out figures/heads[page].png <page>
figure-similarity[page]: -m study plot similarity base/ckpt.pt --out figures/similarity[page].png <page>
figure-attention[page]: -m study plot attention base/ckpt.pt --out figures/attention[page].png <page>
figure-architecture[page]: -m study plot architecture ours-1of2.pt --out figures/architecture[page].png <page>
""",
    "tuning": """
base: train.py --n_layer 6 --max_steps 500
tuning-[tuning]-answers: train.py --init_from base/ckpt.pt <tuning> <tune>
tuning-[tuning]-score: -m study score tuning-[tuning]-answers/ckpt.pt <score>
tuning-before: -m study score base/ckpt.pt --dataset docstrings <score>
tuning-memory: -m study memory --steps 5 --json
""",
    "attention": """
base: train.py --n_layer 6 --max_steps 500
attention: -m study attention --init_from base/ckpt.pt --steps 5 --json
""",
    "speed": """
speed-parts: -m study train <small> --steps 5 --json
speed-decode: -m study decode --block_size 1024 --steps 20 --json
speed-peers: -m study compare-speed speed.jsonl <small> --rounds 3
""",
    "foreign": """
[foreign]-fetch: fetch [foreign]
[foreign]-import: -m formats import [foreign].bin [foreign].pt --tokenizer [foreign]-tok.bin --overwrite
[foreign]-write: write_texts [foreign].pt [foreign]-text 330000
[foreign]-prepare: data/prepare.py [foreign] --text [foreign]-text --tokenizer [foreign].pt
    --out [foreign]-data --overwrite
[foreign]-compare: -m study compare-groups [foreign].pt --dataset [foreign]-data
    --calibration_tokens 65536 --eval_tokens 16384 --seeds 1 --shares <foreign>
""",
}
FLAGS = {  # what several steps share; refits take most of a search's time, hence its few calibration tokens
    "<test>": "--split test --max_tokens 65536 --json",
    "<tune>": "--dataset docstrings --max_steps 100 --warmup_steps 10",
    "<score>": "--max_new_tokens 48 --json",
    "<heal>": "--teacher base/ckpt.pt --lora_r 8 --max_steps 20 --warmup_steps 4 --eval_tokens 0",
    "<search>": "search_groups.py base/ckpt.pt <size> --overwrite --calibration_tokens 32768",
    "<size>": "--max_evals 40 --search_tokens 16384",
    "<small>": "--n_layer 6 --dim 288 --n_head 6 --hidden_dim 768",
}
WIDE = "--lora_r 32 --lora_alpha 64 --lora_targets wq wk wv wo w1 w2 w3"
LOOPS = {
    # the wider one's SwiGLU has at least the parameters that novel adds
    "variant": {f"{n}": f"--n_layer {n}" for n in (5, 6, 7, 8)}
    | {f"{n}-novel": f"--n_layer {n} --novel" for n in (5, 6, 7, 8)}
    | {"6-wide": "--n_layer 6 --hidden_dim 706", "6-gated": "--n_layer 6 --gated"},
    "seed": {"0": "", "1": ""},
    "way": {"eager": "", "compiled": "--compile"},
    "merge": {
        "random-mean": "--kv_budget <share> --joint --grouping random --merge mean --refit none",
        "neighbour-mean": "--kv_budget <share> --joint --grouping neighbour --merge mean --refit none",
        "best-mean": "--kv_budget <share> --joint --merge mean --refit none",
        "neighbour-closed": "--kv_budget <share> --joint --grouping neighbour --refit none",
        "ours": "--groups groups-[share].json",
    },
    "share": {"3of4": "0.75", "2of3": f"{2 / 3}", "1of2": "0.5", "1of3": f"{1 / 3}", "1of4": "0.25"},
    "tuning": {
        "full": "--optimizer adamw", "lora8": "--lora_r 8", "qlora8": "--lora_r 8 --quantize nf4",
        "lora32": WIDE, "qlora32": f"{WIDE} --quantize nf4",
    },
    # shares of its cache that joint groups can keep
    "foreign": {"stories260K": "0.75 0.65 0.5 0.3 0.25", "aidreams260K": "0.75 0.625 0.5 0.3125 0.25"},
    "page": {"": "", "-dark": "--dark"},
}  # fmt: skip
TINY = "--dim 64 --n_head 4 --block_size 128"
FAST = {  # what --fast replaces
    "--max_steps 500": f"{TINY} --max_steps 60", "--hidden_dim 706": "--hidden_dim 194",
    "--max_steps 240 --warmup_steps 16": f"{TINY} --max_steps 20 --warmup_steps 1",
    "--max_steps 100 --warmup_steps 10": "--max_steps 10 --warmup_steps 1", "330000": "40000",
    "--max_steps 20 --warmup_steps 4": "--max_steps 5 --warmup_steps 1", "48 --json": "48 --limit 8 --json",
    "--dim 288 --n_head 6 --hidden_dim 768": TINY, "study memory": f"study memory {TINY}",
    "65536": "8192", "16384": "4096", "32768": "4096", "--block_size 1024": "--block_size 256",
    "_every 40": "_every 3", "_evals 40": "_evals 14", "rounds 3": "rounds 1", "steps 30": "steps 3",
    "--steps 5": "--steps 1", "0.75 0.65 0.5 0.3 0.25": "0.75", "0.75 0.625 0.5 0.3125 0.25": "0.75",
}  # fmt: skip
FAST_LOOPS = {"variant": "6", "seed": "0", "share": "1of2"}  # how the keys begin that it keeps
DREAMS = "https://raw.githubusercontent.com/mc9625/ai-dreamer-esp32-s3_matrix/a6a5545a4227"
DREAMS += "7ebf0eea9584a44a765891f2f492/data"
STORIES = "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K"
SITES = {"stories260K": STORIES, "aidreams260K": DREAMS}
SHA256 = {
    "stories260K.bin": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
    "stories260K-tok.bin": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
    "aidreams260K.bin": "aa722d252ace805c9ff2264dce993df6843c8cec3d1a930d03e4c487f3db9028",
    "aidreams260K-tok.bin": "3817c307fffc9637c908ca3430a028db0c46b5700392e0d19b2133d246f54bcb",
}


@dataclass
class StudyConfig:
    """study"""

    out: str = "out/study"  # the folder of everything that it makes
    parts: list[str] | None = None  # any of depth groups tuning attention speed foreign (default: all)
    models: str | None = None  # a folder with stories260K.bin, stories260K-tok.bin, ... (default: download)
    fast: bool = False  # tiny models and few steps, to check that everything works; into OUT-fast


def fetch(name: str, models: Path | None) -> None:
    """Copy or download a foreign model and its tokenizer. Raises UserError if they cannot be had."""
    for file, theirs in ((f"{name}.bin", f"{name}.bin"), (f"{name}-tok.bin", "tok512.bin")):
        url = f"{SITES[name]}/{theirs}"
        source = models / file if models else download(url, SHA256[file], Path(name))
        if not source.exists() or sha256_of(source) != SHA256[file]:
            raise UserError(f"{source} is missing, or not the file of {url}")
        Path(file).write_bytes(source.read_bytes())


@torch.no_grad()
def write_texts(ckpt: str, folder: str, tokens: str) -> None:
    """Let a model, whose training text may be unknown, write at temperature 1; each text is a file."""
    model, tokenizer = build(load(ckpt))
    Path(folder).mkdir(exist_ok=True)
    how = {"temperature": 1.0, "stop": tokenizer.stop, "generator": torch.Generator().manual_seed(0)}
    written = 0
    while written < int(tokens):
        for ids in model.generate([tokenizer.prompt("")] * 64, model.config.block_size, **how):
            Path(folder, f"{written:08}.txt").write_text(tokenizer.decode(ids).strip())
            written += len(ids) + 1


def steps(parts: list[str], fast: bool) -> dict[str, str]:
    """{name: command} of some parts."""
    loops, replaced = dict(LOOPS), {**FLAGS, "<compile>": "--compile"}
    if fast or sys.platform != "linux" or compiler_missing(torch.device("cpu")):
        replaced["<compile>"], loops["way"] = "--no-compile", {"eager": ""}
    if fast:
        replaced |= FAST
        for loop, begin in FAST_LOOPS.items():
            loops[loop] = {key: flags for key, flags in LOOPS[loop].items() if key.startswith(begin)}
    replaced["<models>"] = " ".join(f"depth-{variant}-0/ckpt.pt" for variant in loops["variant"])
    replaced["<ours>"] = " ".join(f"ours-{share}.pt" for share in loops["share"])
    lines = "".join(STEPS[part] for part in parts).replace("\n    ", " ").split("\n")
    for loop, entries in loops.items():
        expanded = []
        for line in lines:
            for key, flags in entries.items() if f"[{loop}]" in line else [("", "")]:
                expanded.append(line.replace(f"[{loop}]", key).replace(f"<{loop}>", flags))
        lines = expanded
    text = "\n".join(lines)
    for old, new in replaced.items():
        text = text.replace(old, new)
    return dict(" ".join(line.split()).split(": ", 1) for line in text.split("\n") if line)


def run(name: str, line: str, models: Path | None = None) -> None:
    """Run a step unless its log is there; the log is written when all went well."""
    log, words, printed = Path("logs", f"{name}.txt"), line.split(), ""
    if log.exists():
        if log.read_text().splitlines()[0] != line:
            raise UserError(f"{log} is of another command: give another --out, or delete what it made")
        return
    if words[0] == "fetch":
        fetch(words[1], models)
    elif words[0] == "write_texts":
        write_texts(*words[1:])
    else:
        if words[0] == "train.py":
            words += ["--out_dir", name] + ["--resume"] * Path(name, "ckpt.pt").exists()
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        path = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=path)
        if done.returncode:
            error = (done.stderr.strip() or "it failed").splitlines()[-1]
            raise UserError(f"step {name}: {error} | in {Path.cwd()}: python {' '.join(words)}")
        printed = done.stdout
    with replacing(log, "w") as file:
        file.write(f"{line}\n{printed}")


def main() -> None:
    config = StudyConfig(**parse(__doc__, StudyConfig))
    out, models = Path(config.out + "-fast" * config.fast), config.models and Path(config.models).resolve()
    if unknown := set(config.parts or STEPS) - set(STEPS):
        raise UserError(f"--parts {min(unknown)} is none of the parts: {' '.join(STEPS)}")
    todo = steps([part for part in STEPS if part in (config.parts or STEPS)], config.fast)
    with held(out):
        os.chdir(out)
        try:
            for name, line in tqdm(todo.items(), desc="study", unit="step"):
                tqdm.write(name)
                run(name, line, models)
        finally:
            report(Path())
    print(f"wrote {out}/tables.md and {out}/figures")
