"""What the steps of study.py found: its tables (Markdown) and its figures (light, and -dark)."""

import json
import math
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoint import build, load, model_config
from files import replacing
from plot import (
    COLOURS,
    curve,
    draw_architecture,
    draw_attention,
    draw_groups,
    draw_similarity,
    grid,
    save,
    similarities,
)

CODE = "def add(a, b): return a + b"  # what the attention maps read
KINDS = {"": "plain", "-novel": "novel", "-wide": "plain, wider", "-gated": "gated"}
MERGES = {  # the names of study.py
    "random-mean": "random joint groups, mean (one draw)",
    "neighbour-mean": "neighbours, mean (GQA's paper)",
    "best-mean": "best joint groups, mean",
    "neighbour-closed": "neighbours, closed form",
    "ours": "found, closed form, refitted",
}


def result(out: Path, name: str) -> dict | None:
    """The JSON object that a step printed in the end; None if it has not run."""
    path = out / "logs" / f"{name}.txt"
    return json.loads(path.read_text().splitlines()[-1]) if path.exists() else None


def trained(folder: Path) -> dict:
    """What a run's log says in the end: its settings, its last step and its last evaluation."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {key: value for record in records for key, value in record.items()} | {"folder": str(folder)}


def scores(found: dict | None) -> list[str]:
    """loss, BLEU, ROUGE-1 / 2 / L of eval_text.py's object."""
    if not found:
        return [""] * 3
    rouge = " / ".join(f"{found['ckpt'][kind]:.1f}" for kind in ("rouge1", "rouge2", "rougeL"))
    return [f"{found['ckpt']['loss']:.3f}", f"{found['ckpt']['bleu']:.2f}", rouge]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def several(values: list[float]) -> str:
    """31.20 (31.01, 31.39)"""
    each = ", ".join(f"{value:.2f}" for value in values)
    return f"{statistics.mean(values):.2f}" + f" ({each})" * (len(values) > 1)


def both(draw, path: Path) -> None:
    """The figure for light and for dark pages."""
    for dark in (False, True):
        save(draw, path.with_stem(path.stem + "-dark" * dark), dark)


# ---- depth ----


def depth_runs(out: Path) -> dict[tuple[int, str], list[dict]]:
    """{(layers, kind): what each seed's run says, and its `test`}"""
    found = defaultdict(list)
    for log in sorted((out / "logs").glob("depth-*-test.txt")):
        layers, kind, _ = re.fullmatch(r"depth-(\d+)(-[a-z]+)?-(\d+)-test", log.stem).groups()
        run = {**trained(out / log.stem.removesuffix("-test")), "test": result(out, log.stem)}
        found[int(layers), kind or ""].append(run)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], list(KINDS).index(item[0][1]))))


def latency(out: Path, way: str) -> dict[str, dict]:
    """{run, without its seed: how long its texts took}; way: eager, or compiled."""
    rows = (result(out, f"depth-latency-{way}") or {"rows": []})["rows"]
    return {Path(row["ckpt"]).parent.name.rpartition("-")[0]: row for row in rows}


def depth(out: Path) -> Iterator[str]:
    runs, ways = depth_runs(out), {way: found for way in ("eager", "compiled") if (found := latency(out, way))}
    if not ways:
        return
    rows, answers = [], []
    for (layers, kind), each in runs.items():
        name = f"depth-{layers}{kind}"
        times = [found[name] for found in ways.values()]
        rows.append([
            str(layers), KINDS[kind], f"{each[0]['params']:,}",
            f"{statistics.mean(run['seconds'] for run in each) / 60:.1f} min",
            several([math.exp(run["val_loss"]) for run in each]),
            several([run["test"]["blocks"] for run in each]),
            f"{statistics.mean(run['test']['bits_per_byte'] for run in each):.4f}",
            *(f"{time['median']:.1f} ({time['p5']:.1f} to {time['p95']:.1f})" for time in times),
        ])  # fmt: skip
        answers.append([str(layers), KINDS[kind], *scores(result(out, f"{name}-score"))])
    yield "### Fewer, richer layers\n"
    first = next(iter(runs.values()))[0]
    yield f"{first['step']} steps, {first['tokens']:,} tokens, one run after the other, compiling counted; the mean and"
    yield f"each seed; all of val, of test {first['test']['tokens']:,} tokens; milliseconds for 64 tokens of one text,"
    yield "float32, all models in turns, first seed: median (p5 to p95). Answers: first seed, too, tuned alike.\n"
    head = ["layers", "variant", "parameters", "training", "val perplexity", "test perplexity", "test bits per byte"]
    yield table([*head, *(f"ms, {way}" for way in ways)], rows)
    yield table(["layers", "variant", "answers: test loss", "BLEU", "ROUGE-1 / 2 / L"], answers)
    yield from ratios_to_plain(runs)
    both(lambda: draw_depth(runs, list(ways.items())[-1]), out / "figures" / "depth.png")


def ratios_to_plain(runs: dict) -> Iterator[str]:
    for kind in ("-novel", "-wide", "-gated"):
        ratios = {
            n: [a["test"]["blocks"] / b["test"]["blocks"] for a, b in zip(runs[n, kind], runs[n, ""])]
            for n, k in runs if k == kind and (n, "") in runs
        }  # fmt: skip
        every = [ratio for found in ratios.values() for ratio in found]
        if every:
            each = "; ".join(f"{n} layers {', '.join(f'{r:.4f}' for r in found)}" for n, found in ratios.items())
            yield f"Test perplexity of {KINDS[kind]} by that of plain, each seed: {each}."
            spread = f", standard deviation {statistics.stdev(every):.4f}" if len(every) > 1 else ""
            yield f"Mean {statistics.mean(every):.4f}{spread}, over {len(every)} pairs.\n"


def draw_depth(runs: dict, latency: tuple[str, dict]):
    figure, [[left, right]] = grid(1, 2, 8, 4)
    way, times = latency
    for number, (kind, label) in enumerate(KINDS.items()):
        points = [(times[f"depth-{n}{k}"]["median"], [r["test"]["blocks"] for r in each], n)
                  for (n, k), each in runs.items() if k == kind]  # fmt: skip
        if points:
            x, y = [ms for ms, _, _ in points], [statistics.mean(values) for _, values, _ in points]
            spread = [[m - min(v) for m, (_, v, _) in zip(y, points)], [max(v) - m for m, (_, v, _) in zip(y, points)]]
            left.errorbar(x, y, spread, marker="o", capsize=3, label=label, color=COLOURS[number])
            for ms, mean, (_, _, n) in zip(x, y, points):
                left.annotate(str(n), (ms, mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
    label = f"milliseconds for 64 tokens, {way}"
    left.set(xlabel=label, ylabel="test perplexity (bars: seeds)", title="numbers are layers")
    layers = sorted({n for n, _ in runs})
    for (n, kind), each in runs.items():
        if kind in ("", "-novel"):
            style = {"color": COLOURS[list(KINDS).index(kind)], "lw": 0.6 + 0.6 * layers.index(n), "alpha": 0.7}
            tokens, loss = curve(each[0]["folder"], "tokens")
            right.plot([count / 1000 for count in tokens], loss, **style)
    right.set(
        xlabel="thousand tokens", ylabel="val loss, nats a token", title="first seed; the more layers, the thicker"
    )
    for axes in (left, right):
        axes.grid()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), fontsize=9)
    return figure


# ---- groups ----


def groups(out: Path) -> Iterator[str]:
    original = {when: result(out, f"{when}-base") for when in ("before", "after")}
    shares = [share for share in ("3of4", "2of3", "1of2", "1of3", "1of4") if result(out, f"after-ours-{share}")]
    if not shares or None in original.values():
        return
    cells = {(m, when, s): result(out, f"{when}-{m}-{s}") for m in MERGES for when in original for s in shares}
    ratios = {key: cell["blocks"] / original[key[1]]["blocks"] for key, cell in cells.items() if cell}
    kept = {s: cells["ours", "before", s]["kv_bytes_per_token"] for s in shares}
    for (merge, when, share), cell in cells.items():
        assert cell["kv_bytes_per_token"] == kept[share], f"{merge} at {share} {when} healing keeps another cache"
    whole = original["before"]["kv_bytes_per_token"]
    yield "### Uneven groups\n"
    before, after = (original[when]["blocks"] for when in original)
    yield f"Perplexity of the original {before:.4f}, healed alike {after:.4f}, on {original['before']['tokens']:,} test"
    yield f"tokens; {whole:,} bytes a token in its cache. Ratios before healing are to the one, after to the other.\n"
    head = ["bytes a token of the cache", *(f"{kept[s]:,} ({kept[s] / whole:.3f})" for s in shares)]
    rows = [
        [MERGES[m], *(f"{ratios[m, 'before', s]:.3f} -> {ratios[m, 'after', s]:.3f}" for s in shares)] for m in MERGES
    ]
    yield table(head, rows)
    yield from objectives(out)
    titles = {"before": "before healing", "after": "after, original healed alike (other scale)"}
    x = [kept[s] / whole for s in shares]
    panels = {titles[when]: (x, {MERGES[m]: [ratios[m, when, s] for s in shares] for m in MERGES}) for when in original}
    both(lambda: draw_ratios(panels), out / "figures" / "groups.png")
    models = {f"{s.replace('of', '/')} of the cache": model_config(load(out / f"ours-{s}.pt")) for s in shares}
    both(lambda: draw_groups(models), out / "figures" / "heads.png")
    found = similarities(str(out / "base" / "ckpt.pt"))
    both(lambda: draw_similarity(found), out / "figures" / "similarity.png")
    both(lambda: draw_attention(*build(load(out / "base" / "ckpt.pt")), CODE), out / "figures" / "attention.png")
    middle = models[f"{shares[len(shares) // 2].replace('of', '/')} of the cache"]
    both(lambda: draw_architecture(middle), out / "figures" / "architecture.png")


def objectives(out: Path) -> Iterator[str]:
    """The published objective, over all budgets: the best grouping that each search found, baselines aside."""
    rows = []
    for name, label in (("random", "random joint groups, closed form"), ("ours", "knapsack, closed form, wo refitted")):
        if (path := out / f"{name}.json").exists():
            record = json.loads(path.read_text())
            found = [row for row in record["judged"] if row["name"].startswith("found")]
            value, best = min((math.exp(row["loss"]) * row["groups"] ** 2, i) for i, row in enumerate(found))
            cells = f"{found[best]['groups']:g}", f"{math.exp(found[best]['loss'] - record['original_loss']):.4f}"
            rows.append([label, str(record["evals"]), *cells, f"{value:,.0f}"])
    if rows:
        head = ["search for the least ppl x groups^2", "groupings looked at", "K/V heads", "ppl, ratio, before healing"]
        yield table([*head, "ppl x groups^2"], rows)


def draw_ratios(panels: dict[str, tuple[list[float], dict[str, list[float]]]]):
    """{title: (shares of the cache, {label: perplexity ratios})}, a panel for each title."""
    figure, axes = grid(1, len(panels), 8, 5)
    for place, (title, (x, lines)) in zip(axes[0], panels.items()):
        for (label, y), marker in zip(lines.items(), "os^vDPX*+x"):
            place.plot(x, y, marker=marker, markersize=5, label=label)
        place.set(
            xlabel="share of the KV cache", ylabel="perplexity, ratio to the original's", title=title, yscale="log"
        )
        most = max(max(y) for y in lines.values())
        marks = (1, 1.02, 1.05, 1.1, 1.2, 1.3) if most < 1.4 else (1, 1.2, 1.5, 2, 3, 5, 10, 20, 40)
        ticks = [mark for mark in marks if mark < 1.1 * most]
        place.set_yticks(ticks, [f"{t:g}" for t in ticks])
        place.minorticks_off()
        place.grid()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def foreign(out: Path) -> Iterator[str]:
    """compare_groups.py's tables as they are, and as figures."""
    panels = {}
    for name in ("stories260K", "aidreams260K"):
        if not (log := out / "logs" / f"{name}-compare.txt").exists():
            continue
        lines = log.read_text().splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
        yield f"### {name}\n"
        yield "On text that it wrote itself, at temperature 1; random groups are one draw; no healing."
        yield next(line for line in lines if line.startswith("perplexity")) + "\n"
        yield "\n".join(line for line in lines if line.startswith("|")) + "\n"
        shares = [float(share) for share in rows[0][1:]]
        panels[f"{name}, on its own text"] = shares, {row[0]: [float(cell) for cell in row[1:]] for row in rows[2:]}
    if panels:
        both(lambda: draw_ratios(panels), out / "figures" / "foreign.png")


# ---- tuning, attention, speed ----


def tuning(out: Path) -> Iterator[str]:
    rows = []
    for log in (out / "logs").glob("tuning-*-score.txt"):
        name = log.stem.removesuffix("-score")
        run, size = trained(out / f"{name}-answers"), (out / f"{name}-answers" / "ckpt.pt").stat().st_size / 1e6
        sizes = [f"{run['trainable']:,}", f"{size:.1f} MB", f"{run['seconds'] / 60:.1f} min"]
        peak = f"{run['peak_memory_bytes'] / 2**30:.2f} GiB"
        rows.append([name.removeprefix("tuning-"), *sizes, peak, *scores(result(out, log.stem))])
    if rows:
        yield "### Tuning\n"
        head = ["", "trainable", "checkpoint", "training", "process's peak", "test loss", "BLEU", "ROUGE-1 / 2 / L"]
        rows.sort(key=lambda row: (-int(row[1].replace(",", "")), row[0]))
        yield table(head, [["before", "", "", "", "", *scores(result(out, "tuning-before"))], *rows])
    if memory := result(out, "tuning-memory"):
        peaks = {name: row["peak"] / 2**20 for name, row in memory["rows"].items()}
        rate = {name: row["tokens_per_s"] for name, row in memory["rows"].items()}
        yield table(["", "peak, MiB", "tokens/s"], [[n, f"{peaks[n]:,.1f}", f"{rate[n]:,.0f}"] for n in peaks])
        both(lambda: draw_bars({"peak memory of a step, MiB": peaks, "tokens/s": rate}), out / "figures" / "memory.png")


def draw_bars(panels: dict[str, dict[str, float]]):
    figure, axes = grid(1, len(panels), 8, 1 + 0.32 * max(map(len, panels.values())))
    same = len({tuple(bars) for bars in panels.values()}) == 1
    for number, (place, (title, bars)) in enumerate(zip(axes[0], panels.items())):
        shown = place.barh(list(bars), list(bars.values()), color=COLOURS[number])
        place.bar_label(shown, fmt="{:,.0f}", padding=3, fontsize=8)
        place.set(title=title, xlim=(0, 1.25 * max(bars.values())))
        place.invert_yaxis()
        place.tick_params(labelleft=number == 0 or not same)
    return figure


def attention(out: Path) -> Iterator[str]:
    if found := result(out, "attention"):
        yield "### Attention\n"
        yield f"A QLoRA run each, one after the other, {found['bench']['steps'] * 10} steps; texts in turns.\n"
        yield table(["attention", "pretraining_tp", "val loss", "training", "a step", "peak", "100 tokens"], [
            [row["attention"], str(row["pretraining_tp"]), f"{row['val_loss']:.6f}", f"{row['training_s']:.1f} s",
             f"{row['step_ms']:.0f} ms", f"{row['peak'] / 2**20:.0f} MiB", f"{row['generation_s']:.3f} s"]
            for row in found["rows"]
        ])  # fmt: skip


def speed(out: Path) -> Iterator[str]:
    if not (out / "logs" / "speed-peers.txt").exists():
        return
    yield "### Speed\n"
    lines = (out / "logs" / "speed-peers.txt").read_text().splitlines()
    yield "\n".join(line for line in lines if line.startswith("|")) + "\n"
    if shares := result(out, "speed-parts").get("shares"):
        yield table(list(shares), [[f"{100 * share:.1f}%" for share in shares.values()]])
    decoded = result(out, "speed-decode")["rows"]
    yield table(["K/V heads", "KV cache", "a token of all texts", "speed"], [
        [str(row["heads"]), f"{row['cache_bytes'] / 2**20:.1f} MiB", f"{row['ms']:.1f} ms", f"{row['ratio']:.2f} x"]
        for row in decoded
    ])  # fmt: skip
    records = defaultdict(list)
    for record in map(json.loads, (out / "speed.jsonl").read_text().splitlines()):
        records[record["row"]].append(record)
    both(lambda: draw_speed(records), out / "figures" / "speed.png")


def draw_speed(records: dict[str, list[dict]]):
    """Bars of the medians of what compare_speed.py has measured."""
    keys = {"train_tok_s": "training, tokens/s", "tok_s": "text, tokens/s"}
    panels = {
        title: {row: statistics.median(r[key] for r in each) for row, each in records.items() if key in each[0]}
        for key, title in keys.items()
    }
    return draw_bars(panels)


def report(out: Path) -> None:
    """Write OUT/tables.md and OUT/figures of all that has run."""
    (out / "figures").mkdir(exist_ok=True)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    text = [f"{time.strftime('%Y-%m-%d')} | {platform.processor() or platform.machine()} | {versions}\n"]
    for section in (depth, groups, foreign, tuning, attention, speed):
        text += section(out)
        with replacing(out / "tables.md", "w") as file:
            file.write("\n".join(text))
