"""Tables (Markdown) and figures, light and dark, of what the steps of run.py left in OUT."""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median, stdev

import torch
from matplotlib.figure import Figure

from common import replacing
from study import plot

KINDS = ("plain", "novel", "wide", "gated")
MERGES = ("random-mean", "neighbour-mean", "best-mean", "neighbour-closed", "ours")
SHARES = ("3of4", "2of3", "1of2", "1of3", "1of4")
BY_PLAIN = "test perplexity by plain's"


def result(out: Path, name: str) -> dict:
    """The JSON object on the last line of a step's log; empty if the step has not run."""
    path = out / "logs" / f"{name}.txt"
    return json.loads(path.read_text().splitlines()[-1]) if path.exists() else {}


def trained(folder: Path) -> dict:
    """The last value of everything in a run's log: its settings, its last step and its last evaluation."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {key: value for record in records for key, value in record.items()}


def table(rows: list[dict]) -> str:
    """Keys are the headings."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys)]
    for row in rows:
        cells = [row.get(key, "") for key in keys]
        lines.append([f"{x:.6g}" if isinstance(x, float) else str(x) for x in cells])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def figure(out: Path, name: str, draw: Callable[..., Figure], *args) -> None:
    """The figure draw(*args), for light and for dark pages."""
    for dark in (False, True):
        plot.save(lambda: draw(*args), out / "figures" / f"{name}{'-dark' * dark}.png", dark)


def answers(out: Path, name: str) -> dict:
    """The scores of a step of `study score`; none if it has not run."""
    found = result(out, name).get("ckpt", {})
    return {f"answers, {key}": found[key] for key in ("loss", "bleu", "rouge1", "rouge2", "rougeL") if found}


def depth(out: Path) -> Iterator[str]:
    """A row for each run; the times, ms for 64 tokens, and the answers are those of the first seed."""
    timed, rows = {}, []
    for way in ("eager", "compiled"):
        for row in result(out, f"depth-latency-{way}").get("rows", []):
            timed[Path(row["ckpt"]).parent.name, way] = row
    for log in (out / "logs").glob("depth-*-test.txt"):
        name = log.stem.removesuffix("-test")
        _, layers, *kind, seed = name.split("-")
        run, test = trained(out / name), result(out, log.stem)
        row = {"layers": int(layers), "variant": "".join(kind) or "plain", "seed": int(seed)}
        row |= {"parameters": run["params"], "training, s": run["seconds"]}
        row |= {"val perplexity": math.exp(run["val_loss"]), "test perplexity": test["blocks"]}
        row["test bits per byte"] = test["bits_per_byte"]
        for (of, way), ms in timed.items():
            row |= {f"{key}, {way}": ms[key] for key in ("p5", "median", "p95") if of == name}
        rows.append({**row, **answers(out, f"{name.removesuffix('-0')}-score")})
    if not timed or not rows:
        return
    plain = {(row["layers"], row["seed"]): row for row in rows if row["variant"] == "plain"}
    for row in rows:
        row[BY_PLAIN] = row["test perplexity"] / plain[row["layers"], row["seed"]]["test perplexity"]
    rows.sort(key=lambda row: (row["layers"], KINDS.index(row["variant"]), row["seed"]))
    yield "### Fewer, richer layers\n"
    yield table(rows)
    ratios = [row[BY_PLAIN] for row in rows if row["variant"] == "novel"]
    if len(ratios) > 1:
        yield f"novel by plain: mean {mean(ratios):.4f}, deviation {stdev(ratios):.4f}, {len(ratios)} pairs\n"
    figure(out, "depth", draw_depth, out, rows)


def draw_depth(out: Path, rows: list[dict]) -> Figure:
    """Test perplexity against milliseconds, and the curves of the first seed."""
    drawn, [[left, right]] = plot.grid(1, 2, 8, 4)
    way = "median, compiled" if "median, compiled" in rows[0] else "median, eager"
    for row in [row for row in rows if way in row]:  # of the first seed
        layers, kind, colour = row["layers"], row["variant"], plot.COLOURS[KINDS.index(row["variant"])]
        seeds = [r["test perplexity"] for r in rows if (r["layers"], r["variant"]) == (layers, kind)]
        left.plot([row[way]] * len(seeds), seeds, marker="o", color=colour)
        left.text(row[way], max(seeds), f"{layers} {kind}", fontsize=8)
        name = f"depth-{layers}-{kind}-0".replace("-plain", "")
        right.plot(*plot.curve(str(out / name), "tokens"), color=colour, lw=0.4 * layers - 1.4)
    left.set(xlabel=f"ms for 64 tokens, {way}", ylabel="test perplexity", title="a point for each seed")
    right.set(xlabel="tokens", ylabel="val loss, nats a token", title="first seed; thicker: more layers")
    return drawn


def groups(out: Path) -> Iterator[str]:
    """Perplexity of each merge by the original's, before and after both were healed."""
    shares = [share for share in SHARES if result(out, f"after-ours-{share}")]
    if not shares:
        return

    def ratios(when: str, merge: str) -> list[float]:
        original = result(out, f"{when}-base")["blocks"]
        return [result(out, f"{when}-{merge}-{share}")["blocks"] / original for share in shares]

    whole = result(out, "before-base")["kv_bytes_per_token"]
    kept = [result(out, f"before-ours-{share}")["kv_bytes_per_token"] for share in shares]
    panels, rows = {}, []
    for when in ("before", "after"):
        lines = {merge: ratios(when, merge) for merge in MERGES}
        panels[f"{when} healing"] = [size / whole for size in kept], lines
    for merge in MERGES:
        row = {"bytes a token of the cache": merge}
        for size, before, after in zip(kept, *(lines[merge] for _, lines in panels.values())):
            row[f"{size:,} ({size / whole:.3f})"] = f"{before:.3f} -> {after:.3f}"
        rows.append(row)
    yield "### Uneven groups\n"
    yield table(rows)
    figure(out, "groups", draw_ratios, panels)


def objectives(out: Path) -> Iterator[str]:
    """The published objective, over all budgets: the best grouping that each search found."""
    rows = []
    for path in [path for path in (out / "random.json", out / "ours.json") if path.exists()]:
        record = json.loads(path.read_text())
        best = next(row for row in record["judged"] if row["name"].startswith("found"))
        ppl, original = math.exp(best["loss"]), math.exp(record["original_loss"])
        row = {"search for the least ppl x groups^2": path.stem, "groupings looked at": record["evals"]}
        row |= {"K/V heads": best["groups"], "ppl, ratio, before healing": ppl / original}
        rows.append({**row, "ppl x groups^2": ppl * best["groups"] ** 2})
    if rows:
        yield table(rows)


def draw_ratios(panels: dict[str, tuple[list[float], dict[str, list[float]]]]) -> Figure:
    """{title: (shares of the cache, {label: perplexity ratios})}, a panel for each title."""
    drawn, [axes] = plot.grid(1, len(panels), 8, 5)
    for place, (title, (x, lines)) in zip(axes, panels.items()):
        for (label, y), marker in zip(lines.items(), "os^vDPX*+x"):
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


def foreign(out: Path) -> Iterator[str]:
    """The tables of compare-groups as they are, and as a figure."""
    panels = {}
    for log in sorted((out / "logs").glob("*260K-compare.txt"), reverse=True):
        name, lines = log.stem.removesuffix("-compare"), log.read_text().splitlines()
        head, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        yield f"### {name}\n"
        yield next(line for line in lines if line.startswith("perplexity")) + "\n"
        yield "\n".join(line for line in lines if line.startswith("|")) + "\n"
        ratios = {label: list(map(float, cells)) for label, *cells in rows}
        panels[f"{name}, on its own text"] = list(map(float, head[1:])), ratios
    if panels:
        figure(out, "foreign", draw_ratios, panels)


def tuning(out: Path) -> Iterator[str]:
    rows = []
    for log in sorted((out / "logs").glob("tuning-*-score.txt")):
        name = log.stem.removesuffix("-score")
        run, size = trained(out / f"{name}-answers"), (out / f"{name}-answers" / "ckpt.pt").stat().st_size
        row = {"": name.removeprefix("tuning-"), "trainable": run["trainable"], "checkpoint, bytes": size}
        row |= {"training, s": run["seconds"], "process's peak, bytes": run["peak_memory_bytes"]}
        rows.append({**row, **answers(out, log.stem)})
    if rows:
        yield "### Tuning\n"
        yield table([*rows, {"": "before", **answers(out, "tuning-before")}])
    memory = result(out, "tuning-memory").get("rows")
    if memory:
        yield table([{"": name, **row} for name, row in memory.items()])
        bars = {"peak memory of a step, MiB": {name: row["peak"] / 2**20 for name, row in memory.items()}}
        bars["tokens/s"] = {name: row["tokens_per_s"] for name, row in memory.items()}
        figure(out, "memory", draw_bars, bars)


def draw_bars(panels: dict[str, dict[str, float]]) -> Figure:
    """{title: {label: value}}, a panel for each title."""
    drawn, [axes] = plot.grid(1, len(panels), 10, 1 + 0.32 * max(map(len, panels.values())))
    for place, colour, (title, bars) in zip(axes, plot.COLOURS, panels.items()):
        shown = place.barh(list(bars), list(bars.values()), color=colour)
        place.bar_label(shown, fmt="{:,.0f}", padding=3, fontsize=8)
        place.set(title=title, xlim=(0, 1.25 * max(bars.values())))
        place.invert_yaxis()
    return drawn


def speed(out: Path) -> Iterator[str]:
    """The tables of `study attention`, compare-speed, train and decode."""
    if found := result(out, "attention"):
        yield "### Attention\n"
        yield table(found["rows"])
    log = out / "logs" / "speed-peers.txt"
    if not log.exists():
        return
    yield "### Speed\n"
    yield "\n".join(line for line in log.read_text().splitlines() if line.startswith("|")) + "\n"
    yield table(result(out, "speed-parts")["rows"])
    yield table(result(out, "speed-decode")["rows"])
    records, bars = [json.loads(line) for line in (out / "speed.jsonl").read_text().splitlines()], {}
    for key, title in (("train_tok_s", "training, tokens/s"), ("tok_s", "text, tokens/s")):
        names = dict.fromkeys(record["row"] for record in records if key in record)
        bars[title] = {name: median(r[key] for r in records if r["row"] == name) for name in names}
    figure(out, "speed", draw_bars, bars)


def report(out: Path) -> None:
    """Write OUT/tables.md and OUT/figures of all that has run."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = [f"{time.strftime('%Y-%m-%d')} | Python {platform.python_version()} | {machine}\n"]
    for section in (depth, groups, objectives, foreign, tuning, speed):
        text += section(out)
    with replacing(out / "tables.md", "w") as file:
        file.write("\n".join(text))
