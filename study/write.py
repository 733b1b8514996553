"""Let a model write: text to heal its smaller self on, where little other text is at hand.

    python -m study write ckpt.pt own-text --dataset few     # behind beginnings from the train split of `few`
    python data/prepare.py own --text own-text --tokenizer ckpt.pt
    python train.py --init_from latent.pt --teacher ckpt.pt --distil_weight 1 --dataset own --batch_size 4

At temperature 1 a text has the distribution that the model predicts, and there can be as much of it as is
wanted: data-free distillation (arXiv 2305.17888). Each text is a file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import build, load
from common import bounded, parse, pick_device, require
from eval_ppl import split_tokens

BEGIN, MOST = 32, 1024  # tokens of a beginning, and of a text, at most


@dataclass
class TextConfig:
    """writing"""

    ckpt: str  # the checkpoint
    folder: str  # where the texts go
    tokens: int = bounded(2_000_000, 1)  # of texts, their beginnings included, at least
    dataset: str | None = None  # prepared text to take beginnings from (default: they begin with nothing)
    batch_size: int = bounded(64, 1)  # texts written at a time
    seed: int = bounded(0, 0, 2**32 - 1)  # of beginnings and texts
    device: str = "auto"  # cuda, mps, cpu or auto
    overwrite: bool = False  # replace texts in a folder that is there


def main() -> None:
    config = TextConfig(**parse(__doc__, TextConfig))
    device, folder, checkpoint = pick_device(config.device), Path(config.folder), load(config.ckpt)
    require(config.overwrite or not folder.exists(), f"{folder} exists: name a new folder, or --overwrite it")
    model, tokenizer = build(checkpoint, device)
    length, written, rng = min(MOST, model.config.block_size), 0, np.random.default_rng(config.seed)
    B, size = config.batch_size, max(1, min(BEGIN, length // 8))
    begins = [tokenizer.prompt("") or [0]] * B
    if config.dataset:
        ids, name = split_tokens(checkpoint, tokenizer, config.dataset, "train")
        require(len(ids) > size, f"{name} has {len(ids)} tokens: give --dataset of {size + 1} or more")
    generator = torch.Generator(device).manual_seed(config.seed)
    how = {"temperature": 1.0, "stop": tokenizer.stop, "generator": generator}
    with tqdm(total=config.tokens, unit="token", disable=None) as bar:
        while written < config.tokens:
            if config.dataset:
                begins = [ids[at : at + size].tolist() for at in rng.integers(len(ids) - size, size=B)]
            texts = model.generate(begins, length - len(begins[0]), **how)
            if not written:  # only now, for the model may be damaged
                folder.mkdir(parents=True, exist_ok=True)
                for old in folder.glob("[0-9]" * 10 + ".txt"):  # of another length or seed
                    old.unlink()
            for begin, new in zip(begins, texts):
                (folder / f"{written:010}.txt").write_text(tokenizer.decode(begin + new), "utf-8", newline="")
                written += len(begin) + len(new)
                bar.update(len(begin) + len(new))
    print(f"wrote texts of {written:,} tokens, beginnings included, into {folder}")
