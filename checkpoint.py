"""Save and load one-file checkpoints: atomic on the way out, safe and checked on the way in.

A checkpoint is a dict that `torch.load(path, weights_only=True)` reads, and that needs no other file:

    model       the plain state dict, float32
    config      the fields of ModelConfig
    tokenizer   the bytes of the SentencePiece model
    data        the record of the training data: meta.json, with its checksums
    train       the fields of TrainConfig
    step, tokens, seconds    training position: optimizer steps, tokens seen, seconds spent
    optimizers  their state dicts, and `scaler` that of the gradient scaler

There is no random state in it, because none is needed: batches and dropout are functions of (seed, step).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from config import UserError, pick
from model import Llama, ModelConfig
from tokenizer import Tokenizer


@contextmanager
def replacing(path: Path, mode: str) -> Iterator[IO]:
    """A file that takes the place of `path`, whole and on the disk, when the block ends; an error changes nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the one written before is kept" if path.exists() else ""
        raise UserError(f"cannot write {path}: {reason}{kept}") from None


def save(path: Path, checkpoint: dict) -> None:
    """Write `path` whole or not at all. Raises UserError when the disk is full or read-only."""
    with replacing(path, "wb") as file:
        torch.save(checkpoint, file)


def load(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Read a checkpoint without running any code in it. Raises UserError if it is missing, damaged or foreign."""
    path = Path(path)
    if not path.is_file():
        remedy = f"name {path / 'ckpt.pt'}" if (path / "ckpt.pt").exists() else "train one with python train.py"
        raise UserError(f"{path}: no such checkpoint; {remedy}")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # the unpickler raises whatever the bytes of a foreign file make it stumble over
        size = f"{path.stat().st_size:,} bytes"
        raise UserError(f"{path} ({size}) is no checkpoint of train.py, or was cut short in a copy") from None
    keys = {"model": dict, "config": dict, "tokenizer": bytes}
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(k), t) for k, t in keys.items()):
        raise UserError(f"{path} is no checkpoint of train.py: it lacks {', '.join(keys)}")
    return checkpoint


def model_config(checkpoint: dict, **changes) -> ModelConfig:
    """The checkpoint's ModelConfig, with the fields in `changes` replaced. Raises UserError if it cannot be read."""
    settings = {**checkpoint["config"], **changes}
    if unknown := set(settings) - set(pick(ModelConfig, settings)):
        raise UserError(f"the checkpoint has settings that this version does not know: {', '.join(sorted(unknown))}")
    try:
        return ModelConfig(**settings)
    except (TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's config has a value of a wrong type: {error}") from None


def load_weights(model: Llama, checkpoint: dict) -> None:
    """Copy the checkpoint's weights into the model. Raises UserError when one is missing or misshapen."""
    wanted, found = (
        {k: list(v.shape) for k, v in state.items()} for state in (model.state_dict(), checkpoint["model"])
    )
    for name in sorted(wanted | found):
        if wanted.get(name) != found.get(name):
            shapes = f"its config makes {name} {wanted.get(name, 'absent')}, and it holds {found.get(name, 'none')}"
            raise UserError(f"the checkpoint contradicts itself: {shapes}; it is damaged or of another version")
    model.load_state_dict(checkpoint["model"])


def build(checkpoint: dict, device: str | torch.device = "cpu") -> tuple[Llama, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a loaded checkpoint."""
    model = Llama(model_config(checkpoint)).to(device)
    load_weights(model, checkpoint)
    return model.eval(), Tokenizer(checkpoint["tokenizer"])
