"""The study: every experiment of the README, from nothing to tables and figures (pip install -r requirements-dev.txt).

    python study.py                          # all of it, under three hours on 2 cores
    python study.py --fast                   # ten minutes: tiny models, few steps; its numbers say nothing
    python study.py --parts depth groups     # some of it

    depth      fewer, richer layers: 5 to 8 of them, plain and novel, and two controls
    groups     perplexity against the KV cache's bytes: five ways of merging, before and after healing
    foreign    merging in two models that others have trained
    tuning     full, LoRA and QLoRA, and what each memory saver saves
    attention  the attention and pretraining_tp in a QLoRA run
    speed      training, evaluation, generation, beside transformers

A step is a command of this project. What it printed is kept in OUT/logs, below the command, and a second call skips
what is done and goes on within a run or a search that was interrupted. The tables are then OUT/tables.md, the figures
OUT/figures.
"""

import importlib.util
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import build, load
from config import UserError, exit_cleanly, parse
from device import compiles_by_itself
from download import download
from files import held, replacing, sha256_of
from model import ModelConfig
from study_report import report

HERE = Path(__file__).resolve().parent
SHARES = {"3of4": 3 / 4, "2of3": 2 / 3, "1of2": 1 / 2, "1of3": 1 / 3, "1of4": 1 / 4}  # of the KV cache
MERGES = {  # way of merging: the flags of gqa.py, {} the share
    "random-mean": "--kv_budget {} --joint --grouping random --merge mean --refit none",
    "neighbour-mean": "--kv_budget {} --joint --grouping neighbour --merge mean --refit none",
    "best-mean": "--kv_budget {} --joint --merge mean --refit none",
    "neighbour-closed": "--kv_budget {} --joint --grouping neighbour --refit none",
    "ours": "--groups {}",
}
TUNINGS = {
    "full": "--optimizer adamw",
    "lora8": "--lora_r 8",
    "qlora8": "--lora_r 8 --quantize nf4",
    "lora32": "--lora_r 32 --lora_alpha 64 --lora_targets wq wk wv wo w1 w2 w3",
    "qlora32": "--lora_r 32 --lora_alpha 64 --lora_targets wq wk wv wo w1 w2 w3 --quantize nf4",
}
HUB = "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K/"
DREAMS = "https://raw.githubusercontent.com/mc9625/ai-dreamer-esp32-s3_matrix/a6a5545a42277ebf0eea9584a44a765891f2f492/"
FOREIGN = {  # name: address, sha256 of the model; of its tokenizer; the shares of its cache that one map can keep
    "stories260K": (
        (HUB + "stories260K.bin", "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696"),
        (HUB + "tok512.bin", "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312"),
        "0.75 0.65 0.5 0.3 0.25",
    ),
    "aidreams260K": (
        (DREAMS + "data/aidreams260K.bin", "aa722d252ace805c9ff2264dce993df6843c8cec3d1a930d03e4c487f3db9028"),
        (DREAMS + "data/tok512.bin", "3817c307fffc9637c908ca3430a028db0c46b5700392e0d19b2133d246f54bcb"),
        "0.75 0.625 0.5 0.3125 0.25",
    ),
}  # fmt: skip
SMALL = "--n_layer 6 --dim 288 --n_head 6 --hidden_dim 768"  # the shape of the speed tables
LIBRARIES = ("matplotlib", "sacrebleu", "rouge_score", "transformers")
Steps = dict[str, "str | Callable[[], None]"]  # {name: command, or what to call}


@dataclass
class StudyConfig:
    """study"""

    out: str = "out/study"  # the folder of all that it makes
    parts: list[str] | None = None  # which of depth groups foreign tuning attention speed (default: all)
    models: str | None = None  # a folder with stories260K.bin, stories260K-tok.bin, aidreams... (default: downloaded)
    fast: bool = False  # tiny models and few steps, to see that all works; into OUT-fast

    def __post_init__(self):
        if unknown := set(self.parts or PARTS) - set(PARTS):
            raise UserError(f"--parts {min(unknown)} is none of the parts: {' '.join(PARTS)}")
        if len(self.out.split()) != 1:
            raise UserError(f"--out {self.out!r} would be cut at its spaces: give a name without")
        self.out = self.out.rstrip("/") + "-fast" * self.fast


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    shape: dict[str, int] = field(default_factory=dict)  # fields of the models
    layers: tuple = (5, 6, 7, 8)
    seeds: tuple = (0, 1)
    depth_steps: int = 240  # of 8 sequences
    base_steps: int = 500  # of 16 sequences
    shares: tuple = tuple(SHARES)
    evals: int = 40  # of a search
    calibration: int = 65536  # tokens
    heal_steps: int = 20
    tune_steps: int = 100
    scored: int = 65536  # tokens of the test split
    answers: str = ""  # flags that leave some out
    written: int = 330_000  # tokens by each foreign model
    rounds: int = 3  # of the speed table
    timed: int = 30  # texts of each model
    compiled: bool = True  # where this machine's torch does
    bench_steps: int = 5  # --steps of bench.py
    decoded: int = 1024  # tokens in the cache

    @property
    def flags(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in self.shape.items())


FAST = Size(
    shape={"dim": 64, "n_head": 4, "block_size": 128}, layers=(6,), seeds=(0,), depth_steps=20, base_steps=60,
    shares=("1of2",), evals=14, calibration=8192, heal_steps=5, tune_steps=10, scored=4096, answers="--limit 8",
    written=40_000, rounds=1, timed=3, compiled=False, bench_steps=1, decoded=256,
)  # fmt: skip


# ---- the steps ----


def depth(s: Size, out: Path) -> Steps:
    steps: Steps = {}
    compiling = s.compiled and compiles_by_itself(torch.device("cpu"))
    how = "--compile" if compiling else "--no-compile"
    how += f" --warmup_steps {s.depth_steps // 15} --eval_every {s.depth_steps // 6} --eval_tokens 16384"
    kinds = {"": "", "-novel": " --novel"}
    variants = {f"{n}{kind}": f"--n_layer {n}{flag}" for n in s.layers for kind, flag in kinds.items()}
    c = ModelConfig(**s.shape)
    more = math.ceil((c.head_dim**2 + c.head_dim) / (3 * c.dim))  # at least as many parameters as novel adds
    variants |= {"6-wide": f"--n_layer 6 --hidden_dim {c.hidden_dim + more}", "6-gated": "--n_layer 6 --gated"}
    for seed in s.seeds:
        for variant, flags in variants.items():
            name = f"depth-{variant}-{seed}"
            train = f"train.py {flags} {s.flags} --seed {seed} --batch_size 8 --max_steps {s.depth_steps} {how}"
            steps[name] = f"{train} --out_dir {out}/{name}"
            steps[f"{name}-test"] = f"eval_ppl.py {out}/{name}/ckpt.pt --split test --max_tokens {s.scored} --json"
    models = [f"{out}/depth-{variant}-{s.seeds[0]}/ckpt.pt" for variant in variants]
    for way in ("eager", "compiled") if compiling else ("eager",):
        wait = f"bench.py latency --steps {s.timed} --json" + " --compile" * (way == "compiled")
        steps[f"depth-latency-{way}"] = f"{wait} --ckpts {' '.join(models)}"
    for variant, model in zip(variants, models):
        steps |= answering(f"depth-{variant}", model, "", s, out)
    return steps


def answering(name: str, model: str, flags: str, s: Size, out: Path) -> Steps:
    """Tune on what functions do, then answer."""
    run = f"{out}/{name}-answers"
    tune = f"train.py --init_from {model} --dataset docstrings {flags} --max_steps {s.tune_steps} --out_dir {run}"
    score = f"eval_text.py {run}/ckpt.pt {s.answers} --max_new_tokens 48 --json"
    return {f"{name}-tune": f"{tune} --warmup_steps {s.tune_steps // 10}", f"{name}-score": score}


def base(s: Size, out: Path) -> Steps:
    """The trained model that most parts begin with: the default one, plain."""
    return {"base": f"train.py --n_layer 6 {s.flags} --max_steps {s.base_steps} --out_dir {out}/base"}


def groups(s: Size, out: Path) -> Steps:
    steps, model, few = base(s, out), f"{out}/base/ckpt.pt", f"--calibration_tokens {s.calibration}"
    score = f"--split test --max_tokens {s.scored} --json"
    look = f"search_groups.py {model} --max_evals {s.evals} --search_tokens {min(16384, s.scored)} --overwrite"
    look += f" --calibration_tokens {s.calibration // 2}"  # for its refits are most of the time of a search
    heal = f"--teacher {model} --lora_r 8 --max_steps {s.heal_steps} --warmup_steps {s.heal_steps // 5} --eval_tokens 0"
    steps["before-base"] = f"eval_ppl.py {model} {score}"
    steps["heal-base"] = f"train.py --init_from {model} {heal} --out_dir {out}/heal-base"
    steps["after-base"] = f"eval_ppl.py {out}/heal-base/ckpt.pt {score}"
    for share in s.shares:
        found = f"--out {out}/groups-{share}.json --log {out}/search.jsonl"
        steps[f"search-{share}"] = f"{look} --kv_budget {SHARES[share]} --refit output {found}"
        for merge, flags in MERGES.items():
            name, which = f"{merge}-{share}", f"{out}/groups-{share}.json" if merge == "ours" else SHARES[share]
            grouped = f"{out}/{name}.pt"
            how = f"{flags.format(which)} {few} --eval_tokens 2048"
            steps[f"merge-{name}"] = f"gqa.py {model} {how} --out {grouped} --overwrite"
            steps[f"before-{name}"] = f"eval_ppl.py {grouped} {score}"
            steps[f"heal-{name}"] = f"train.py --init_from {grouped} {heal} --out_dir {out}/heal-{name}"
            steps[f"after-{name}"] = f"eval_ppl.py {out}/heal-{name}/ckpt.pt {score}"
    objective = f"{look} --objective ppl*groups**2"
    steps["objective-random"] = f"{objective} --method random --joint --refit none --out {out}/random.json"
    steps["objective-ours"] = f"{objective} --refit output --out {out}/ours.json --log {out}/search.jsonl"
    return steps


def foreign(s: Size, out: Path) -> Steps:
    steps: Steps = {}
    for name, (*_, shares) in FOREIGN.items():
        model, text = f"{out}/{name}.pt", f"{out}/{name}-text"
        read = f"checkpoint.py import {out}/{name}.bin {model} --tokenizer {out}/{name}-tok.bin --overwrite"
        steps[f"{name}-import"] = read
        steps[f"{name}-write-{s.written}"] = lambda model=model, text=text: write_texts(model, Path(text), s.written)
        prepare = f"data/prepare.py {name} --text {text} --tokenizer {model} --out {out}/{name}-data --overwrite"
        steps[f"{name}-prepare"] = prepare
        compare = (
            f"compare_groups.py {model} --dataset {out}/{name}-data --calibration_tokens {s.calibration} --seeds 1"
        )
        few = " ".join(shares.split()[: len(s.shares)])  # one in a fast study, which has one budget
        steps[f"{name}-compare"] = f"{compare} --eval_tokens {min(16384, s.scored)} --shares {few}"
    return steps


def tuning(s: Size, out: Path) -> Steps:
    steps, model = base(s, out), f"{out}/base/ckpt.pt"
    for name, flags in TUNINGS.items():
        steps |= answering(f"tuning-{name}", model, flags, s, out)
    # after them, for it needs the data, which the first tuning prepares
    steps["tuning-before"] = f"eval_text.py {model} --dataset docstrings {s.answers} --max_new_tokens 48 --json"
    steps["tuning-memory"] = f"bench.py memory {s.flags} --steps {s.bench_steps} --json"
    return steps


def attention(s: Size, out: Path) -> Steps:
    compare = f"bench.py attention --init_from {out}/base/ckpt.pt --steps {s.bench_steps} --json"
    return {**base(s, out), "attention": compare}


def speed(s: Size, out: Path) -> Steps:
    shape = s.flags or SMALL
    return {
        "speed-parts": f"bench.py train {shape} --steps {s.bench_steps} --json",
        "speed-decode": f"bench.py decode --block_size {s.decoded} --steps 20 --json",
        "speed-peers": f"tests/compare_speed.py {out}/speed.jsonl {shape} --rounds {s.rounds}",
    }


PARTS = {
    "depth": depth, "groups": groups, "foreign": foreign, "tuning": tuning, "attention": attention, "speed": speed,
}  # fmt: skip


# ---- running them ----


def fetch_foreign(models: str | None, out: Path) -> None:
    """Put the models that others have trained, and their tokenizers, into the folder. Raises UserError if they cannot
    be had, or are others."""
    for name, (*files, _) in FOREIGN.items():
        for (address, sha256), kind in zip(files, ("", "-tok")):
            target = out / f"{name}{kind}.bin"
            if target.exists() and sha256_of(target) == sha256:
                continue
            source = Path(models) / target.name if models else download(address, sha256, out / name)
            if not source.exists() or sha256_of(source) != sha256:
                raise UserError(f"{source} is missing, or not the one of {address}")
            target.write_bytes(source.read_bytes())


@torch.no_grad()
def write_texts(ckpt: str, folder: Path, tokens: int) -> None:
    """Some tokens of text that the model writes, drawn at temperature 1, since its training text may be unknown. A file
    each, as long as its context allows."""
    model, tokenizer = build(load(ckpt))
    folder.mkdir(parents=True, exist_ok=True)
    how = {"temperature": 1.0, "stop": tokenizer.stop, "generator": torch.Generator().manual_seed(0)}
    written = 0
    while written < tokens:
        for ids in model.eval().generate([tokenizer.prompt("")] * 64, model.config.block_size, **how):
            (folder / f"{written:08}.txt").write_text(tokenizer.decode(ids).strip())
            written += len(ids) + 1


def command(words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command of this project. Interrupted, let it save."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(HERE / words[0]), *words[1:]], **how) as child:
        try:
            printed, errors = child.communicate()
        except KeyboardInterrupt:
            child.terminate()  # Ctrl-C has reached it before, SIGTERM has not
            child.communicate()
            raise
    return child.returncode, printed, errors


def run(name: str, step: str | Callable[[], None], out: Path) -> None:
    """Run a step unless it is done: its log is there, and appears when all has gone well. What it noted of its numbers
    comes before them. Raises UserError if the step fails, or if it was done or begun as another command."""
    log, line = out / "logs" / f"{name}.txt", step if isinstance(step, str) else name
    begun = log.with_suffix(".begun")
    for path in (log, begun):
        if path.exists() and path.read_text().splitlines()[:1] != [f"python {line}"]:
            remedy = "give another --out, or delete it, what it made, and the logs of what was made of that"
            raise UserError(f"{path} is of another command: {remedy}")
    if log.exists():
        return
    begun.write_text(f"python {line}\n")
    notes = printed = ""
    if isinstance(step, str):
        words = line.split()
        if words[0] == "train.py":
            folder = words[words.index("--out_dir") + 1]
            words = ["train.py", "--resume", "--out_dir", folder] if Path(folder, "ckpt.pt").exists() else words
        code, printed, errors = command(words)
        if code:
            log.with_suffix(".err").write_text(errors)
            last = (errors.strip() or "nothing").splitlines()[-1]
            raise UserError(f"step {name} failed: {last} | try by hand: python {' '.join(words)}")
        notes = "".join(said + "\n" for said in errors.splitlines() if said.startswith("note:"))
    else:
        step()
    with replacing(log, "w") as file:
        file.write(f"python {line}\n{notes}{printed}")
    begun.unlink()


def main() -> None:
    config = StudyConfig(**parse(__doc__, StudyConfig))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the running step ends, too
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise UserError(f"the study needs {', '.join(missing)}: pip install -r requirements-dev.txt")
    out, size = Path(config.out), FAST if config.fast else Size()
    parts = [part for part in PARTS if part in (config.parts or PARTS)]
    with held(out):
        (out / "logs").mkdir(exist_ok=True)
        try:
            if "foreign" in parts:
                fetch_foreign(config.models, out)
        except UserError as error:
            if config.parts or config.models:
                raise
            print(f"note: no part `foreign`: {error}", file=sys.stderr)
            parts.remove("foreign")
        steps = {name: step for part in parts for name, step in PARTS[part](size, out).items()}
        failed = None
        try:
            with tqdm(steps.items(), desc="study", unit="step") as bar:
                for name, step in bar:
                    bar.set_postfix_str(name)
                    began = time.time()
                    run(name, step, out)
                    if (spent := time.time() - began) > 1:
                        tqdm.write(f"{time.strftime('%H:%M:%S')} {spent:6.0f} s  {name}")
        except UserError as error:
            failed = error
        report(out)
        if failed:
            raise failed
    print(f"wrote {out}/tables.md and {out}/figures")


if __name__ == "__main__":
    exit_cleanly(main)
