"""Run by CI with the Python of a clean environment that holds the wheel with `[cpu]` and nothing else.

Generates from the bundled model with sockets blocked, through Python and through the command.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

FORBIDDEN = ("torch", "onnx", "transformers", "onnx_ir", "onnxscript", "safetensors", "optimum")


class NetworkUsedError(AssertionError):
    """Something opened a socket."""


def refuse(*arguments: Any, **keywords: Any) -> NoReturn:
    raise NetworkUsedError(f"the network was used: {arguments}")


def main() -> None:
    for name in FORBIDDEN:
        assert importlib.util.find_spec(name) is None, f"{name} is installed in an environment for the runtime"
    socket.socket = socket.create_connection = socket.getaddrinfo = refuse  # type: ignore[assignment,misc]

    import gpt2_edge

    assert "site-packages" in (gpt2_edge.__file__ or ""), gpt2_edge.__file__
    with gpt2_edge.load("storyteller") as model:
        done = model.generate("Once upon a time", max_new_tokens=40)
        assert len(done.tokens) == 40
        assert "".join(piece.text for piece in model.stream("Once upon a time", max_new_tokens=40)) == done.text
    assert not [name for name in FORBIDDEN if name in sys.modules]

    command = Path(sys.executable).with_name("gpt2-edge")
    arguments = [str(command), "generate", "storyteller", "Once upon a time", "--max-new-tokens", "40"]
    printed = subprocess.run(arguments, check=True, capture_output=True, encoding="utf-8").stdout
    assert printed == f"Once upon a time{done.text}\n", printed
    assert not Path(os.environ["HOME"]).exists(), "something was written to the home folder"
    print(f"wheel: ok, {done.timings.decode_tokens_per_second:.0f} tokens/s\n{printed}")


if __name__ == "__main__":
    main()
