"""What every script shares: flags from dataclasses, one-line errors, the device, files that appear whole.

A script's settings are a flat dataclass, its docstring their heading in `--help`. Field `n_layer` is the flag
`--n_layer`, the comment after it its help; without a default it is positional. End with `exit_cleanly(main)`.

    flags = parse(__doc__, ModelConfig, TrainConfig)      # only what the user typed: {field name: value}
    config = ModelConfig(**pick(ModelConfig, flags))
"""

import argparse
import ctypes
import dataclasses
import fcntl
import hashlib
import inspect
import math
import os
import re
import resource
import shutil
import signal
import sys
import sysconfig
import time
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

IGNORE = -1  # a target that carries no loss
POSITIONAL, NO_FLAG = {"flag": "positional"}, {"flag": "none"}  # metadata of a field


class UserError(ValueError):
    """A mistake of the user's: one line that says what was wrong and which flag or command mends it."""


def require(condition: bool, message: str) -> None:
    """Raise UserError unless the condition holds; unlike an assert, under `python -O`, too."""
    if not condition:
        raise UserError(message)


# ---- settings ----


def bounded(default, low: float, high: float = 2**62):
    """A dataclass field whose number must lie in low..high; None, where the type allows it, has no bounds."""
    return dataclasses.field(default=default, metadata={"bounds": (low, high)})


def is_a(value: object, kind: object) -> bool:
    """Whether a value has a type such as int, float | None, Literal["a", "b"] or list[list[int]]."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(is_a(value, k) for k in args)
    if origin is typing.Literal:
        return value in args
    if origin in (list, dict):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(is_a(item, args[-1]) for item in items)
    return type(value) is kind or (kind is float and type(value) is int)


def check_bounds(cls: type, values: dict) -> None:
    """Raise UserError for a number out of its field's bounds, or an empty name."""
    for field in dataclasses.fields(cls):
        value, (low, high) = values.get(field.name), field.metadata.get("bounds", (-math.inf, math.inf))
        name = field.name.rstrip("_")
        empty = value in ("", [""]) and field.default != ""
        require(not empty, f"{name} is empty: give it a value, or leave --{name} out")
        if isinstance(value, int | float) and not low <= value <= high:  # nan fails, too
            limit = f"{low} or more" if high == 2**62 else f"{low} to {high}"
            raise UserError(f"{name} is {repr(value)[:80]}: give --{name} {limit}")


def checked(cls: type, values: dict):
    """cls(**values). Raises UserError for an unknown name, a wrong type, a number out of bounds."""
    kinds = typing.get_type_hints(cls)
    for name, value in values.items():
        sound = name in kinds and is_a(value, kinds[name])
        require(sound, f"{str(name)[:80]} {repr(value)[:80]} is no setting here: a damaged file?")
    check_bounds(cls, values)
    return cls(**values)


def pick(cls: type, values: dict) -> dict:
    """The items of a dict that are fields of `cls`."""
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def add_flags(parser: Parser, cls: type) -> None:
    """Give the parser one argument for each field of `cls`."""
    source = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c))
    comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.+)$", source, re.MULTILINE))
    kinds, group = typing.get_type_hints(cls), parser.add_argument_group(cls.__doc__)
    for field in [field for field in dataclasses.fields(cls) if field.metadata != NO_FLAG]:
        assert field.name in comments, f"{cls.__name__}.{field.name} has no comment behind it"
        options: dict = {"help": comments[field.name].replace("%", "%%")}
        if field.default not in (dataclasses.MISSING, None):
            options["help"] += f" (default: {field.default})"
        kind, positional = kinds[field.name], field.default is dataclasses.MISSING
        if isinstance(kind, types.UnionType):  # `int | None`: None means "derive it", and cannot be typed
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is list:
            kind, options["nargs"] = typing.get_args(kind)[0], "+"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options["type"] = kind
        if field.metadata == POSITIONAL:
            positional, options["nargs"] = True, "?"
        # `from` is a Python keyword, so its field is called `from_`
        group.add_argument(field.name if positional else "--" + field.name.rstrip("_"), **options)


def parse(doc: str, *classes: type) -> dict:
    """{field name: value} for what the user typed, and nothing for what they left at its default."""
    how = {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **how)
    for cls in classes:
        add_flags(parser, cls)
    typed = vars(parser.parse_intermixed_args())
    values = {("from_" if name == "from" else name): value for name, value in typed.items()}
    for cls in classes:
        check_bounds(cls, values)
    return values


def note(text: str) -> None:
    """One line on stderr, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


def exit_cleanly(main: typing.Callable[[], None]) -> None:
    """Call main(); a user's mistake, a full disk or too little memory is one line on stderr and exit 2."""
    sys.argv[0] = os.path.basename(sys.argv[0].removesuffix("/__main__.py"))
    sys.stdout.reconfigure(errors="replace")  # letters that the terminal lacks become ?
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        secondary = isinstance(error, RuntimeError) or os.environ.get("RANK", "0") != "0"
        if "TORCHELASTIC_RUN_ID" in os.environ and secondary:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py has caught it
            time.sleep(5)  # torchrun ends all processes once one has failed: let the root cause report first
        message = str(error).strip().split("\n")[0] or type(error).__name__
        too_large = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if too_large or "DefaultCPUAllocator: can't allocate memory" in message:
            message = f"out of memory: try a smaller batch, context, calibration or model ({message[:160]})"
        elif not isinstance(error, UserError | OSError | ModuleNotFoundError):
            raise  # a bug keeps its traceback
        how = " (pip install it)" * isinstance(error, ModuleNotFoundError)
        print(f"{sys.argv[0]}: error: {message}{how}", file=sys.stderr)
        sys.exit(2)


# ---- the machine ----


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises UserError for a device that is not here."""
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    here = ["cuda", *(f"cuda:{i}" for i in range(gpus))] if gpus else []
    here += ["mps"] * (torch.backends.mps.is_available() and processes == 1) + ["cpu"]
    require(name in ["auto", *here], f"--device {name} is not here; this machine has {', '.join(here)}")
    device = torch.device(here[0] if name == "auto" else name)
    if device.type == "cuda" and processes > 1 and (device.index is not None or processes > gpus):
        remedy = f"give --nproc_per_node {gpus} and --device cuda, or --device cpu"
        raise UserError(f"{processes} processes on --device {device} need a GPU each: {remedy}")
    if device.type == "cpu" and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc gives freed blocks back, and mapping the next step's tensors anew takes a sixth of a training
        # step: let it keep them (M_MMAP_MAX, M_TRIM_THRESHOLD)
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of matrix products; weights, norms, softmax sums and the loss stay in float32. `auto` is
    bfloat16 where the hardware multiplies it (recent GPUs; CPUs with AVX512-BF16 or AMX; emulated, it is
    slower than float32), float16 on older GPUs, and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype` inside this context; float32 and float64 switch it off."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def compiler_missing(device: torch.device) -> str | None:
    """What torch.compile and Triton need and do not find here; None if all is there."""
    names = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    if device.type == "cuda":  # as Triton looks for one
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    header = Path(sysconfig.get_path("include"), "Python.h")
    if device.type == "mps" or (any(map(shutil.which, names)) and header.exists()):
        return None
    return f"a compiler ({' or '.join(names)}) and {header} (python3-dev)"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    if peak := re.search(r"VmHWM:\s+(\d+)", status):  # unlike getrusage's, it can be reset; gVisor has none
        return 1024 * int(peak[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if status else 1)  # bytes on macOS


# ---- files ----


def lock(file: typing.IO | int) -> None:
    """Lock an open file or folder until it is closed. Raises BlockingIOError if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks, as some clusters have


@contextmanager
def replacing(path: Path, mode: str) -> Iterator[typing.IO]:
    """A file that takes the place of `path`, whole and on the disk, when the block ends; an error changes
    nothing. Raises UserError for a full or read-only disk, and while another process writes `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, opener=lambda name, how: os.open(name, how & ~os.O_TRUNC, 0o666)) as file:
            lock(file)
            if not os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                raise BlockingIOError  # its owner has renamed it: it is `path` by now
            try:
                file.truncate(0)  # only now: O_TRUNC would empty what another writes
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink()
                raise
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # or a power failure could undo the replacement
        os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a full disk, and Ctrl-C, into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        cause = OSError("another process writes it") if isinstance(cause, BlockingIOError) else cause
        if isinstance(cause, OSError):
            raise UserError(f"cannot write {path}: {cause}; a file that was there is kept") from None
        raise (cause if isinstance(cause, KeyboardInterrupt) else error) from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, made if need be, until the block or this process
    ends. Raises UserError if another has it."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another process: wait for it, or name another") from None
    try:
        yield
    finally:
        if made and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()  # a mistake leaves no empty run
        os.close(descriptor)


def writable(path: Path, overwrite: bool) -> None:
    """Raise UserError if `path` is a folder, a file that must not be replaced, or where none can be made."""
    taken = path.is_dir() or (path.exists() and not overwrite)
    require(not taken, f"{path} exists: give the name of a new file, or --overwrite one")
    parent = next(folder for folder in path.resolve().parents if folder.exists())
    require(parent.is_dir() and os.access(parent, os.W_OK), f"cannot write in {parent}: name another")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
