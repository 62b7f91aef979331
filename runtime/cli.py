"""The command line: `gpt2-edge COMMAND ...`.

A command is a module with `add_arguments(parser)` and `run(arguments)`; only the chosen one is imported. Results go to
standard output, everything else to standard error. Exit status: 0 done, 1 the input or the model is at fault,
2 wrong usage, 130 interrupted, 143 ended by SIGTERM.
"""

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

from gpt2_edge.errors import Gpt2EdgeError, UnsealedFolderWarning
from gpt2_edge.interrupt import INTERRUPTED, TERMINATED, is_terminated, sigterm_interrupts
from gpt2_edge.version import VERSION

_COMMANDS: Final = {
    "generate": ("gpt2_edge.commands.generate", "continue a prompt"),
    "repl": ("gpt2_edge.commands.repl", "write a story together with a model"),
    "next": ("gpt2_edge.commands.next_tokens", "show the likeliest next tokens"),
    "score": ("gpt2_edge.commands.score", "log-probability and perplexity of texts"),
    "info": ("gpt2_edge.commands.info", "what a model folder holds and how it would run here"),
    "verify": ("gpt2_edge.commands.verify", "check that a model folder is whole and runs"),
    "seal": ("gpt2_edge.commands.seal", "write the manifest of a folder that optimum exported"),
    "pack": ("gpt2_edge.commands.pack", "make one file of a model folder, to copy to a device"),
    "unpack": ("gpt2_edge.commands.unpack", "make a model folder of a pack"),
    "sign": ("gpt2_edge.commands.sign", "sign a model folder with an Ed25519 key"),
    "doctor": ("gpt2_edge.commands.doctor", "what this machine offers, what is wrong with it, and what mends that"),
    "export": ("gpt2_edge.export.command", "make a model folder from a GPT-2 checkpoint"),
    "quantize": ("gpt2_edge.quantize.command", "make a smaller, faster model folder"),
    "bench": ("gpt2_edge.benchmarks.command", "speed, memory and quality of model folders, side by side"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _replace_closed_streams()
    with sigterm_interrupts():
        status = _status_of(arguments)
    return TERMINATED if is_terminated() else status


def _status_of(arguments: list[str]) -> int:
    """Run one command; its errors become messages, and their exit status is returned."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            warnings.simplefilter("always", UnsealedFolderWarning)
            return _run(arguments)
    except Gpt2EdgeError as error:
        print(f"gpt2-edge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = "ended by SIGTERM" if is_terminated() else "interrupted"
        # On a terminal after ^C, or in the middle of a line of the result.
        print(f"{chr(10) if sys.stderr.isatty() else ''}gpt2-edge: {how}", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        # Whoever read our output has gone, as `head` does, or the disk is full; nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"gpt2-edge: {_without_number(error)}", file=sys.stderr)
        return 1


def _without_number(error: OSError) -> str:
    """Return what an error of the system says, and about which file, without its number."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as errors are printed, without the line of code that it came from."""
    print(f"gpt2-edge: {message}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="gpt2-edge",
        description="Run GPT-2 on a laptop, an edge box or inside a desktop app.",
        epilog="FOLDER is a model folder or a pack, or `storyteller` for the bundled model. "
        "`gpt2-edge COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"gpt2-edge {VERSION}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_IntermixedParser)
    chosen_parser = parser
    for name, (module_name, summary) in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            module = import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
            chosen_parser = subparser
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        chosen_parser.error(_what_is_unknown(chosen_parser, unknown[0]))
    _use_utf8_output()
    status: int = parsed.run(parsed)
    sys.stdout.flush()
    return status


def _what_is_unknown(parser: argparse.ArgumentParser, argument: str) -> str:
    if not argument.startswith("-"):
        return f"{argument!r} is one argument too many: put a text or a path that has spaces in quotes"
    name = argument.partition("=")[0]
    close = difflib.get_close_matches(name, parser._option_string_actions, n=1)
    return f"there is no option {name}" + (f": did you mean {close[0]}?" if close else "")


class _IntermixedParser(argparse.ArgumentParser):
    """Takes options between and after the files of a list, as in `score FOLDER --lines FILE`."""

    _is_inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # `parse_known_intermixed_args` calls this method again, for the options and then for the rest.
        if self._is_inside:
            return super().parse_known_args(args, namespace)
        self._is_inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


def _replace_closed_streams() -> None:
    """Give what is printed somewhere to go where whoever started us has closed a stream, which then is None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _use_utf8_output() -> None:
    """Texts have any characters; a console with another encoding shows what it can instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", **({} if stream.isatty() else {"encoding": "utf-8"}))


if __name__ == "__main__":
    sys.exit(main())
