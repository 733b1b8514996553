"""Figures from the logs that runs leave: validation loss against time, tokens or steps (needs matplotlib).

    python plot.py out/plain out/novel --out loss.png
    python plot.py "plain=out/plain" "novel=out/novel" --against tokens --out loss.png       # with names of your own

Time is that of training alone, what compiling takes included and evaluations not. The last point is of the whole val
split in float32, those before it of some of it (`--eval_tokens`) in the number format of the run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import UserError, exit_cleanly, parse

LABELS = {"seconds": "seconds of training", "tokens": "tokens", "step": "steps"}


@dataclass
class PlotConfig:
    """figure"""

    runs: list[str]  # folders of runs, or NAME=FOLDER
    out: str = "loss.png"  # the file to write; its ending says the format: png, svg, pdf
    against: Literal["seconds", "tokens", "step"] = "seconds"  # the horizontal axis


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
        raise UserError(f"{path} has no loss on the val split: let the run come to --eval_every steps")
    steps = sorted(points.keys() & reached.keys())
    return [reached[step] for step in steps], [points[step] for step in steps]


def main() -> None:
    config = PlotConfig(**parse(__doc__, PlotConfig))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    if Path(config.out).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {config.out}: give a name that ends in .png, .svg or .pdf")
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    for run in config.runs:
        name, _, folder = ("", "", run) if Path(run).is_dir() else run.rpartition("=")
        axes.plot(*curve(folder, config.against), marker="o", markersize=3, label=name or Path(folder).name)
    axes.set(xlabel=LABELS[config.against], ylabel="loss on the val split, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(config.out, dpi=150)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    exit_cleanly(main)
