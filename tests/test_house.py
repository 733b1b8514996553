"""The rooms of this repository: what each may import, and how large it may grow."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

CHAPTER = ["common", "model", "flash_attention", "parallel", "muon", "nf4", "lora", "checkpoint", "train"]
CHAPTER += ["eval_ppl", "sample", "refit", "partition", "gqa", "search_groups"]  # each imports earlier ones
FORMATS = {"common", "model", "nf4", "lora", "checkpoint", "data.tokenizer"}
ALLOWED = {"": {"data.tokenizer", "data.loader"}, "data": {"common"}, "formats": FORMATS}  # the study: all
CLOSURES = {"train": (11, 2742), "sample": (7, 1601), "eval_ppl": (8, 1823)}  # modules and lines, all imports
ROOMS = {"": (15, 4028), "data": (6, 759), "formats": (7, 925), "study": (12, 1868), "tests": (23, 4782)}
CHAPTER_BYTES, README_BYTES, FILE_LINES, WIDTH = 224_715, 20_000, 606, 110

PATHS = {f"{room}.{path.stem}".strip("."): path for room in ROOMS for path in (ROOT / room).glob("*.py")}
TEXTS = {name: path.read_text("utf-8") for name, path in PATHS.items()}
OF_ROOM = {room: [name for name in TEXTS if name.rpartition(".")[0] == room] for room in ROOMS}


def imports(name: str) -> set[str]:
    """Our modules that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(TEXTS[name])):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {*base, *(".".join([*base, alias.name]) for alias in node.names)}
    return found & TEXTS.keys()


GRAPH = {name: imports(name) for room in ROOMS if room != "tests" for name in OF_ROOM[room]}


def test_modules_import_what_their_rooms_may_and_in_no_circle():
    for room, allowed in ALLOWED.items():
        for name in OF_ROOM[room]:
            assert room or name in CHAPTER, f"{name}.py: list it in CHAPTER, or move it to another folder"
            others = OF_ROOM[room] if room else CHAPTER[: CHAPTER.index(name)]
            assert GRAPH[name] <= {*allowed, *others}, f"{name}: {GRAPH[name] - {*allowed, *others}}"
    TopologicalSorter(GRAPH).prepare()  # raises CycleError
    rooms = {room for room in ROOMS if (ROOT / room / "__init__.py").exists()}
    assert rooms == {"data", "formats", "study"}, "else an installed package of that name would be imported"


def test_nothing_is_larger_than_its_limit():
    def closure(name: str) -> set[str]:
        return {name}.union(*(closure(other) for other in GRAPH[name]))

    lines, over = {name: text.splitlines() for name, text in TEXTS.items()}, {}
    for what, limits in (ROOMS | CLOSURES).items():
        names = closure(what) if what in CLOSURES else OF_ROOM[what]
        size = len(names), sum(len(lines[name]) for name in names)
        over |= {f"room, or imports of {what}": size for a, b in zip(size, limits) if a > b}
    over |= {n: len(of) for n, of in lines.items() if len(of) > FILE_LINES or max([0, *map(len, of)]) > WIDTH}
    size = sum(len(TEXTS[name].encode()) for name in CHAPTER), (ROOT / "README.md").stat().st_size
    assert not over and size[0] <= CHAPTER_BYTES and size[1] <= README_BYTES, f"{over}, bytes {size}"
