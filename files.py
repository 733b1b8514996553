"""Files that appear whole or not at all, folders that one process writes at a time, and checksums."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from config import UserError

CHUNK = 1 << 24  # bytes read at a time


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
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk, and Ctrl-C, into a RuntimeError
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the one written before is kept" if path.exists() else ""
        raise UserError(f"cannot write {path}: {reason}{kept}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, made if need be. However this one ends, nothing is left
    behind. Raises UserError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another process: wait until it ends, or name another folder") from None
    except OSError:  # a file system that knows no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def writable(path: Path, overwrite: bool) -> None:
    """Raise UserError if `path` is a folder, or a file that must not be replaced."""
    if path.is_dir() or (path.exists() and not overwrite):
        remedy = f"name a file, such as {path / 'model.pt'}" if path.is_dir() else "give another name, or --overwrite"
        raise UserError(f"{path} exists: {remedy}")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
