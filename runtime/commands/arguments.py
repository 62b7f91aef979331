"""Arguments that several commands share, and reading texts from standard input."""

import argparse
import sys

from gpt2_edge.errors import PromptError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add FOLDER, --device and --threads."""
    parser.add_argument("folder", metavar="FOLDER", help="a model folder or a pack, or `storyteller`")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ..., or auto (the default)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that compute (default: the cores allowed)")


def add_prompt_argument(parser: argparse.ArgumentParser) -> None:
    """Add PROMPT."""
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue, or - to read it from standard input")


def read_prompt(argument: str) -> str:
    """Return the prompt, read from standard input if it is "-".

    One newline at the end of standard input is not part of the prompt: `echo` adds it.

    Raises:
        PromptError: It is not UTF-8.
    """
    if argument != "-":
        # Python keeps bytes of an argument that are not UTF-8 as surrogates.
        return decode_utf8(argument.encode("utf-8", "surrogateescape"), "the prompt")
    return decode_utf8(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")


def decode_utf8(data: bytes, name: str) -> str:
    """Decode bytes strictly, and say where they are not UTF-8.

    Raises:
        PromptError: They are not.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
