"""Dataclass fields become command-line flags; mistakes become one clear line.

A script describes its settings as a flat dataclass. Each field is a flag of the same name (`n_layer` -> `--n_layer`),
the comment behind the field is its `--help`, a field without a default is a positional argument (one marked
POSITIONAL may be left out), a bool makes a `--flag/--no-flag` pair, and a `Literal` lists the choices. Every script
ends with `exit_cleanly(main)`.

    flags = parse(__doc__, ModelConfig, TrainConfig)      # a dict of only what the user typed
    config = ModelConfig(**pick(ModelConfig, flags))
"""

import argparse
import dataclasses
import difflib
import inspect
import io
import os
import re
import signal
import sys
import time
import types
import typing

POSITIONAL, NO_FLAG = {"flag": "positional"}, {"flag": "none"}  # what a field's metadata may say


class UserError(ValueError):
    """A mistake of the user's: one line that says what was wrong and which flag or command mends it."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of argparse's page of usage, with the nearest flag when one was misspelt."""
        for word in re.findall(r"--\w+", message) if "unrecognized" in message else []:
            near = difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.8)
            message += f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{message} (--help lists the flags)")


def comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass: {field name: comment}."""
    return dict(re.findall(r"^    (\w+): [^#\n]*# (.+)$", inspect.getsource(cls), re.MULTILINE))


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Give the parser one argument for each field of `cls`."""
    types_of, help_of = typing.get_type_hints(cls), comments(cls)
    group = parser.add_argument_group(cls.__doc__)
    for field in dataclasses.fields(cls):
        if field.metadata == NO_FLAG:
            continue
        assert field.name in help_of, f"{cls.__name__}.{field.name} has no comment on its line"
        positional = field.default is dataclasses.MISSING or field.metadata == POSITIONAL
        shown = "" if field.default in (dataclasses.MISSING, None) else f" (default: {field.default})"
        options: dict = {"help": help_of[field.name].replace("%", "%%") + shown}
        kind = types_of[field.name]
        if isinstance(kind, types.UnionType):  # `int | None`: None means "derive it", and cannot be typed
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            options |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:
            options["type"] = kind
        if field.metadata == POSITIONAL:
            options["nargs"] = "?"
        # `from` is a Python keyword, so its field is called `from_`
        group.add_argument(field.name if positional else "--" + field.name.rstrip("_"), **options)


def parse(doc: str, *classes: type, argv: list[str] | None = None) -> dict:
    """Return {field name: value} for what the user typed, and nothing for what they left at its default."""
    parser = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    for cls in classes:
        add_flags(parser, cls)
    return {
        ("from_" if name == "from" else name): value for name, value in vars(parser.parse_intermixed_args(argv)).items()
    }


def pick(cls: type, values: dict) -> dict:
    """The part of a dict that are fields of `cls`."""
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}


def let_the_cause_speak_first(error: Exception) -> None:
    """Wait, if torchrun started several processes, which it ends once one has failed: so what all find wrong is said by
    the first alone, and who has only lost the connection to another, a RuntimeError, says nothing."""
    if "TORCHELASTIC_RUN_ID" in os.environ and (isinstance(error, RuntimeError) or os.environ["RANK"] != "0"):
        time.sleep(5)


def exit_cleanly(main: typing.Callable[[], None]) -> None:
    """Call main(); a user's mistake, a full disk or too little memory ends with one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter of a sample shows ? in its place
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed our output: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        let_the_cause_speak_first(error)
        message = str(error).strip().splitlines()[0] if str(error) else "out of memory"
        if isinstance(error, RuntimeError):  # torch's, for CUDA and for the CPU; any other is a bug to be seen whole
            if "memory" not in message:
                raise
            message += "; try a smaller --batch_size, with a larger --grad_accum"
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
