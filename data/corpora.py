"""Where texts come from (files, this Python's standard library, public corpora) and how they become splits,
{split: pieces}. A piece is a range of bytes of a file, read only when it is needed."""

import ast
import glob
import mmap
import os
import shlex
import shutil
import socket
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, require
from data.loader import BUILT_IN, DATA, SPLITS
from data.tokenizer import Record

SHARES = (0.90, 0.05, 0.05)  # of train, val and test
PATIENCE = 30  # seconds that a server may be silent
GITHUB, HUB = "https://raw.githubusercontent.com/", "https://huggingface.co/datasets/"
STORIES = HUB + "roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-"
DOWNLOADS = {  # name: {address: sha256}
    "shakespeare": {GITHUB + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt":
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    "wikitext2": {HUB + "ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip":
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"},
    "tinystories": {
        STORIES + "train.txt": "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
        STORIES + "valid.txt": "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"},
    "alpaca": {GITHUB + "tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json":
        "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"},
}  # fmt: skip


class Piece(NamedTuple):
    """Bytes start..stop of a text file: one document, or several with `separator` between them."""

    name: str
    path: Path
    start: int
    stop: int
    separator: bytes = b""

    def documents(self) -> Iterator[str]:
        """The texts, without empty ones. Raises UserError for a file that is not UTF-8."""
        data = np.fromfile(self.path, np.uint8, self.stop - self.start, offset=self.start).tobytes()
        parts = [part.strip() for part in data.split(self.separator)] if self.separator else [data]
        try:
            yield from (part.decode() for part in parts if part.strip())
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 ({error.reason}): convert it, iconv -t utf8") from None


def whole_file(path: Path, name: str = "", separator: bytes = b"") -> Piece:
    return Piece(name or path.name, path, 0, path.stat().st_size, separator)


def cut(piece: Piece, mark: bytes, shares: tuple[float, ...]) -> list[Piece]:
    """Consecutive shares of a file, each cut moved on to just behind the next `mark`."""
    with open(piece.path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if piece.stop else b""
    cuts = [data.find(mark, round(share * piece.stop)) for share in accumulate(shares)]
    stops = [place + len(mark) if place >= 0 else piece.stop for place in cuts[:-1]]
    return [piece._replace(start=start, stop=stop) for start, stop in pairwise([0, *stops, piece.stop])]


def split(pieces: list[Piece]) -> dict[str, list[Piece]]:
    """Whole files by a hash of their names, so that none is in two splits; where files are few, or one has
    much of the text, all are cut instead."""
    total = sum(piece.stop for piece in pieces)
    if len(pieces) < 20 or max(piece.stop for piece in pieces) > total / 8:
        parts = [cut(piece, b"\n", SHARES) for piece in pieces]  # [file][split]
        return {name: list(of_split) for name, of_split in zip(SPLITS, zip(*parts))}
    pieces = sorted(pieces, key=lambda piece: sha256(os.fsencode(piece.name)).digest())
    parts = {}
    for name, share in zip(SPLITS[1:], SHARES[1:]):  # train is what remains
        # one huge file would be most of a small split, and the split would measure that file
        limit = max(share * total / 4, 2 * total / len(pieces))
        small = [piece for piece in pieces if piece.stop <= limit]
        before = accumulate((piece.stop for piece in small), initial=0)
        parts[name] = dict.fromkeys(piece for piece, size in zip(small, before) if size < share * total)
        pieces = [piece for piece in pieces if piece not in parts[name]]
    return {"train": sorted(pieces), **{name: list(part) for name, part in parts.items()}}


def own_text(patterns: list[str]) -> list[Piece]:
    """The files that paths and globs name, and folders' visible text files. Raises UserError for no text."""
    found: set[Path] = set()
    for pattern in patterns:
        for path in map(Path, glob.glob(pattern, recursive=True) or [pattern]):
            visible = (f for f in path.rglob("*") if "/." not in f"/{f.relative_to(path).as_posix()}")
            texts = {f for f in visible if f.is_file() and np.fromfile(f, np.uint8, 4096).all()}  # no zeros
            found |= texts if path.is_dir() else {path}
    if not all(patterns) or not any(file.stat().st_size for file in found):
        raise UserError(f"--text {shlex.join(patterns)}: no text there; name UTF-8 files, folders or globs")
    root = os.path.commonpath([file.resolve().parent for file in found])
    return [whole_file(file, file.resolve().relative_to(root).as_posix()) for file in sorted(found)]


def standard_library() -> list[Piece]:
    """Every .py file of this Python's standard library but tests, installed packages and code-page tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # the tables in encodings/ are generated and nearly alike: some in train would give away those in val
    skip = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
    files = [f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts[:-1]) and f.is_file()]
    require(files != [], f"no Python source in {root}: give your own text with --text FILE")
    return [whole_file(file, file.relative_to(root).as_posix()) for file in files]


def docstrings() -> dict[str, list[Record]]:
    """Functions of the standard library, split as in `stdlib`. Code that is in train leaves val and test."""
    found = {name: [*chain(*map(functions, pieces))] for name, pieces in split(standard_library()).items()}
    train = {record["input"] for record in found["train"]}
    return {name: [r for r in found[name] if name == "train" or r["input"] not in train] for name in SPLITS}


def functions(piece: Piece) -> Iterator[Record]:
    """The functions of a file whose docstrings begin with a short paragraph. The question is the code without
    docstring and decorators, at most 500 characters; the answer is that paragraph on one line."""
    text = "".join(piece.documents())
    try:
        tree, lines = ast.parse(text), text.split("\n")
    except SyntaxError:  # a template, not a program
        return
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    for node in filter(ast.get_docstring, found):
        first, *rest = node.body
        code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        code = textwrap.dedent("\n".join(code)).strip()
        summary = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
        if rest and first.end_lineno < rest[0].lineno and len(code) <= 500 and len(summary) <= 120:
            yield {"instruction": "Say what this function does.", "input": code, "output": summary}


def built_in(name: str, files: list[Path]) -> dict[str, list]:
    """The splits of a built-in data set; `files` are what DOWNLOADS names, or their folder. Raises UserError
    for another name, too many files or a damaged one."""
    if name not in BUILT_IN or len(files) > len(DOWNLOADS.get(name, {})):
        what = " ".join([name, *map(str, files)])
        raise UserError(f"no data set {what}: take {', '.join(BUILT_IN)}, or give --text or --from X.json")
    if name == "docstrings":
        return docstrings()
    if name in ("stdlib", "shakespeare"):
        return split([whole_file(file) for file in files] or standard_library())
    folder = files[0]
    if name == "tinystories":
        files = [folder / url.split("/")[-1] for url in DOWNLOADS[name]] if len(files) == 1 else files
        train, valid = (whole_file(file, separator=b"<|endoftext|>") for file in files)
        val, test = cut(valid, valid.separator, (0.5, 0.5))
        return {"train": cut(train, train.separator, (0.01,) * 100), "val": [val], "test": [test]}
    if folder.is_file():
        archive, folder = folder, DATA / "downloads" / "wikitext-2-raw"
        require(zipfile.is_zipfile(archive), f"{archive} is no zip file: give another, or a folder")
        shutil.rmtree(folder, ignore_errors=True)  # what another archive has left
        try:
            shutil.unpack_archive(archive, folder.parent, "zip")
        except Exception as error:
            raise UserError(f"{archive} is damaged: {error}") from None
    files = [folder / f"wiki.{part}.raw" for part in ("train", "valid", "test")]
    return {name: [whole_file(file)] for name, file in zip(SPLITS, files)}


def download(url: str, checksum: str, folder: str | Path) -> Path:
    """Fetch `url` into `folder`, whole, of this sha256; one that is there is used. Raises UserError if it
    cannot be had."""
    path = Path(folder, url.split("/")[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(PATIENCE)  # torch's download has none
    try:
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path), checksum, progress=sys.stderr.isatty())
    except Exception as error:
        raise UserError(f"cannot download {url}: {error}; try again, or give --from") from None
    return path
