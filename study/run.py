"""Every experiment of docs/results.md, from nothing to tables and figures; needs requirements-dev.txt.

    python -m study run                          # all of it, under three hours on 2 cores
    python -m study run --fast                   # ten minutes: tiny models and few steps, meaningless numbers
    python -m study run --parts depth groups     # some of it

OUT/logs keeps the command of each step with its output. Finished steps are skipped, and an interrupted one
continues. Tables go to OUT/tables.md, figures to OUT/figures. `foreign` downloads two models into OUT/NAME.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from checkpoint import build, load
from common import UserError, held, parse, replacing
from data.corpora import download
from study import plot
from study.bench import records, table

ROOT = Path(__file__).resolve().parent.parent
# A step a line: its name, then arguments of python, or of a function. Steps run in OUT, train.py writes into
# OUT/NAME. A name with [seed] is a step for each entry of LOOPS["seed"], [seed]: <seed>.
STEPS = {
    "depth": """
depth-[variant]-[seed]: train.py <variant> --seed [seed] --batch_size 8 --compile
    --max_steps 240 --warmup_steps 16 --eval_every 40 --eval_tokens 16384
depth-[variant]-[seed]-test: eval_ppl.py depth-[variant]-[seed]/ckpt.pt <test>
depth-latency-[way]: -m study latency <way> --batch_size 1 --steps 30 --json --ckpts <models>
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
figure-heads: -m study plot groups <ours> --out figures/heads.png
figure-similarity: -m study plot similarity base/ckpt.pt --out figures/similarity.png
figure-attention: -m study plot attention base/ckpt.pt --out figures/attention.png
figure-architecture: -m study plot architecture ours-1of2.pt --out figures/architecture.png
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
[foreign]-model: download <[foreign]>/[foreign].bin <[foreign].bin> [foreign]
[foreign]-tokenizer: download <[foreign]>/tok512.bin <[foreign]-tok512.bin> [foreign]
[foreign]-import: -m formats import [foreign]/[foreign].bin [foreign].pt --tokenizer [foreign]/tok512.bin
    --overwrite
[foreign]-write: write_texts [foreign].pt [foreign]-text 330000
[foreign]-prepare: data/prepare.py [foreign] --text [foreign]-text --tokenizer [foreign].pt
    --out [foreign]-data --overwrite
[foreign]-compare: -m study compare-groups [foreign].pt --dataset [foreign]-data
    --calibration_tokens 65536 --eval_tokens 16384 --seeds 1 --shares <foreign>
""",
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
}  # fmt: skip
FLAGS = {  # what several steps share; refits take most of a search's time, hence its few calibration tokens
    "<test>": "--split test --max_tokens 65536 --json",
    "<tune>": "--dataset docstrings --max_steps 100 --warmup_steps 10",
    "<score>": "--max_new_tokens 48 --json",
    "<heal>": "--teacher base/ckpt.pt --lora_r 8 --max_steps 20 --warmup_steps 4 --eval_tokens 0",
    "<search>": "search_groups.py base/ckpt.pt <size> --overwrite --calibration_tokens 32768",
    "<size>": "--max_evals 40 --search_tokens 16384",
    "<models>": " ".join(f"depth-{variant}-0/ckpt.pt" for variant in LOOPS["variant"]),
    "<ours>": " ".join(f"ours-{share}.pt" for share in LOOPS["share"]),
    "<small>": "--n_layer 6 --dim 288 --n_head 6 --hidden_dim 768",
    "<stories260K>": "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K",
    "<stories260K.bin>": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
    "<stories260K-tok512.bin>": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
    "<aidreams260K.bin>": "aa722d252ace805c9ff2264dce993df6843c8cec3d1a930d03e4c487f3db9028",
    "<aidreams260K-tok512.bin>": "3817c307fffc9637c908ca3430a028db0c46b5700392e0d19b2133d246f54bcb",
    "<aidreams260K>": "https://raw.githubusercontent.com/mc9625/ai-dreamer-esp32-s3_matrix/"
    "a6a5545a42277ebf0eea9584a44a765891f2f492/data",
}
TINY = "--dim 64 --n_head 4 --block_size 128"
FAST = {  # patterns, and what --fast puts there
    r"train.py (?!--init_from)": f"train.py {TINY} ", "study memory": f"study memory {TINY}",
    "--dim 288 .* 768": TINY, "_dim 706": "_dim 194", "--block_size 1024": "--block_size 256",
    r"(--max_steps \d+)0": r"\1", r"--warmup_steps \d+": "--warmup_steps 1", "_every 40": "_every 3",
    r" --(steps|rounds) \d+": r" --\1 1", "_evals 40": "_evals 14", "_tokens 48": "_tokens 48 --limit 8",
    "16384|32768|65536": "4096", "330000": "40000", r"(--shares \S+).*": r"\1",
    " --compile": " --no-compile", r"depth-[578]\S+ ": "", r" ours-(?!1of2)\S+": "",
}  # fmt: skip
FAST_LOOPS = {"variant": "6", "seed": "0", "way": "eager", "share": "1of2"}  # how kept keys begin
KINDS = ("plain", "novel", "wide", "gated")


@dataclass
class StudyConfig:
    """study"""

    out: str = "out/study"  # the folder of everything that it makes
    parts: list[str] | None = None  # any of depth groups tuning attention speed foreign (default: all)
    fast: bool = False  # tiny models and few steps, to check that everything works; into OUT-fast


def write_texts(ckpt: str, folder: str, tokens: str) -> None:
    """Let a model, whose training text is unknown, write at temperature 1; each text is a file."""
    (model, tokenizer), written = build(load(ckpt)), 0
    Path(folder).mkdir(exist_ok=True)
    how = {"temperature": 1.0, "stop": tokenizer.stop, "generator": torch.Generator().manual_seed(0)}
    while written < int(tokens):
        for ids in model.generate([tokenizer.prompt("")] * 64, model.config.block_size, **how):
            Path(folder, f"{written:08}.txt").write_text(tokenizer.decode(ids).strip())
            written += len(ids) + 1


def steps(parts: list[str], fast: bool) -> dict[str, str]:
    """{name: command} of some parts."""
    text = "".join(STEPS[part] for part in parts).replace("\n    ", " ")
    for loop, entries in LOOPS.items():
        kept = [key for key in entries if not fast or key.startswith(FAST_LOOPS.get(loop, ""))]
        pairs = product(text.split("\n"), kept)
        lines = [line.replace(f"[{loop}]", key).replace(f"<{loop}>", entries[key]) for line, key in pairs]
        text = "\n".join(dict.fromkeys(lines))  # a step without this loop stays one
    for pattern, new in (FLAGS | FAST if fast else FLAGS).items():
        text = re.sub(pattern, new, text)
    return dict(" ".join(line.split()).split(": ", 1) for line in text.split("\n") if line)


def run(name: str, line: str) -> None:
    """Run a step unless its log is there; the log is written when all went well."""
    log, words, printed = Path("logs", f"{name}.txt"), line.split(), ""
    if log.exists():
        if log.read_text().splitlines()[0] != line:
            raise UserError(f"{log} is of another command: give another --out, or delete what it made")
        return
    if words[0] == "download":
        download(*words[1:3], Path(words[3]))
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


def result(name: str) -> dict:
    """The JSON object on the last line of a step's log; empty if the step has not run."""
    path = Path("logs", f"{name}.txt")
    return json.loads(path.read_text().splitlines()[-1]) if path.exists() else {}


def trained(folder: Path) -> dict:
    """The last value of everything in a run's log: its settings, its last step and its last evaluation."""
    return {key: value for record in records(folder / "log.jsonl") for key, value in record.items()}


def answers(name: str) -> dict:
    """The scores of a step of `study score`; none if it has not run."""
    found = result(name).get("ckpt", {})
    return {f"answers, {key}": found[key] for key in ("loss", "bleu", "rouge1", "rouge2", "rougeL") if found}


def depth() -> Iterator[str]:
    """A row for each run; the times, ms for 64 tokens, and the answers are those of the first seed."""
    rows, plain, times = [], {}, defaultdict(dict)
    for key, way in product(("p5", "median", "p95"), ("eager", "compiled")):
        for row in result(f"depth-latency-{way}").get("rows", []):
            times[row["ckpt"]][f"{key}, {way}"] = row[key]
    for log in sorted(Path("logs").glob("depth-*-test.txt")):  # plain before its variants
        name = log.stem.removesuffix("-test")
        _, layers, *kind, seed = name.split("-")
        run, test = trained(Path(name)), result(log.stem)
        row = {"layers": int(layers), "variant": "".join(kind) or "plain", "seed": int(seed)}
        row |= {"parameters": run["params"], "training, s": run["seconds"]}
        row |= {"val perplexity": math.exp(run["val_loss"]), "test perplexity": test["blocks"]}
        row |= {"test bits per byte": test["bits_per_byte"], **times[f"{name}/ckpt.pt"]}
        row["by plain's"] = test["blocks"] / plain.setdefault((layers, seed), test["blocks"])
        rows.append({**row, **answers(f"{name.removesuffix('-0')}-score")})
    if not rows:
        return
    yield "### Fewer, richer layers"
    yield table(rows)
    ratios = [row["by plain's"] for row in rows if row["variant"] == "novel"]
    if len(ratios) > 1:
        yield f"novel by plain: mean {mean(ratios):.4f}, deviation {stdev(ratios):.4f}, {len(ratios)} pairs"
    plot.save(partial(draw_depth, rows), Path("figures/depth.png"))


def draw_depth(rows: list[dict]) -> Figure:
    """Test perplexity against milliseconds, and the curves of the first seed."""
    drawn, [[left, right]] = plot.grid(1, 2, 8, 4)
    way = "median, compiled" if "median, compiled" in rows[0] else "median, eager"
    for row in [row for row in rows if way in row]:  # of the first seed
        layers, kind, colour = row["layers"], row["variant"], plot.COLOURS[KINDS.index(row["variant"])]
        seeds = [r["test perplexity"] for r in rows if (r["layers"], r["variant"]) == (layers, kind)]
        left.plot([row[way]] * len(seeds), seeds, marker="o", color=colour)
        left.text(row[way], max(seeds), f"{layers} {kind}", fontsize=8)
        name = f"depth-{layers}-{kind}-0".replace("-plain", "")
        right.plot(*plot.curve(name, "tokens"), color=colour, lw=0.4 * layers - 1.4)
    left.set(xlabel=f"ms for 64 tokens, {way}", ylabel="test perplexity", title="a point for each seed")
    right.set(xlabel="tokens", ylabel="val loss, nats a token", title="first seed; thicker: more layers")
    return drawn


def groups() -> Iterator[str]:
    """Perplexity of each merge by the original's, before and after both were healed."""
    shares = [share for share in LOOPS["share"] if result(f"after-ours-{share}")]
    if not shares:
        return

    def ratio(when: str, merge: str, share: str) -> float:
        return result(f"{when}-{merge}-{share}")["blocks"] / result(f"{when}-base")["blocks"]

    whole = result("before-base")["kv_bytes_per_token"]
    sizes = [result(f"before-ours-{share}")["kv_bytes_per_token"] for share in shares]
    rows, panels = [], {}
    for merge in LOOPS["merge"]:
        rows.append({"bytes a token of the cache": merge})
        for share, size in zip(shares, sizes):
            before, after = (ratio(when, merge, share) for when in ("before", "after"))
            rows[-1][f"{size:,} ({size / whole:.3f})"] = f"{before:.3f} -> {after:.3f}"
    for when in ("before", "after"):
        lines = {merge: [ratio(when, merge, share) for share in shares] for merge in LOOPS["merge"]}
        panels[f"{when} healing"] = [size / whole for size in sizes], lines
    yield "### Uneven groups"
    yield table(rows)
    plot.save(partial(draw_ratios, panels), Path("figures/groups.png"))


def draw_ratios(panels: dict[str, tuple[list[float], dict[str, list[float]]]]) -> Figure:
    """{title: (shares of the cache, {label: perplexity ratios})}, a panel for each title."""
    drawn, [axes] = plot.grid(1, len(panels), 8, 5)
    for place, (title, (x, lines)) in zip(axes, panels.items()):
        for (label, y), marker in zip(lines.items(), "os^vDPX*+xd"):
            place.plot(x, y, marker=marker, markersize=5, label=label)
        place.set(xlabel="share of the KV cache", ylabel="perplexity, ratio to the original's", title=title)
        most = max(max(y) for y in lines.values())
        ticks = [t for t in (1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 40) if t < 1.1 * most]
        place.set_yscale("log")
        place.set_yticks(ticks, [f"{t:g}" for t in ticks])
        place.minorticks_off()
        place.grid()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return drawn


def foreign() -> None:
    """The tables of compare-groups as a figure."""
    panels = {}
    for log in sorted(Path("logs").glob("*260K-compare.txt"), reverse=True):
        lines = [line for line in log.read_text().splitlines() if line.startswith("|")]
        head, _, *rows = [line.strip("| ").split(" | ") for line in lines]
        ratios = {label: list(map(float, cells)) for label, *cells in rows}
        panels[f"{log.stem.removesuffix('-compare')}, on its own text"] = list(map(float, head[1:])), ratios
    if panels:
        plot.save(partial(draw_ratios, panels), Path("figures/foreign.png"))


def tuning() -> Iterator[str]:
    rows = []
    for log in sorted(Path("logs").glob("tuning-*-score.txt")):
        name = log.stem.removesuffix("-score")
        run, size = trained(Path(f"{name}-answers")), Path(f"{name}-answers/ckpt.pt").stat().st_size
        row = {"": name.removeprefix("tuning-"), "trainable": run["trainable"], "checkpoint, bytes": size}
        row |= {"training, s": run["seconds"], "process's peak, bytes": run["peak_memory_bytes"]}
        rows.append({**row, **answers(log.stem)})
    if rows:
        yield "### Tuning"
        yield table([*rows, {"": "before", **answers("tuning-before")}])
    if memory := result("tuning-memory").get("rows"):
        plot.save(partial(draw_memory, memory), Path("figures/memory.png"))


def draw_memory(rows: list[dict]) -> Figure:
    bars = {"peak memory of a step, MiB": [row["peak"] / 2**20 for row in rows]}
    bars["tokens/s"] = [row["train_tok_s"] for row in rows]
    drawn, [axes] = plot.grid(1, 2, 10, 1 + 0.32 * len(rows))
    for place, colour, (title, values) in zip(axes, plot.COLOURS, bars.items()):
        shown = place.barh([row["row"] for row in rows], values, color=colour)
        place.bar_label(shown, fmt="{:,.0f}", padding=3, fontsize=8)
        place.set(title=title, xlim=(0, 1.25 * max(values)))
        place.invert_yaxis()
    return drawn


def printed() -> Iterator[str]:
    """What searches and benchmarks have printed: rows as JSON, or lines."""
    for name in ("objective-*", "*-compare", "tuning-memory", "attention", "speed-*"):
        for log in sorted(Path("logs").glob(f"{name}.txt")):
            _, *lines = log.read_text().splitlines()
            rows = json.loads(lines[-1])["rows"] if lines[-1].startswith("{") else []
            yield f"### {log.stem}"
            yield table(rows) if rows else "\n".join(["```", *lines, "```"])


def report() -> None:
    """Write OUT/tables.md and OUT/figures of all that has run."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = [f"{time.strftime('%Y-%m-%d')} | Python {platform.python_version()} | {machine}"]
    for section in (depth, groups, tuning, printed):
        text += section()
    foreign()
    with replacing(Path("tables.md"), "w") as file:
        file.write("\n\n".join(text) + "\n")


def main() -> None:
    config = StudyConfig(**parse(__doc__, StudyConfig))
    out = Path(config.out + "-fast" * config.fast)
    if unknown := set(config.parts or ()) - set(STEPS):
        raise UserError(f"--parts {min(unknown)} is none of the parts: {' '.join(STEPS)}")
    todo = steps([part for part in STEPS if part in (config.parts or STEPS)], config.fast)
    with held(out):
        os.chdir(out)
        try:
            for name, line in tqdm(todo.items(), desc="study", unit="step"):
                tqdm.write(name)
                run(name, line)
        finally:
            report()
    print(f"wrote {out}/tables.md and {out}/figures")
