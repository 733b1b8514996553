"""Files of other programs: what reading them may raise, and how a folder is written whole or not at all.

Bytes that another program wrote are read inside `reading`, the one place that turns what a library raises for
damaged bytes into a line for the user. The readers check only what would give a wrong model without an error.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from checkpoint import check_tensors, map_file
from common import UserError, require

Settings, Weights = dict[str, object], dict[str, torch.Tensor]


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """A block that reads `path` as `what`; what damaged bytes raise becomes a UserError that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{'' if str(path) in str(error) else f'{path}: '}{error}") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError, ImportError):  # clear enough
        raise
    except Exception as error:  # whatever the bytes make the libraries stumble over
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).strip()
        reason = (reason or type(error).__name__).split("\n")[0][:160]
        raise UserError(f"{path} is damaged or no {what}: {reason}") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    with reading(path, "JSON file"):
        content = json.loads(path.read_bytes())
        require(isinstance(content, dict), "it holds no object")
        return content


def read_tensors(path: Path) -> Weights:
    """The tensors of a .safetensors or torch.save file, mapped: a page takes memory once it is used."""
    with reading(path, "file of tensors"):
        if path.suffix == ".safetensors":
            import safetensors.torch

            weights = safetensors.torch.load_file(path)
        else:
            weights = {name: x.detach() for name, x in map_file(path).items()}
        check_tensors(weights, path.stat().st_size)
        return weights


def check_finite(weights: Weights, path: Path) -> None:
    """Raise UserError if a tensor holds inf or nan; it takes no memory."""
    for name, x in weights.items():
        require(all(bound.isfinite() for bound in x.aminmax()), f"{path} is damaged: {name} is not finite")


def write_folder(folder: Path, files: dict[str, Weights | bytes | dict]) -> None:
    """Write a new or empty folder of tensors (.safetensors), bytes and JSON, whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: give another name, or delete it first")
    folder = folder.resolve()
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as temporary:
            partial = Path(temporary) / folder.name
            partial.mkdir()
            for name, content in files.items():
                path = partial / name
                if path.suffix == ".safetensors":
                    one = {x.data_ptr(): name for name, x in content.items()}  # layers may share tensors
                    content = {n: x if one[x.data_ptr()] == n else x.clone() for n, x in content.items()}
                    save_file(content, path, {"format": "pt"})
                    path.chmod(0o666 & partial.stat().st_mode)  # the library lets only the owner read it
                elif isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    path.write_text(json.dumps(content, indent=2) + "\n")
            partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from None
