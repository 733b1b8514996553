"""Figures (pip install matplotlib).

    python plot.py loss out/plain "novel=out/novel" --against tokens   # of runs, with names of your own where given
    python plot.py attention ckpt.pt --text "def add(a, b):"           # what each head looks at
    python plot.py similarity ckpt.pt                                  # which K heads, which V heads could share one
    python plot.py groups ckpt.pt grouped.pt                           # which do
    python plot.py architecture ckpt.pt                                # the model, with its sizes

In `loss`, time is that of training alone, what compiling takes included and evaluations not. The last point is of the
whole val split in float32, those before it of some of it (`--eval_tokens`) in the number format of the run.
`similarity` is that of merging.py, 1 where two heads share one at no cost, over some text of the train split.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from attention import scores
from checkpoint import build, load, model_config
from config import UserError, exit_cleanly, parse
from eval_ppl import split_tokens
from gqa import calibration_blocks, open_model
from merging import Costs, rope_of, statistics
from model import Llama, ModelConfig
from tokenizer import Tokenizer, read_tokenizer

LABELS = {"seconds": "seconds of training", "tokens": "tokens", "step": "steps"}
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#b3a700"]  # Okabe and Ito's
PAPER, INK = {False: "#ffffff", True: "#0d1117"}, {False: "#1f2328", True: "#e6edf3"}  # of light and of dark pages


@dataclass
class PlotConfig:
    """figure"""

    action: Literal["loss", "attention", "similarity", "groups", "architecture"]  # what to draw
    paths: list[str]  # folders of runs, or NAME=FOLDER, for loss; checkpoints for all others
    out: str | None = None  # the file to write, .png, .svg or .pdf (default: ACTION.png)
    against: Literal["seconds", "tokens", "step"] = "seconds"  # loss: the horizontal axis
    text: str = "The heads of a layer look at other words."  # attention: what is read
    dark: bool = False  # light on dark


def check(path: Path) -> None:
    """Raise UserError without matplotlib, or for a file that it does not write."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib: pip install matplotlib")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {path}: give a name that ends in .png, .svg or .pdf")


def save(draw: Callable, path: Path, dark: bool) -> None:
    """Write the figure that draw() makes."""
    import matplotlib

    ink, paper = INK[dark], PAPER[dark]
    places = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colours = {**dict.fromkeys(places, ink), "figure.facecolor": paper, "axes.facecolor": paper}
    colours |= {"legend.facecolor": paper, "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "grid.alpha": 0.3}
    with matplotlib.rc_context({**colours, "font.size": 10, "legend.framealpha": 0.6}):
        draw().savefig(path, dpi=150)


def grid(rows: int, columns: int, width: float = 7, height: float = 4):
    """A figure of inches, and its axes, [row][column]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


# ---- loss ----


def curve(folder: str, against: str) -> tuple[list[float], list[float]]:
    """The points of a run's log.jsonl: how far it was, and the loss on the val split there, nats a token."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        raise UserError(f"{folder} has no log.jsonl: give the folder of a run, out/RUN")
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]  # a running one may be writing the last
    reached = {record["step"]: record.get(against, 0) for record in records if "loss" in record}
    points = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    if not points.keys() & reached.keys():
        raise UserError(f"{path} has no loss on the val split: it comes every --eval_every steps, with --eval_tokens")
    steps = sorted(points.keys() & reached.keys())
    return [reached[step] for step in steps], [points[step] for step in steps]


def draw_loss(runs: dict[str, str], against: str):
    """{name: folder} -> the figure"""
    figure, [[axes]] = grid(1, 1)
    for name, folder in runs.items():
        axes.plot(*curve(folder, against), marker="o", markersize=3, label=name)
    axes.set(xlabel=LABELS[against], ylabel="loss on the val split, nats a token")
    axes.grid()
    axes.legend()
    return figure


def named(runs: list[str]) -> dict[str, str]:
    """out/a -> {"a": "out/a"}, and NAME=out/a -> {NAME: "out/a"}"""
    parted = [("", "", run) if Path(run).is_dir() else run.rpartition("=") for run in runs]
    short = len({Path(folder).name for _, _, folder in parted}) == len(parted)
    return {name or (Path(folder).name if short else folder): folder for name, _, folder in parted}


# ---- heads ----


@torch.no_grad()
def attention_weights(model: Llama, ids: list[int]) -> torch.Tensor:
    """(layers, H, T, T): how much of its attention each query gives to each token."""
    tokens, found = torch.tensor([ids], device=model.tok_embeddings.weight.device), []
    rope, x = rope_of(model, tokens), model.tok_embeddings(tokens)
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool, device=tokens.device).tril()
    for layer in model.layers:
        q, k, _ = layer.attention.project(layer.attention_norm(x), *rope)
        found.append(scores(q, k, layer.attention.k_groups, causal).softmax(-1)[0].float())
        x = layer(x, *rope)
    return torch.stack(found).cpu()


def draw_attention(model: Llama, tokenizer: Tokenizer, text: str):
    ids = tokenizer.prompt(text)
    if not 1 <= len(ids) <= min(64, model.config.block_size):
        raise UserError(f"--text has {len(ids)} tokens: give 1 to {min(64, model.config.block_size)} of them")
    weights, words = attention_weights(model.eval(), ids), [tokenizer.decode([i]).strip() or "·" for i in ids]
    rows, columns = weights.shape[:2]
    figure, axes = grid(rows, columns, 1 + 1.1 * columns, 1 + 1.1 * rows)
    for (layer, head), square in zip(((i, j) for i in range(rows) for j in range(columns)), weights.flatten(0, 1)):
        place = axes[layer][head]
        place.imshow(square.sqrt(), vmin=0, vmax=1, cmap="viridis")  # the square root: to see small weights, too
        place.set(xticks=[], yticks=[], title=f"head {head}" * (layer == 0), ylabel=f"layer {layer}" * (head == 0))
    if len(ids) <= 24:
        size = 7 if len(ids) <= 12 else 5
        axes[-1][0].set_xticks(range(len(ids)), words, rotation=90, fontsize=size, parse_math=False)
        axes[-1][-1].set_yticks(range(len(ids)), words, fontsize=size, parse_math=False)
        axes[-1][-1].yaxis.tick_right()
    figure.suptitle("what each query (row) looks at (column); colour: square root of the weight")
    return figure


def similarities(path: str) -> dict[str, list]:
    """{"k" or "v": the similarity of the heads of each layer, (G, G)} of a checkpoint's model."""
    checkpoint, model = open_model(path, "cpu")
    text, _ = split_tokens(checkpoint, read_tokenizer(checkpoint["tokenizer"]), None, "train")
    found = statistics(model, calibration_blocks(text, model, 65536, 0))
    layers = list(zip((layer.attention for layer in model.layers), found))
    return {kind: [Costs(attention, kind, seen).similarity() for attention, seen in layers] for kind in "kv"}


def draw_similarity(found: dict[str, list]):
    count = len(found["k"])
    figure, axes = grid(2, count, 1 + 1.4 * count, 3.6)
    for row, kind in enumerate("kv"):
        for layer, square in enumerate(found[kind]):
            place = axes[row][layer]
            image = place.imshow(square, vmin=0, vmax=1, cmap="viridis")
            heads = range(0, len(square), max(1, len(square) // 4))
            place.set(xticks=heads, yticks=heads, title=f"{kind.upper()}, layer {layer}")
    figure.colorbar(image, ax=axes, label="similarity of two heads", shrink=0.8)
    return figure


def pale(group: int) -> tuple[float, ...]:
    """A group's colour, light enough for black letters."""
    return tuple(0.4 + 0.6 * int(COLOURS[group % 8][i : i + 2], 16) / 255 for i in (1, 3, 5))


def draw_groups(models: dict[str, ModelConfig]):
    """A row of two maps, K and V, for each; a cell is a query head, its colour and letter the group that it reads."""
    most = max(c.n_layer for c in models.values())
    figure, axes = grid(len(models), 2, 7, 0.6 + (0.6 + 0.22 * most) * len(models))
    for row, (name, c) in enumerate(models.items()):
        for column, (kind, maps) in enumerate((("K", c.k_groups), ("V", c.v_groups))):
            place, kept = axes[row][column], sum(max(of_head) + 1 for of_head in maps)
            place.imshow([[pale(group) for group in of_head] for of_head in maps], aspect="auto")
            for layer, of_head in enumerate(maps):
                for head, group in enumerate(of_head):
                    letter = chr(65 + group) if group < 26 else str(group)
                    place.text(head, layer, letter, ha="center", va="center", fontsize=8, color="black")
            place.set(xticks=range(c.n_head), yticks=range(c.n_layer), ylabel="layer" * (column == 0))
            place.set_title(f"{name}: {kept} of {c.n_layer * c.n_head} {kind} heads", fontsize=9)
    for place in axes[-1]:
        place.set_xlabel("query head")
    return figure


# ---- architecture ----


def box(axes, x: float, y: float, text: str, width: float = 4.0, colour="none") -> None:
    from matplotlib.patches import FancyBboxPatch

    edge, height = axes.title.get_color(), 0.7
    shape = FancyBboxPatch((x - width / 2, y - height / 2), width, height, "round,pad=0.06", ec=edge, fc=colour)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if colour != "none" else edge)


def arrow(axes, x: float, y: float, to_x: float, to_y: float) -> None:
    how = {"arrowstyle": "-|>", "color": axes.title.get_color(), "lw": 1}
    axes.annotate("", (to_x, to_y), (x, y), arrowprops=how)


def draw_stack(axes, c: ModelConfig) -> None:
    """A block, and what stands around it."""
    from matplotlib.patches import FancyBboxPatch

    blue, orange, green = "#9ecae1", "#fdd0a2", "#a1d99b"
    stack = [
        (0.5, "tokens", "none"), (1.7, f"embedding, {c.vocab_size:,} x {c.dim}", blue), (3.2, "RMSNorm", "none"),
        (4.3, "attention over head groups", orange), (6.2, "RMSNorm", "none"), (7.3, "SwiGLU w1 w3 w2", green),
        (8.9, "RMSNorm, output" + " = embedding" * c.tie_embeddings, blue), (10.1, "next token", "none"),
    ]  # fmt: skip
    for (y, text, colour), following in zip(stack, [*stack[1:], None]):
        box(axes, 3.4, y, text, colour=colour)
        if following:
            arrow(axes, 3.4, y + 0.42, 3.4, following[0] - 0.42)
    for below, above in ((2.45, 5.05), (5.5, 8.1)):  # the residual stream
        axes.plot([3.4, 5.65, 5.65], [below, below, above], color=axes.title.get_color(), lw=1)
        arrow(axes, 5.65, above, 3.4, above)
    axes.add_patch(FancyBboxPatch((0.9, 2.4), 5.1, 5.8, "round,pad=0.1", ec="#888888", fc="none", ls="--"))
    axes.text(6.3, 7.6, f"x {c.n_layer}", fontsize=10)


def draw_layer(axes, c: ModelConfig, layer: int) -> None:
    """Which key and value group each of its heads reads."""
    shown = min(c.n_head, 16)
    step = 9.6 / max(4, shown)
    for name, y, of_head in (("query head", 3.2, range(c.n_head)), ("key group", 5.2, c.k_groups[layer]),
                             ("value group", 7.0, c.v_groups[layer])):  # fmt: skip
        axes.text(8.1, y, name, ha="right", va="center", fontsize=8)
        for head in range(shown):
            colour = "none" if name == "query head" else pale(of_head[head])
            box(axes, 8.3 + step * (head + 0.5), y, str(of_head[head]), step * 0.55, colour)
    for head in range(shown):
        x = 8.3 + step * (head + 0.5)
        arrow(axes, x, 3.65, x, 4.75)
        arrow(axes, x, 5.65, x, 6.55)
    extra = [f"SiLU(linear {c.head_dim} x {c.head_dim})"] * c.novel + ["sigmoid gate"] * c.gated
    outputs = "softmax(q k) v" + " | on each head: " * bool(extra) + ", ".join(extra) + " | wo adds the heads up"
    cached = sum(max(groups[layer]) + 1 for groups in (c.k_groups, c.v_groups))
    cache = f"the KV cache keeps {cached} of {2 * c.n_head} heads of width {c.head_dim} in this layer"
    axes.text(13.0, 8.5, outputs, ha="center", fontsize=8)
    axes.text(13.0, 1.9, f"layer {layer}: which keys and values each head reads", ha="center", fontsize=9)
    axes.text(13.0, 1.2, cache, ha="center", fontsize=8)


def draw_architecture(c: ModelConfig):
    """The stack on the left, the attention of its middle layer on the right."""
    figure, [[axes]] = grid(1, 1, 9, 5.2)
    axes.set(xlim=(0, 18), ylim=(0, 10.6))
    axes.axis("off")
    draw_stack(axes, c)
    draw_layer(axes, c, c.n_layer // 2)
    return figure


# ---- the command ----


def main() -> None:
    config = PlotConfig(**parse(__doc__, PlotConfig))
    out = Path(config.out or f"{config.action}.png")
    if config.action not in ("loss", "groups") and len(config.paths) > 1:
        raise UserError(f"{config.action} is of one checkpoint, not of {len(config.paths)}: give one")
    check(out)
    first = config.paths[0]
    if config.action == "loss":
        save(lambda: draw_loss(named(config.paths), config.against), out, config.dark)
    elif config.action == "attention":
        model, tokenizer = build(load(first))
        save(lambda: draw_attention(model, tokenizer, config.text), out, config.dark)
    elif config.action == "similarity":
        found = similarities(first)
        save(lambda: draw_similarity(found), out, config.dark)
    elif config.action == "groups":
        models = {path: model_config(load(path)) for path in config.paths}
        save(lambda: draw_groups(models), out, config.dark)
    else:
        c = model_config(load(first))
        save(lambda: draw_architecture(c), out, config.dark)
    print(f"wrote {out}")


if __name__ == "__main__":
    exit_cleanly(main)
