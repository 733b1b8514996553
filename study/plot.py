"""Figures (pip install matplotlib).

    python -m study plot loss out/plain "novel=out/novel" --x tokens  # loss curves; NAME= labels a run
    python -m study plot attention ckpt.pt --text "def add(a, b):"          # attention weights of every head
    python -m study plot similarity ckpt.pt                                 # which heads could share one
    python -m study plot groups ckpt.pt grouped.pt                          # which heads do share one
    python -m study plot together a.json b.json     # how often two heads share one, in what searches found
    python -m study plot architecture ckpt.pt                               # a diagram with the model's sizes

In `loss`, seconds include compilation and exclude evaluation. A run's last point is the whole val split, the
earlier ones are a part of it (`--eval_tokens`). `similarity` is 1 where two heads share one at no cost.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from checkpoint import build, load, model_config
from common import UserError, parse, replacing, require
from gqa import MergeConfig, open_inputs
from model import Llama, ModelConfig, scores
from partition import TINY, Costs
from refit import attention_inputs, statistics
from study.bench import records

# Okabe and Ito's, which colour-blind readers can tell apart
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#b3a700"]
LINES = matplotlib.cycler(linestyle=["-", "--"]) * matplotlib.cycler(color=COLOURS)  # first all colours solid
PALE = [tuple(0.4 + 0.6 * np.array(to_rgb(colour))) for colour in COLOURS]  # under black letters


@dataclass
class PlotConfig:
    """figure"""

    action: Literal["loss", "attention", "similarity", "groups", "together", "architecture"]  # what to draw
    paths: list[str]  # loss: folders of runs, or NAME=FOLDER; together: group files; all others: checkpoints
    out: str | None = None  # .png, .svg or .pdf (default: ACTION.png); beside it a dark one, ACTION-dark.png
    x: Literal["seconds", "tokens", "step", "epochs"] = "seconds"  # loss: the horizontal axis
    train: bool = False  # loss: dashed, the training loss, too: each point the mean since the last
    text: str = "def add(a, b): return a + b"  # attention: the text to read
    dataset: str | None = None  # similarity: prepared data of the same tokenizer (default: its own)


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure twice: for light pages, and for dark ones, NAME-dark."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    for name, ink, paper in (("", "#1f2328", "#ffffff"), ("-dark", "#e6edf3", "#0d1117")):
        style = dict.fromkeys(inked, ink) | {"axes.prop_cycle": LINES}
        style |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), paper)
        style |= {"font.size": 10, "grid.alpha": 0.3, "legend.framealpha": 0.6}
        with matplotlib.rc_context(style), replacing(path.with_stem(path.stem + name), "wb") as file:
            draw().savefig(file, dpi=150, format=path.suffix[1:])


def grid(rows: int, columns: int, width: float = 7, height: float = 4):
    """A figure of width x height inches, and its axes, [row][column]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def curve(folder: str, x: str) -> tuple[tuple, tuple, tuple]:
    """The evaluations of a run's log.jsonl: positions, losses on the val split, nats a token, and the mean
    training loss since the evaluation before (nan if a resumed run has trained no step since)."""
    epoch, position, points, since = math.nan, 0, [], []  # epoch: epochs a step
    for record in records(Path(folder, "log.jsonl")):
        require("step" in record, f"{folder}/log.jsonl is damaged: train anew with --overwrite")
        if "epochs" in record:
            epoch = record["epochs"] / record["train"]["max_steps"]
        position = {**record, "epochs": epoch * record["step"]}.get(x, position)
        if "loss" in record:
            since.append(record["loss"])
        if "val_loss" in record:
            points.append((position, record["val_loss"], np.mean(since) if since else math.nan))
            since = []
    require(points, f"{folder} has no loss on the val split: it comes with --eval_every, --eval_tokens")
    return tuple(zip(*points))


def draw_loss(runs: list[str], x: str, train: bool) -> Figure:
    """A curve for each FOLDER or NAME=FOLDER, with `train` two."""
    figure, [[axes]] = grid(1, 1)
    for run, colour in zip(runs, itertools.cycle(COLOURS)):
        name, _, folder = ("", "", run) if Path(run).is_dir() else run.rpartition("=")
        name, (at, val, own) = name or Path(folder).name, curve(folder, x)
        axes.plot(at, val, marker="o", markersize=3, color=colour, label=name)
        if train:
            axes.plot(at, own, "--", color=colour, label=f"{name}, training")
    axes.set(xlabel=x, ylabel="loss, nats a token" if train else "loss on the val split, nats a token")
    axes.grid()
    axes.legend()
    return figure


@torch.no_grad()
def attention_weights(model: Llama, ids: list[int]) -> torch.Tensor:
    """(layers, H, T, T): how much of its attention each query gives to each token."""
    found = []
    for attention, x, rope, e in attention_inputs(model, torch.tensor([ids])):
        q, k, _ = attention.project(x, *rope, e)
        found.append(scores(q, k, attention.k_groups).softmax(-1)[0].float())
    return torch.stack(found)


def squares(maps, rows: list[str], columns: list[str], label: str = "") -> Figure:
    """maps[row][column], squares of values from 0 to 1; with a label for a bar of their colours."""
    figure, axes = grid(len(rows), len(columns), 1 + 1.2 * len(columns), 1 + 1.2 * len(rows))
    for row, name in enumerate(rows):
        axes[row][0].set_ylabel(name)
        for place, square, title in zip(axes[row], maps[row], columns):
            place.imshow(square, vmin=0, vmax=1, cmap="viridis")
            place.set(xticks=[], yticks=[], title=title * (row == 0))
    if label:
        figure.colorbar(axes[0][0].images[0], ax=axes, label=label, shrink=0.8)
    return figure


def draw_attention(ckpt: str, text: str) -> Figure:
    """A map for each layer and head."""
    model, tokenizer = build(load(ckpt))
    ids, most = tokenizer.prompt(text), min(64, model.config.block_size)
    require(1 <= len(ids) <= most, f"--text has {len(ids)} tokens: give 1 to {most}")
    weights = attention_weights(model, ids).sqrt()  # the square root shows small weights, too
    rows, columns = ([f"{name} {i}" for i in range(n)] for name, n in zip(("layer", "head"), weights.shape))
    figure = squares(weights, rows, columns)
    words = [tokenizer.decode([i]).strip() or "·" for i in ids[:24]]  # more would not be legible
    last = figure.axes[-len(columns)]  # the first of the last row
    last.set_xticks(range(len(words)), words, rotation=90, fontsize=5, parse_math=False)
    figure.suptitle("what each query (row) looks at (column); colour: square root of the weight")
    return figure


def similarity(cost: Costs) -> np.ndarray:
    """(n, n): 1 where two heads share one at no cost, 0 where one of them is lost (or worse: by a mean)."""
    sizes = cost.gram.diagonal(dim1=-2, dim2=-1).real.unflatten(-1, (cost.n, -1)).sum((0, 2)).numpy()
    (a, b), alike = np.tril_indices(cost.n, -1), np.eye(cost.n)
    least = np.maximum(np.minimum(sizes[a], sizes[b]), TINY)
    alike[a, b] = alike[b, a] = 1 - cost(np.stack((a, b), 1)) / least
    return alike.clip(min=0)


def draw_similarity(ckpt: str, dataset: str | None) -> Figure:
    """A map of the K heads and one of the V heads for each layer."""
    _, model, blocks, *_ = open_inputs(MergeConfig(ckpt, dataset=dataset, device="cpu"))
    layers = [(layer.attention, seen) for layer, seen in zip(model.layers, statistics(model, blocks))]
    maps = [[similarity(Costs(attention, kind, seen)) for attention, seen in layers] for kind in "kv"]
    return squares(maps, ["K", "V"], [f"layer {i}" for i in range(len(layers))], "similarity of two heads")


def draw_groups(models: dict[str, ModelConfig]) -> Figure:
    """Two maps, K and V, for each model: layer by query head, coloured and lettered by group."""
    most = max(c.n_layer for c in models.values())
    figure, axes = grid(len(models), 2, 7, 0.6 + (0.6 + 0.22 * most) * len(models))
    for row, (name, c) in zip(axes, models.items()):
        require(not any(c.k_latent + c.v_latent), f"{name} has latents, no groups: python checkpoint.py show")
        for place, kind, maps in zip(row, "KV", (c.k_groups, c.v_groups)):
            place.imshow([[PALE[group % 8] for group in of_head] for of_head in maps], aspect="auto")
            for layer, head in itertools.product(range(c.n_layer), range(c.n_head)):
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": "black"}
                group = maps[layer][head]
                place.text(head, layer, chr(65 + group) if group < 26 else str(group), **style)
            kept = sum(max(of_head) + 1 for of_head in maps)
            place.set(xticks=range(c.n_head), yticks=range(c.n_layer), xlabel="query head", ylabel="layer")
            place.set_title(f"{name}: {kept} of {c.n_layer * c.n_head} {kind} heads", fontsize=9)
            place.label_outer()
    return figure


def draw_together(paths: list[str]) -> Figure:
    """A map of the K and one of the V heads for each layer: the share of the files in which two share one."""
    found = []
    try:
        for path in paths:
            record = json.loads(Path(path).read_text())
            maps = np.array([record["k_groups"], record["v_groups"]])  # (2, layers, H)
            found.append(maps[..., None] == maps[..., None, :])
        shares = np.mean(found, axis=0)
    except Exception:  # a file that is damaged, or models of different shapes
        raise UserError(f"{' '.join(paths)}: give files of search_groups.py for one shape of model") from None
    columns = [f"layer {i}" for i in range(shares.shape[1])]
    return squares(shares, ["K", "V"], columns, f"share of {len(paths)} groupings")


def box(axes, x: float, y: float, text: str, colour: str | tuple, above: float | None = None) -> None:
    """A box centred on (x, y), with an arrow to the box centred on (x, above)."""
    ink = axes.title.get_color()
    style = {"ha": "center", "va": "center", "fontsize": 8, "family": "monospace"}
    style |= {"color": ink if colour == "none" else "black"}
    style |= {"bbox": {"boxstyle": "round,pad=0.5", "ec": ink, "fc": colour}}
    arrow = {"arrowstyle": "-|>", "color": ink, "shrinkB": 12} if above else None
    axes.annotate(text, (x, above or y), (x, y), **style, arrowprops=arrow)


def draw_architecture(c: ModelConfig) -> Figure:
    """The stack of blocks, and which keys and values the heads of its middle layer read."""
    require(not any(c.k_latent + c.v_latent), "the model has latents, no groups: python checkpoint.py show")
    figure, [[axes]] = grid(1, 1, 9, 5.2)
    axes.set(xlim=(0, 18), ylim=(0, 10.6))
    axes.axis("off")
    attention = "attention" + ", novel" * c.novel + ", gated" * c.gated
    stack = ["tokens", f"embedding, {c.vocab_size:,} x {c.dim}", "RMSNorm", attention, "RMSNorm"]
    stack += ["SwiGLU w1 w3 w2", "norm, output" + " = embedding" * c.tie_embeddings, "logits"]
    colours = ["none", "#9ecae1", "none", "#fdd0a2", "none", "#a1d99b", "#9ecae1", "none"]
    for i, (text, colour) in enumerate(zip(stack, colours)):
        box(axes, 3.4, 0.5 + 1.35 * i, f"{text:^27}", colour, 1.85 + 1.35 * i if i < 7 else None)
    line = {"color": axes.title.get_color(), "lw": 1, "marker": "<", "markevery": [3], "markersize": 5}
    for below, above in ((2.45, 5.1), (5.3, 7.8)):  # the residual stream
        axes.plot([3.4, 6, 6, 3.5], [below, below, above, above], **line)
    axes.text(6.2, 7.4, f"x {c.n_layer}", fontsize=10)
    layer, shown = c.n_layer // 2, min(c.n_head, 16)
    k_groups, v_groups = c.k_groups[layer], c.v_groups[layer]
    rows = {"query head": range(shown), "key group": k_groups[:shown], "value group": v_groups[:shown]}
    for i, (name, numbers) in enumerate(rows.items()):
        y = 3.5 + 1.9 * i
        axes.text(8.1, y, name, ha="right", va="center", fontsize=8)
        for head, number in enumerate(numbers):
            x = 8.3 + 9.6 / max(4, shown) * (head + 0.5)
            box(axes, x, y, str(number), PALE[number % 8] if i else "none", y + 1.9 if i < 2 else None)
    kept = f"{max(k_groups) + max(v_groups) + 2} of {2 * c.n_head} heads of width {c.head_dim}"
    axes.text(13, 1.5, f"in layer {layer} the KV cache holds {kept}", ha="center", fontsize=9)
    return figure


def main() -> None:
    config = PlotConfig(**parse(__doc__, PlotConfig))
    out, first = Path(config.out or f"{config.action}.png"), config.paths[0]
    if config.action not in ("loss", "groups", "together") and len(config.paths) > 1:
        raise UserError(f"{config.action} is of one checkpoint, not of {len(config.paths)}: give one")
    require(out.suffix in (".png", ".svg", ".pdf"), f"--out {out}: give a name in .png, .svg or .pdf")
    draw = {
        "loss": lambda: draw_loss(config.paths, config.x, config.train),
        "attention": lambda: draw_attention(first, config.text),
        "similarity": lambda: draw_similarity(first, config.dataset),
        "groups": lambda: draw_groups({path: model_config(load(path)) for path in config.paths}),
        "together": lambda: draw_together(config.paths),
        "architecture": lambda: draw_architecture(model_config(load(first))),
    }[config.action]
    save(draw, out)
    print(f"wrote {out} and, for dark pages, {out.with_stem(out.stem + '-dark')}")
