"""Every experiment of docs/results.md, from nothing to tables and figures; needs requirements-dev.txt.

    python -m study run                          # all but `published`: some four hours on 2 cores
    python -m study run --fast                   # a quarter of an hour: tiny models, meaningless numbers
    python -m study run --parts groups tuning    # some of it; --only 1of2 takes the steps of that name
    python -m study run --parts published --ckpt smol.pt --dataset wiki --out out/smol    # of another base
    python -m study run --parts depth --shape "--dim 1024 --n_head 8" --dataset tinystories    # larger models

OUT/logs keeps the command of each step with its output. Finished steps are skipped, and an interrupted one
continues. Tables go to OUT/tables.md, figures to OUT/figures. `foreign` and `tuning` download into OUT.
"""

import os
import re
import shlex
import signal
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Literal

from tqdm import tqdm

from common import UserError, held, parse, replacing, require
from data.corpora import GITHUB, download
from study.tables import report

ROOT = Path(__file__).resolve().parent.parent
# A step a line: its name, then arguments of python, or of a function. Steps run in OUT, train.py writes into
# OUT/NAME. A name with [seed] is a step for each entry of LOOPS["seed"], [seed]: <seed>. Products such as
# 0.78*80 are computed and rounded.
STEPS = {
    "depth": """
depth-pace: -m study pace <shapes> --batch_size 8 --steps 9 --json
depth-[budget]-[variant]-[seed]: <variant>*<budget> --seed [seed] <seed> <depth>
depth-[budget]-[variant]-[seed]-test: eval_ppl.py depth-[budget]-[variant]-[seed]/ckpt.pt <test>
depth-long-[other]-0: <other>*320 --eval_tokens 16384 <depth>
depth-long-[other]-0-test: eval_ppl.py depth-long-[other]-0/ckpt.pt <test>
depth-latency: -m study latency --compile --batch_size 1 --steps 30 --json --ckpts <models>
""",
    "groups": """
before-base: eval_ppl.py <ckpt> <own> <test>
heal-base: train.py --init_from <ckpt> <heal>
after-base: eval_ppl.py heal-base/ckpt.pt <own> <test>
search-[share]: <search> --kv_budget <share> --max_evals 3 --out groups-[share].json
again-1of2: <search> --kv_budget 0.5 --max_evals 3 --seed 1 --out again-1of2.json
again-1of4: <search> --kv_budget 0.25 --max_evals 3 --seed 1 --out again-1of4.json
merge-[merge]-[share]: gqa.py <ckpt> <own> --calibration_tokens 65536 <merge> --eval_tokens 2048
    --out [merge]-[share].pt --overwrite
before-[merge]-[share]: eval_ppl.py [merge]-[share].pt <own> <test>
heal-[merge]-[share]: train.py --init_from [merge]-[share].pt <heal>
after-[merge]-[share]: eval_ppl.py heal-[merge]-[share]/ckpt.pt <own> <test>
objective-random: <search> --groups_power 2 --max_evals 40 --method random --joint --refit none
    --out random.json
objective-ours: <search> --groups_power 2 --max_evals 40 --refit output --out ours.json
figure-heads: -m study plot groups <ours> --out figures/heads.png
figure-together: -m study plot together <found> again-1of2.json again-1of4.json --out figures/together.png
figure-similarity: -m study plot similarity <ckpt> <own> --out figures/similarity.png
figure-attention: -m study plot attention <ckpt> --out figures/attention.png
figure-architecture: -m study plot architecture ours-1of2.pt --out figures/architecture.png
""",
    "published": """
published-random-[twin]: search_groups.py <ckpt> <own> <twothirds> --method random --joint <mean>
    --max_evals 150 --seed [twin] --out published-random-[twin].json
published-ours: search_groups.py <ckpt> <own> <twothirds> --max_evals 40 --refit none
    --out published-ours.json
published-[recipe]-merge: gqa.py <ckpt> <own> <recipe> --eval_tokens 2048
    --out published-[recipe].pt --overwrite
published-[recipe]-before-[protocol]: eval_ppl.py published-[recipe].pt <own> <protocol>
published-[recipe]-heal[more]: train.py --init_from published-[recipe].pt <own> <lora> <more>
published-[recipe]-after[more]-[protocol]: eval_ppl.py published-[recipe]-heal[more]/ckpt.pt <own> <protocol>
published-[recipe]-first: gqa.py published-original-heal/ckpt.pt <own> <recipe> --eval_tokens 2048
    --out first-[recipe].pt --overwrite
published-[recipe]-first-[protocol]: eval_ppl.py first-[recipe].pt <own> <protocol>
""",
    "tuning": """
text-[text]: download <text> texts
[task]-prepare: data/prepare.py [task] <[task]> --tokenizer <ckpt> --out [task]-data --overwrite
tuning-[task]-before: -m study score <ckpt> --dataset [task]-data <score>
tuning-before-own: eval_ppl.py <ckpt> <own> <forgot>
tuning-[task]-[tuning]-[twin]: train.py --init_from <ckpt> --dataset [task]-data --seed [twin] <task> <tuning>
    <tune>
tuning-[task]-[tuning]-[twin]-score: -m study score tuning-[task]-[tuning]-[twin]/ckpt.pt <score>
tuning-[task]-[tuning]-[twin]-own: eval_ppl.py tuning-[task]-[tuning]-[twin]/ckpt.pt <prose> <forgot>
few: first_lines docstrings-data/train.jsonl few.jsonl 200
few-prepare: data/prepare.py few --from few.jsonl docstrings-data/val.jsonl docstrings-data/test.jsonl
    --tokenizer <ckpt> --out few-data --overwrite
few-[tuning]: train.py --init_from <ckpt> --dataset few-data <tuning> --epochs 24 --eval_every 13
few-[tuning]-own: eval_ppl.py few-[tuning]/ckpt.pt <prose> <forgot>
figure-epochs: -m study plot loss LoRA=few-lora8 full=few-full --train --x epochs --out figures/epochs.png
""",
    "memory": """
memory: -m study memory --steps 5 --json
memory-larger: -m study memory --steps 2 --batch_size 4 <110M> --json
""",
    "attention": """
attention: -m study attention --init_from <ckpt> <own> --steps 1 --json
attention-[backend]-[length]: -m study train --attention [backend] --block_size <length> --steps 3 --json
""",
    "speed": """
speed-parts: -m study train <small> --steps 5 --json
speed-decode: -m study decode --block_size 1024 --steps 20 --json
speed-peers: -m study compare-speed speed.jsonl <small> --rounds 1 --overwrite
""",
    "foreign": """
[foreign]-model: download <[foreign]>/[foreign].bin <[foreign].bin> [foreign]
[foreign]-tokenizer: download <[foreign]>/tok512.bin <[foreign]-tok512.bin> [foreign]
[foreign]-import: -m formats import [foreign]/[foreign].bin [foreign].pt --tokenizer [foreign]/tok512.bin
    --overwrite
[foreign]-write: -m study write [foreign].pt [foreign]-text --tokens 330000 --overwrite
[foreign]-prepare: data/prepare.py [foreign] --text [foreign]-text --tokenizer [foreign].pt
    --out [foreign]-data --overwrite
[foreign]-compare: -m study compare-groups [foreign].pt --dataset [foreign]-data
    --calibration_tokens 16384 --eval_tokens 16384 --seeds 1 --shares <foreign>
""",
}
TRAIN, BEGIN, STEP = "train.py --n_layer", "-m study begin", "--max_steps"
BASE = f"base: {TRAIN} 6 --max_steps 500 <shape> <own>"  # whose ckpt.pt is <ckpt>, unless one is given
LOOPS = {
    # at equal seconds, of the default shape on a CPU (`study pace`): 8 layers make 0.78 of the steps of 6
    "variant": {
        "6-plain": f"{TRAIN} 6 {STEP} 1", "6-novel": f"{TRAIN} 6 --novel {STEP} 1",
        "6-gated": f"{TRAIN} 6 --gated {STEP} 1", "6-scaled": f"{BEGIN} scaled --n_layer 6 {STEP} 1",
        "6-torch": f"{BEGIN} torch --n_layer 6 --novel {STEP} 1",
        "8-plain": f"{TRAIN} 8 {STEP} 0.78", "8-novel": f"{TRAIN} 8 --novel {STEP} 0.77",
        "8-gated": f"{TRAIN} 8 --gated {STEP} 0.77", "8-scaled": f"{BEGIN} scaled --n_layer 8 {STEP} 0.78",
    },
    "other": {  # depths of long runs only
        "5-plain": f"{TRAIN} 5 {STEP} 1.17", "5-novel": f"{TRAIN} 5 --novel {STEP} 1.17",
        "7-plain": f"{TRAIN} 7 {STEP} 0.87", "7-novel": f"{TRAIN} 7 --novel {STEP} 0.86",
    },
    "budget": {"short": "80", "long": "320"}, "twin": {"0": "", "1": ""},
    "seed": {"0": "--eval_tokens 16384", "1": "--eval_tokens 0", "2": "--eval_tokens 0"},  # one has a curve
    "merge": {
        "random-mean": "--kv_budget <share> --joint --grouping random <mean>",
        "neighbour-mean": "--kv_budget <share> --joint --grouping neighbour <mean>",
        "best-mean": "--kv_budget <share> --joint --merge mean --refit none",
        "neighbour-closed": "--kv_budget <share> --joint --grouping neighbour --refit none",
        "ours": "--groups groups-[share].json",
    },
    "share": {"3of4": "0.75", "2of3": f"{2 / 3}", "1of2": "0.5", "1of3": f"{1 / 3}", "1of4": "0.25"},
    "recipe": {
        "original": "--kv_budget 1 <mean>",
        "random-0": "--groups published-random-0.json <mean>",
        "random-1": "--groups published-random-1.json <mean>",
        "neighbour": "<2of3> --joint --grouping neighbour <mean>",
        "ours": "--groups published-ours.json --refit output", "latent": "<2of3> --latent --refit output",
        "tokens": "<2of3> --latent --cache_tokens --refit output",
        "mqa-mean": "--n_kv_head 1 <mean>", "mqa-ours": "--n_kv_head 1 --refit output",
    },
    # the mean over blocks of exp(loss); then by a window that moves by half
    "protocol": {
        "block_mean": "--method block_mean --context 128 <p>",
        "sliding": "--method sliding --context <window> <p>",
    },
    "more": {"": "", "16": "--lora_alpha 16 --lr 0.001"},  # than the published LoRA
    "task": {"docstrings": "", "multi30k": "", "dialogsum": "--batch_size 4"},
    "tuning": {"full": "--optimizer adamw", "lora8": "--lora_r 8", "qlora8": "--lora_r 8 --quantize nf4"},
    "backend": {"naive": "", "sdpa": ""},
    "length": {f"{n}": f"{n} --batch_size {4096 // n}" for n in (256, 512, 1024, 2048, 4096)},
    # shares of its cache that joint groups can keep
    "foreign": {"stories260K": "0.75 0.65 0.5 0.3 0.25", "aidreams260K": "0.75 0.625 0.5 0.3125 0.25"},
}  # fmt: skip
LOOPS["text"] = {  # of Multi30k and DialogSum
    "multi30k-train.en": "<30k>/train.en.gz d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "multi30k-train.de": "<30k>/train.de.gz 726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "multi30k-val.en": "<30k>/val.en.gz 14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "multi30k-val.de": "<30k>/val.de.gz f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "multi30k-test.en": "<flickr>.en.gz 611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "multi30k-test.de": "<flickr>.de.gz 9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "dialogsum-dev": "<sum>.dev.jsonl 436721e0a3571eef7072964f80e042fb151d8c6178db1a688ce8f803bbf0a13f",
    "dialogsum-test": "<sum>.test.jsonl 6de36eca7e7b9b10975fd5ea3f47391df172d8b3c15d03d84d763cbaab015fda",
}
FLAGS = {  # what several steps share
    "<docstrings>": "",
    "<multi30k>": "--instruction 'Translate to German.' --parallel texts/train.en.gz texts/train.de.gz"
    " texts/val.en.gz texts/val.de.gz texts/test_2016_flickr.en.gz texts/test_2016_flickr.de.gz",
    "<dialogsum>": "--instruction 'Summarize this dialogue.' --from texts/dialogsum.dev.jsonl"
    " texts/dialogsum.test.jsonl --fields dialogue,summary dialogue,summary1",
    "<flickr>": "<30k>/test_2016_flickr",
    "<30k>": GITHUB + "multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw",
    "<sum>": GITHUB + "cylnlp/dialogsum/848cc8c05e0a04def79326539de827f1b28786a0/DialogSum_Data/dialogsum",
    r"([\d.]+)\*(\d+)": lambda product: str(round(float(product[1]) * int(product[2]))),
    "<depth>": "--batch_size 8 --compile --eval_every 40 <shape> <own>",
    "<shapes>": " ".join(
        f'"--n_layer {n}{kind} --compile <shape>"'
        for n, kind in product((6, 8, 5, 7), ("", " --novel", " --gated"))
    ),
    "<test>": "--split test --max_tokens 65536 --json",
    "<forgot>": "--split test --max_tokens 16384 --context 256 --json",
    "<score>": "--max_new_tokens 48 --limit 100 --json",
    "<heal>": "--teacher <ckpt> <own> --lora_r 8 --max_steps 20 --warmup_steps 4 --eval_tokens 0",
    # refits take most of its time, hence few calibration tokens
    "<search>": "search_groups.py <ckpt> <own> --search_tokens 8192 --calibration_tokens 16384 --overwrite",
    "<twothirds>": "<2of3> --search_tokens 2048 --overwrite",
    "<2of3>": f"--kv_budget {2 / 3}",
    "<mean>": "--merge mean --refit none --calibration_tokens 16384",  # which a mean does not read
    "<p>": "--split test --max_tokens 16384 --json",
    "<lora>": "--lora_r 8 --lora_alpha 1 --optimizer adamw --lr 0.0005 --weight_decay 0 --warmup_steps 1"
    " --block_size 128 --batch_size 4 --grad_accum 4 --max_steps 30 --eval_tokens 0",
    "<models>": " ".join(f"depth-long-{kind}-0/ckpt.pt" for kind in LOOPS["variant"] | LOOPS["other"]),
    "<ours>": " ".join(f"ours-{share}.pt" for share in LOOPS["share"]),
    "<found>": " ".join(f"groups-{share}.json" for share in LOOPS["share"]),
    "<small>": "--n_layer 6 --dim 288 --n_head 6 --hidden_dim 768",
    "<110M>": "--n_layer 12 --dim 768 --n_head 12 --hidden_dim 2048 --vocab_size 32000",
    "<stories260K>": "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K",
    "<stories260K.bin>": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
    "<stories260K-tok512.bin>": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
    "<aidreams260K.bin>": "aa722d252ace805c9ff2264dce993df6843c8cec3d1a930d03e4c487f3db9028",
    "<aidreams260K-tok512.bin>": "3817c307fffc9637c908ca3430a028db0c46b5700392e0d19b2133d246f54bcb",
    "<aidreams260K>": GITHUB
    + "mc9625/ai-dreamer-esp32-s3_matrix/a6a5545a42277ebf0eea9584a44a765891f2f492/data",
}
TINY = "--dim 64 --n_head 4 --block_size 128"
FAST = {  # patterns, and what --fast puts there
    "<shape>": TINY, "<tune>": "--max_steps 100 --warmup_steps 1",
    "study (memory|train)": rf"study \1 {TINY}",
    "--dim (288|768) .* (768|32000)": TINY, "--block_size 1024": "--block_size 256",
    r' "--n_layer [578][^"]*"': "", r" depth-long-(?!6|5-plain)\S+": "",
    r"(--max_steps \d+)\d": r"\1", r"--warmup_steps \d+": "--warmup_steps 1", "--epochs 24": "--epochs 1",
    "_every 40": "_every 3", r" --(steps|rounds) \d+": r" --\1 1", "_evals (40|150)": "_evals 14",
    "--limit 100": "--limit 8", "8192|16384|65536": "4096", "330000": "40000", r"(--shares \S+).*": r"\1",
    " --compile": " --no-compile", r" (ours|groups)-(?!1of2)\S+": "",
}  # fmt: skip
FAST_LOOPS = {  # how kept keys begin
    "variant": "6", "other": "5-plain", "seed": "0", "twin": "0", "share": "1of2", "text": "multi30k",
    "task": ("docstrings", "multi30k"), "length": "256", "recipe": ("original", "random-0", "ours"),
}  # fmt: skip


@dataclass
class StudyConfig:
    """study"""

    out: str = "out/study"  # the folder of everything that it makes
    parts: list[Literal[tuple(STEPS)]] | None = None  # which (default: all, `published` with --ckpt only)
    only: str = ""  # steps whose names this regular expression finds; all they read but `base` must be done
    fast: bool = False  # tiny models and few steps, to check that everything works; into OUT-fast
    ckpt: str | None = None  # the model to group and to tune, in place of a default one; needs --dataset
    dataset: str = ""  # text prepared with the tokenizer of --ckpt, or to train on (default: stdlib)
    shape: str = ""  # flags of train.py for models trained from nothing, in quotes
    tune: str = "--max_steps 100 --warmup_steps 10"  # flags of train.py for `tuning`, not for its few-*


def first_lines(source: str, target: str, count: str) -> None:
    lines = Path(source).read_text().split("\n")  # splitlines would cut at a U+2028 inside a record
    Path(target).write_text("\n".join(lines[: int(count)]) + "\n")


def steps(config: StudyConfig) -> dict[str, str]:
    """{name: command} of what the flags ask for."""
    parts = config.parts or [part for part in STEPS if part != "published" or config.ckpt]
    text = "".join([BASE, *(STEPS[part] for part in STEPS if part in parts)]).replace("\n    ", " ")
    for loop, entries in LOOPS.items():
        kept = [key for key in entries if not config.fast or key.startswith(FAST_LOOPS.get(loop, ""))]
        pairs = product(text.split("\n"), kept)
        lines = [line.replace(f"[{loop}]", key).replace(f"<{loop}>", entries[key]) for line, key in pairs]
        text = "\n".join(dict.fromkeys(lines))  # a step without this loop stays one
    data = config.dataset
    if data and Path(data, "meta.json").exists():
        data = str(Path(data).resolve())  # steps run in another folder
    ckpt = shlex.quote(str(Path(config.ckpt).resolve())) if config.ckpt else "base/ckpt.pt"
    own = f"--dataset {shlex.quote(data)}" if data else ""
    given = {"<own>": own, "<ckpt>": ckpt, "<shape>": shlex.join(config.shape.split())}
    given |= {"<window>": "1024" if config.ckpt else "256"}  # the published one; all of the base's context
    given |= {"<prose>": own or "--dataset stdlib", "<tune>": shlex.join(config.tune.split())}
    for pattern, new in (FLAGS | FAST if config.fast else FLAGS).items():
        text = re.sub(pattern, new, text)
    for name, new in given.items():  # which is not to be read as a pattern
        text = text.replace(name, new)
    todo = dict(" ".join(line.split()).split(": ", 1) for line in text.split("\n") if line)
    todo = {name: line for name, line in todo.items() if name == "base" or re.search(config.only, name)}
    if not any(" base/ckpt.pt" in line for line in todo.values()):  # no step reads it
        del todo["base"]
    return todo


def run(name: str, line: str) -> None:
    """Run a step unless its log is there; the log is written when all went well."""
    log, words, printed = Path("logs", f"{name}.txt"), shlex.split(line), ""
    begun, resumed = Path("logs", f"{name}.begun"), Path(name, "ckpt.pt").exists()
    functions = {"download": download, "first_lines": first_lines}
    for path in [log] + [begun] * resumed:
        same = not path.exists() or path.read_text().splitlines()[0] == line
        require(same, f"{path} is of another command: give a new --out, or delete it and what depends on it")
    if log.exists():
        return
    with replacing(begun, "w") as file:
        print(line, file=file)
    if words[0] in functions:
        functions[words[0]](*words[1:])
    else:
        if words[0] == "train.py" or words[2:3] == ["begin"]:
            words += ["--out_dir", name] + ["--resume"] * resumed
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        path = {**os.environ, "PYTHONPATH": str(ROOT)}
        child = Popen([sys.executable, *words], stdout=PIPE, stderr=PIPE, text=True, env=path)
        try:
            printed, errors = child.communicate()
        except KeyboardInterrupt:  # the terminal's Ctrl-C reaches the child as well, SIGTERM does not
            child.terminate()  # train.py then saves
            child.communicate()
            raise
        if child.returncode:
            lines = [f"it ended with {child.returncode} (-9: it may have lacked memory)"]
            lines += errors.strip().splitlines() if child.returncode > 0 else []
            error, again = lines[-1], shlex.join(words)
            raise UserError(f"step {name}: {error} | cd {Path.cwd()} && PYTHONPATH={ROOT} python {again}")
        printed = "".join(f"{said}\n" for said in errors.splitlines() if said.startswith("note:")) + printed
    with replacing(log, "w") as file:
        file.write(f"{line}\n{printed}")


def main() -> None:
    config = StudyConfig(**parse(__doc__, StudyConfig))
    out = Path(f"{Path(config.out)}{'-fast' * config.fast}")
    require(not config.ckpt or config.dataset, "--ckpt needs --dataset, text prepared with its tokenizer")
    try:
        todo = steps(config)
    except re.error as error:
        raise UserError(f"--only {config.only}: no regular expression ({error})") from None
    require(todo, f"--only {config.only}: no step of these parts has it in its name")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with held(out):
        os.chdir(out)
        try:
            for name, line in tqdm(todo.items(), desc="study", unit="step"):
                tqdm.write(name)
                run(name, line)
        finally:
            report(LOOPS)
    print(f"wrote {out}/tables.md and {out}/figures")
