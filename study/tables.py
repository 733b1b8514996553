"""The tables and figures of `study run`, from the logs of its steps."""

import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from common import replacing
from study import plot
from study.bench import records, table

KINDS = ("plain", "novel", "gated", "scaled", "torch")
SCORES = ["loss", "choice", "bleu", "bleu1", "chrf", "rouge1", "rouge2", "rougeL", "f1", "edit"]
SCORES += ["exact_match", "ended", "latency_mean", "latency_p5", "latency_p50", "latency_p95"]


def result(name: str) -> dict:
    """The JSON object on the last line of a step's log, with the scores in its `ckpt`; empty if the step has
    not run. Numbers that are null or not there are nan."""
    path = Path("logs", f"{name}.txt")
    found = json.loads(path.read_text().splitlines()[-1]) if path.exists() else {}
    found |= found.pop("ckpt", {})
    return defaultdict(lambda: math.nan, {k: math.nan if v is None else v for k, v in found.items()})


def section(title: str, rows: list[dict], figure: str = "", draw: Callable[[], Figure] | None = None):
    """The parts of a table, and its figure in figures/; nothing without rows."""
    if rows and draw:
        plot.save(draw, Path(f"figures/{figure}.png"))
    return [f"### {title}", table(rows)] if rows else []


def spread(values: list[float]) -> str:
    """The mean, and where there are several values its standard error."""
    error = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.5g}{error}"


def gathered(pattern: str) -> dict[tuple, dict[str, dict]]:
    """{(long, 6, plain): {seed: record}} of logs such as depth-long-6-plain-0-test. A record joins the lines
    of the run's log.jsonl (later ones win), what the step printed, and `own`, the base text's perplexity."""
    found: dict = defaultdict(dict)
    for log in sorted(Path("logs").glob(pattern)):
        _, *parts, seed, _ = log.stem.split("-")
        name, known = log.stem.rpartition("-")[0], {}
        for record in records(Path(name, "log.jsonl")):
            known |= record
        found[tuple(parts)][seed] = known | result(log.stem) | {"own": result(f"{name}-own")["blocks"]}
    return found


def depth() -> list[str]:
    """A row for each budget and variant; ms for 64 tokens are those of the models of the long run."""
    found, rows = gathered("depth-*-test.txt"), []
    times = {tuple(row["ckpt"].split("-")[2:4]): row for row in result("depth-latency").get("rows", [])}
    for (budget, layers, kind), runs in found.items():
        first, plain = next(iter(runs.values())), found.get((budget, layers, "plain"), {})
        row = {"budget": budget, "layers": int(layers), "variant": kind, "parameters": first["params"]}
        row |= {"steps": first["step"], "training, s": spread([run["seconds"] for run in runs.values()])}
        row |= {"test perplexity": spread([run["blocks"] for run in runs.values()])}
        ratios = [runs[seed]["blocks"] / plain[seed]["blocks"] for seed in runs if seed in plain]
        row |= {"by plain's": spread(ratios)} if ratios else {}
        if known := times.get((layers, kind)):
            row |= {f"ms, {key}": known[key] for key in ("p5", "median", "p95")}
        rows.append(row)
    return section("Fewer, richer layers", rows, "depth", partial(draw_depth, found))


def draw_depth(found: dict[tuple, dict]) -> Figure:
    """Test perplexity by layers, a point for each seed, for both budgets; and curves of the first seed."""
    budgets = sorted({budget for budget, *_ in found}, reverse=True)  # short, long
    ticks = sorted({int(layers) for _, layers, _ in found})
    drawn, [axes] = plot.grid(1, len(budgets) + 1, 4 * len(budgets) + 4, 4)
    for (budget, layers, kind), runs in sorted(found.items(), key=lambda item: KINDS.index(item[0][-1])):
        place, colour = axes[budgets.index(budget)], plot.COLOURS[KINDS.index(kind)]
        x = int(layers) + 0.06 * (KINDS.index(kind) - 2)
        place.plot([x] * len(runs), [run["blocks"] for run in runs.values()], "o", color=colour, label=kind)
        place.set(xlabel="layers", ylabel="test perplexity", xticks=ticks, title=f"{budget}, a point a seed")
        if budget == budgets[-1] and "val_loss" in runs[min(runs)]:  # else not evaluated on val
            name = f"depth-{budget}-{layers}-{kind}-{min(runs)}"
            at, val, _ = plot.curve(name, "tokens")  # the last is of all of val, the others of a part
            axes[-1].plot(at[:-1], val[:-1], color=colour, lw=0.4 * int(layers) - 1.4)
    axes[-1].set(xlabel="tokens", ylabel="loss on a part of val", title=f"{budgets[-1]}; thick: more layers")
    axes[-1].locator_params(axis="x", nbins=4)  # or the labels of tokens overlap
    labels = {text: mark for mark, text in zip(*axes[0].get_legend_handles_labels())}
    axes[0].legend(labels.values(), labels.keys())
    return drawn


def groups(merges: Iterable[str], shares: Iterable[str]) -> list[str]:
    """Perplexity of each merge by the original's, before and after both were healed."""
    base = {when: result(f"{when}-base") for when in ("before", "after")}
    found = {key: result("-".join(key)) for key in product(base, merges, shares)}
    ratio = {key: known["blocks"] / base[key[0]]["blocks"] for key, known in found.items()}
    missing = {share for (_, _, share), value in ratio.items() if math.isnan(value)}
    sizes = {s: found["before", "ours", s]["kv_bytes_per_token"] for s in shares if s not in missing}
    rows, panels, whole = [], {}, base["before"]["kv_bytes_per_token"]
    for merge in merges if sizes else ():
        rows.append({"cache, bytes a token (of the last row)": merge})
        for share, size in sizes.items():
            before, after = (ratio[when, merge, share] for when in base)
            rows[-1][f"{size:,} ({size / whole:.3f})"] = f"{before:.3f} -> {after:.3f}"
    for when in base:
        lines = {merge: [ratio[when, merge, share] for share in sizes] for merge in merges}
        panels[f"{when} healing"] = [size / whole for size in sizes.values()], lines
    return section("Uneven groups", rows, "groups", partial(draw_ratios, panels))


def draw_ratios(panels: dict[str, tuple[list[float], dict[str, list[float]]]]) -> Figure:
    """{title: (shares of the cache, {label: perplexity ratios})}, a panel for each title."""
    drawn, [axes] = plot.grid(1, len(panels), 8, 5)
    for place, (title, (x, lines)) in zip(axes, panels.items()):
        for (label, y), marker in zip(lines.items(), cycle("os^vDPX*+xd<>ph")):
            place.semilogy(x, y, marker=marker, markersize=5, label=label)
        place.set(xlabel="share of the KV cache", ylabel="perplexity, ratio to the original's", title=title)
        most, marks = max(map(max, lines.values())), (1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 40)
        ticks = [t for t in marks if t == 1 or most**0.05 < t < 1.1 * most]  # labels must not overlap
        place.set_yticks(ticks, [f"{t:g}" for t in ticks])
        place.minorticks_off()
        place.grid()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return drawn


def published(recipes: Iterable[str]) -> list[str]:
    """Both published perplexities of each recipe, and by the original's: merged, then healed by the published
    LoRA or one of alpha 16, and merged after the original was healed."""
    done = [recipe for recipe in recipes if result(f"published-{recipe}-before-sliding")]
    rows, bars = [], defaultdict(list)
    for recipe in done:
        size = result(f"published-{recipe}-before-block_mean")["kv_bytes_per_token"]
        rows.append({"recipe": recipe, "bytes a token of the cache": size})
        for when, way in product(("before", "after", "after16", "first"), ("block_mean", "sliding")):
            base = result(f"published-original-{when.replace('first', 'after')}-{way}")[way]
            ppl = result(f"published-{recipe}-{when}-{way}")[way]
            rows[-1][f"{when}, {way}"] = f"{ppl:.2f} ({ppl / base:.3f})" if ppl == ppl else ""
            bars[f"{when}, {way}"].append(ppl / base)
    titles = {"before": "merged", "after": "healed, alpha 1", "after16": "healed, alpha 16"}
    panels = {f"{title}: perplexity 2, ratio": bars[f"{when}, sliding"] for when, title in titles.items()}
    return section("The published recipe", rows, "published", partial(draw_bars, done, panels, True))


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
    """The scores of each task and way of tuning, what was forgotten, and answers of the first adapters."""
    rows: list[dict] = []
    names = dict(zip(SCORES, SCORES), own="own text, ppl", seconds="training, s")
    for (task, way), seeds in gathered("tuning-*-score.txt").items():
        if not rows or rows[-1]["task"] != task:
            before = result(f"tuning-{task}-before")
            rows.append({"task": task, "tuned": "no", **{key: before[key] for key in ("examples", *SCORES)}})
            rows[-1]["own text, ppl"] = result("tuning-before-own")["blocks"]
        runs = list(seeds.values())
        rows.append({"task": task, "tuned": way, "examples": runs[0]["examples"]})
        rows[-1] |= {new: spread([run[key] for run in runs]) for key, new in names.items()}
        rows[-1]["trainable"] = runs[0]["trainable"]
    yield from section("Tuning", rows)
    for path in sorted(Path().glob("tuning-*-lora8-0/ckpt-answers-*.jsonl")):
        yield f"### {path.parent.name}"
        shown = [(row["input"], row["output"], row["answers"]["ckpt"]) for row in records(path)[1:11]]
        yield "\n\n".join("\n".join(f"> {text!r}" for text in texts) for texts in shown)


def epochs() -> list[str]:
    """What many passes over few examples do to the loss on others, and to the text of before."""
    rows = []
    for log in sorted(Path("logs").glob("few-*-own.txt")):
        name = log.stem.removesuffix("-own")
        at, val, own = plot.curve(name, "epochs")
        least = val.index(min(val))
        row = {"tuned": name.removeprefix("few-"), "least val loss": val[least], "at epoch": at[least]}
        row |= {"last val loss": val[-1], "last training loss": [x for x in own if x == x][-1]}
        rows.append({**row, "own text, ppl": result(log.stem)["blocks"]})
    return section("Few examples, many epochs", rows)


def lengths(tokens: Iterable[int], ways: Iterable[str]) -> list[str]:
    """Time and memory of a step of 4,096 tokens against the length of its texts."""
    rows = []
    for length, way in product(tokens, ways):
        for row in result(f"attention-{way}-{length}").get("rows", []):
            ms = {"training, ms": 4096e3 / row["train_tok_s"], "evaluation, ms": 4096e3 / row["eval_tok_s"]}
            rows.append({"length": length, "attention": way, **ms, "peak": row["peak"]})
    return section("Attention against length", rows, "lengths", partial(draw_lengths, rows))


def draw_lengths(rows: list[dict]) -> Figure:
    """Milliseconds of training and memory by length, a curve for each attention."""
    drawn, [axes] = plot.grid(1, 2, 8, 3.5)
    for way in dict.fromkeys(row["attention"] for row in rows):
        own = [row for row in rows if row["attention"] == way]
        x = [row["length"] for row in own]
        axes[0].plot(x, [row["training, ms"] for row in own], marker="o", label=way)
        axes[1].plot(x, [row["peak"] / 2**20 for row in own], marker="o", label=way)
    for place, title in zip(axes, ("training, ms a step", "peak memory, MiB")):
        place.set(xscale="log", xlabel="tokens of a text", title=title, ylim=(0, None))
        place.set_xticks(x, [f"{length:,}" for length in x])
        place.minorticks_off()
        place.grid()
    axes[0].legend()
    return drawn


def draw_bars(labels: Sequence[str], bars: dict[str, list[float]], ratios=False) -> Figure:
    """A panel of bars, one for each label, for each title; ratios have a logarithmic axis."""
    drawn, [axes] = plot.grid(1, len(bars), 10, 1 + 0.32 * len(labels))
    for place, colour, (title, values) in zip(axes, plot.COLOURS, bars.items()):
        shown = place.barh(labels, values, color=colour)
        place.bar_label(shown, fmt="{:.3f}" if ratios else "{:,.0f}", padding=3, fontsize=8)
        place.set(title=title, xlim=(0, 1.4 * np.nanmax([1, *values])), ylim=(len(labels) - 0.5, -0.5))
        if ratios:
            place.set(xscale="log", xlim=(0.9, 2e4), xticks=(1, 10, 100, 1000))
    return drawn


def printed() -> Iterator[str]:
    """What searches and benchmarks have printed: rows as JSON, or lines."""
    for name in ("objective-*", "*-compare", "depth-pace", "memory*", "attention", "speed-*"):
        for log in sorted(Path("logs").glob(f"{name}.txt")):
            _, *lines = log.read_text().splitlines()
            rows = json.loads(lines[-1])["rows"] if lines[-1].startswith("{") else []
            yield f"### {log.stem}"
            yield table(rows) if rows else "\n".join(["```", *lines, "```"])


def durations() -> list[str]:
    """Minutes of finished steps, summed by the first word of their names, of resumed ones since then."""
    minutes = defaultdict(float)
    for log in sorted(Path("logs").glob("*.txt")):
        begun = min(path.stat().st_mtime for path in log.parent.glob(f"{log.stem}.*"))
        minutes[log.stem.split("-")[0]] += (log.stat().st_mtime - begun) / 60
    rows = [{"steps": name, "minutes": spent} for name, spent in minutes.items()]
    return section("Time", [*rows, {"steps": "all", "minutes": sum(minutes.values())}])


def report(loops: dict[str, dict]) -> None:
    """Write OUT/tables.md and OUT/figures of all that has run."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = [f"{time.strftime('%Y-%m-%d')} | Python {platform.python_version()} | {machine}"]
    text += [*depth(), *groups(loops["merge"], loops["share"]), *published(loops["recipe"]), *tuning()]
    text += [*epochs(), *lengths(map(int, loops["length"]), loops["backend"]), *printed(), *durations()]
    foreign()
    if rows := result("memory").get("rows"):
        bars = {"peak memory of a step, MiB": [row["peak"] / 2**20 for row in rows]}
        bars["tokens/s"] = [row["train_tok_s"] for row in rows]
        plot.save(partial(draw_bars, [r["row"] for r in rows], bars), Path("figures/memory.png"))
    with replacing(Path("tables.md"), "w") as file:
        file.write("\n\n".join(text) + "\n")
