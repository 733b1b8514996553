"""Where texts come from (files, this Python's standard library, public corpora) and how they become splits.

A corpus is {split: pieces}. A piece is a range of bytes of a file, read only when it is needed.
"""

import ast
import glob
import mmap
import os
import shutil
import sysconfig
import textwrap
import time
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from http.client import HTTPException
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

from tqdm import tqdm

from common import UserError, note, sha256_of
from data.loader import DATA, SPLITS
from data.tokenizer import Record

CHUNK = 1 << 24  # bytes of a large file that are read at a time
SHARES = (0.90, 0.05, 0.05)  # of train, val and test
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
        """The texts, without empty ones."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.stop - self.start)
        parts = [part.strip() for part in data.split(self.separator)] if self.separator else [data]
        try:
            yield from (part.decode() for part in parts if part.strip())
        except UnicodeDecodeError as error:
            remedy = f"convert it, for instance with: iconv -f latin1 -t utf-8 {self.path}"
            raise UserError(f"{self.path} is not UTF-8 ({error}): {remedy}") from None


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
    """Whole files by a hash of their names, so that none is in two splits; few files are cut instead."""
    if len(pieces) < 20:
        return dict(zip(SPLITS, map(list, zip(*(cut(piece, b"\n", SHARES) for piece in pieces)))))
    pieces = sorted(pieces, key=lambda piece: sha256(piece.name.encode()).digest())
    total, parts = sum(piece.stop for piece in pieces), {}
    for name, share in list(zip(SPLITS, SHARES))[1:]:  # train is what remains
        size, parts[name] = 0, []
        # one huge file would be most of a small split, and the split would measure that file
        limit = max(share * total / 4, 2 * total / len(pieces))
        for piece in [piece for piece in pieces if piece.stop <= limit]:
            if size < share * total:
                parts[name].append(piece)
                pieces.remove(piece)
                size += piece.stop
    return {"train": sorted(pieces, key=lambda piece: piece.name), **parts}


def own_text(patterns: list[str]) -> list[Piece]:
    """The files that paths and globs name, and in folders all text files, except hidden and binary ones."""

    def is_text(file: Path, folder: Path) -> bool:
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") or part == "__pycache__" for part in parts):
            return False
        with open(file, "rb") as content:
            return b"\0" not in content.read(4096)

    found: set[Path] = set()
    for pattern in patterns:
        for path in map(Path, glob.glob(pattern, recursive=True) or [pattern]):
            found |= {file for file in path.rglob("*") if is_text(file, path)} if path.is_dir() else {path}
    if not any(file.stat().st_size for file in found):
        raise UserError(f"--text {' '.join(patterns)}: no text there; name UTF-8 files, folders or globs")
    root = os.path.commonpath([file.resolve().parent for file in found])
    return [whole_file(file, file.resolve().relative_to(root).as_posix()) for file in sorted(found)]


def standard_library() -> list[Piece]:
    """Every .py file of this Python's standard library but tests, installed packages and code-page tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # the tables in encodings/ are generated and nearly alike: some in train would give away those in val
    skip = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
    files = [f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts[:-1]) and f.is_file()]
    if not files:
        raise UserError(f"no Python source in {root}: give your own text with --text FILE")
    return [whole_file(file, file.relative_to(root).as_posix()) for file in files]


def docstrings() -> dict[str, list[Record]]:
    """Functions of the standard library and their purpose, each in the split of its file in `stdlib`, so that
    a model trained on that has not read the questions. Code that is also in train leaves val and test."""
    splits = split(standard_library())
    found = {name: [r for piece in splits[name] for r in functions(piece)] for name in SPLITS}
    train = {record["input"] for record in found["train"]}
    return {name: [r for r in found[name] if name == "train" or r["input"] not in train] for name in SPLITS}


def functions(piece: Piece, longest: int = 500) -> Iterator[Record]:
    """The functions of a file whose docstrings begin with a short paragraph. The question is the code without
    docstring and decorators, at most `longest` characters; the answer is that paragraph on one line."""
    text = "".join(piece.documents())
    try:
        tree, lines = ast.parse(text), text.split("\n")
    except SyntaxError:  # a template, not a program
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
            continue
        first, *rest = node.body
        code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        code = textwrap.dedent("\n".join(code)).strip()
        summary = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
        if rest and first.end_lineno < rest[0].lineno and len(code) <= longest and len(summary) <= 120:
            yield {"instruction": "Say what this function does.", "input": code, "output": summary}


def downloaded(name: str) -> list[Path]:
    """The files of a public corpus, downloaded if need be."""
    return [download(*file, DATA / "downloads") for file in DOWNLOADS[name].items()]


def public_corpus(name: str, source: Path | None) -> dict[str, list[Piece]]:
    """The splits of a public corpus, downloaded or from a local copy: a file, or the folder of its files."""
    paths, names = [source] if source else downloaded(name), [url.split("/")[-1] for url in DOWNLOADS[name]]
    if name == "wikitext2":
        return wikitext(paths[0])
    if source and source.is_dir():
        paths = [source / file for file in names]
    if len(paths) < len(names):
        raise UserError(f"--from {source}: give the folder of {' and '.join(names)}")
    if name == "shakespeare":
        return split([whole_file(paths[0])])
    mark = b"<|endoftext|>"
    train, valid = (whole_file(path, separator=mark) for path in paths)
    count = 1 + train.stop // CHUNK
    val, test = cut(valid, mark, (0.5, 0.5))
    return {"train": cut(train, mark, (1 / count,) * count), "val": [val], "test": [test]}


def wikitext(path: Path) -> dict[str, list[Piece]]:
    """WikiText-2's own splits, from its zip file or the folder in it."""
    names = [f"wiki.{part}.raw" for part in ("train", "valid", "test")]
    if not path.is_dir():
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(DATA / "downloads", [f"wikitext-2-raw/{name}" for name in names])
        except Exception as error:
            raise UserError(f"{path} is damaged or not WikiText-2's zip file: {error}") from None
        path = DATA / "downloads" / "wikitext-2-raw"
    return {split: [whole_file(path / name)] for split, name in zip(SPLITS, names)}


def download(url: str, checksum: str, folder: Path) -> Path:
    """Fetch `url` into `folder`, continuing a broken download, and verify it; one that is there is used."""
    path = folder / url.split("/")[-1]
    part = folder / f"{path.name}.part"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(5):
        have = part.stat().st_size if part.exists() else 0
        request = Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "herd"})
        try:
            with urlopen(request, timeout=30) as response:
                mode = "ab" if response.status == 206 else "wb"  # a server without ranges begins again
                bar = tqdm.wrapattr(response, "read", total=response.length, desc=path.name, disable=None)
                with open(part, mode) as file, bar as body:
                    shutil.copyfileobj(body, file)
                if response.length:
                    raise ConnectionError(f"{response.length:,} bytes are missing")
            break
        except (OSError, HTTPException) as error:
            if getattr(error, "code", 0) == 416 and have:  # nothing is left to send
                break
            if attempt == 4 or getattr(error, "code", 0) in (403, 404):
                hint = f"try again later, or get the file another way and give --from {path.name}"
                raise UserError(f"cannot download {url}: {error}; {hint}") from None
            note(f"download interrupted ({error}); trying again")
            time.sleep(2**attempt)
    if (found := sha256_of(part)) != checksum:
        part.unlink()
        raise UserError(f"{url}: its sha256 is {found}, not {checksum}; try again, or use --from")
    return part.rename(path)
