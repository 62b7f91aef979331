"""What importing and running the package does to a process and to a home folder: as little as can be."""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

import gpt2_edge

REPOSITORY: Final = Path(__file__).resolve().parent.parent
TELEMETRY: Final = "ORT_DISABLE_TELEMETRY"
HEAVY: Final = {
    *("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "huggingface_hub"),
    *("tqdm", "rich", "ml_dtypes", "requests", "httpx", "hypothesis", "pytest"),
}

PUBLIC_NAMES: Final = {
    *("load", "Model", "TextStream", "GenerationOptions", "__version__"),
    *("Generation", "NextToken", "Piece", "Score", "Session", "Timings", "TokenLogprobs"),
    *("CheckpointError", "ContextLengthError", "DeviceError", "Gpt2EdgeError", "LogitsError", "MachineError"),
    *("MissingDependencyError", "ModelClosedError", "ModelFolderError", "OptionError", "ParityError", "PromptError"),
    *("QuantizationError", "SessionError", "UnsealedFolderWarning"),
    "OptionKeywords",
}

TOP_LEVEL_MODULES: Final = """
def third_party() -> list[str]:
    top_level = {name.partition(".")[0] for name in sys.modules}
    return sorted(top_level - set(sys.stdlib_module_names) - {"gpt2_edge", "__main__", "__mp_main__"})
"""


class Interpreter:
    """A Python process of its own, with an empty home folder."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.working_folder = folder / "working"
        self.home.mkdir()
        self.working_folder.mkdir()

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name != TELEMETRY and not name.startswith(("XDG_", "HF_", "TRANSFORMERS_", "PYTEST"))
        }
        places = {"HOME": self.home, "USERPROFILE": self.home, "XDG_CACHE_HOME": self.home / "cache"}
        return kept | {name: str(place) for name, place in places.items()} | variables

    def run(self, code: str, *arguments: str, cwd: Path | None = None, **variables: str) -> Any:
        """Run code in which any warning is an error; return what it put into `result`."""
        program = f"import json, os, sys\n{TOP_LEVEL_MODULES}\n{textwrap.dedent(code)}\nprint(json.dumps(result))"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, *arguments],
            cwd=cwd or self.working_folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    def files_at_home(self) -> list[str]:
        return sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*"))


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    return Interpreter(tmp_path)


GENERATE: Final = """
import gpt2_edge
with gpt2_edge.load(sys.argv[1]) as model:
    text = model.generate("Once upon a time", max_new_tokens=5, temperature=0.8, top_k=40, top_p=0.9, seed=7).text
    streamed = "".join(piece.text for piece in model.stream("Once", max_new_tokens=5))
    likely = model.next_tokens("Once upon a", k=3)
    score = model.score("Once upon a time")
"""


# What is loaded.


def test_importing_the_package_loads_nothing_else(interpreter: Interpreter) -> None:
    before, after = interpreter.run("before = third_party(); import gpt2_edge; result = before, third_party()")
    assert before == after


def test_using_a_model_loads_only_what_it_needs(interpreter: Interpreter, storyteller_int8: Path) -> None:
    allowed = interpreter.run(
        "import numpy.random, onnxruntime, tokenizers; result = third_party()", **{TELEMETRY: "1"}
    )
    for_the_name = interpreter.run("import gpt2_edge; gpt2_edge.load; result = third_party()")
    for_everything = interpreter.run(f"{GENERATE}\nresult = third_party()", str(storyteller_int8))
    assert {"numpy", "onnxruntime", "tokenizers"} <= set(for_everything)
    assert set(for_the_name) <= set(allowed)
    assert set(for_everything) <= set(allowed)
    assert HEAVY.isdisjoint(for_everything)


def test_the_command_line_starts_without_onnxruntime(interpreter: Interpreter) -> None:
    """Its help must be quick, and must work where nothing else does."""
    loaded = interpreter.run(
        """
        from contextlib import redirect_stdout
        from io import StringIO
        import gpt2_edge.cli
        with redirect_stdout(StringIO()) as out:
            try:
                gpt2_edge.cli.main(["--help"])
            except SystemExit:
                pass
        assert "usage" in out.getvalue().lower()
        result = third_party()
        """
    )
    assert {"numpy", "onnxruntime", "tokenizers", *HEAVY}.isdisjoint(loaded)


# The public names.


def test_the_public_names() -> None:
    assert set(gpt2_edge.__all__) == PUBLIC_NAMES
    assert gpt2_edge.__all__ == sorted(gpt2_edge.__all__)
    assert dir(gpt2_edge) == gpt2_edge.__all__


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(gpt2_edge, name) is not None


def test_every_public_error_is_ours() -> None:
    for name in gpt2_edge.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(gpt2_edge, name), gpt2_edge.Gpt2EdgeError)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'gpt2_edge' has no attribute 'lod'"):
        gpt2_edge.lod  # noqa: B018
    assert not hasattr(gpt2_edge, "__wrapped__")


def test_star_import(interpreter: Interpreter) -> None:
    code = (
        "from gpt2_edge import *; result = sorted(name for name in dir() if name in ('load', 'Model', 'OptionError'))"
    )
    assert interpreter.run(code) == ["Model", "OptionError", "load"]


# The home folder, the environment, the network.


def test_nothing_is_written(interpreter: Interpreter, storyteller_int8: Path) -> None:
    before = sorted(storyteller_int8.iterdir())
    interpreter.run(f"{GENERATE}\nresult = text", str(storyteller_int8))
    assert interpreter.files_at_home() == []
    assert list(interpreter.working_folder.iterdir()) == []
    assert sorted(storyteller_int8.iterdir()) == before


def test_the_environment_gets_one_variable(interpreter: Interpreter, storyteller_int8: Path) -> None:
    code = f"before = dict(os.environ)\n{GENERATE}\nresult = before, dict(os.environ)"
    before, after = interpreter.run(code, str(storyteller_int8))
    assert after == before | {TELEMETRY: "1"}


def test_no_network_is_used(interpreter: Interpreter, storyteller_int8: Path) -> None:
    text = interpreter.run(
        f"""
        import socket

        def refuse(*arguments, **keywords):
            raise AssertionError(f"the network was used: {{arguments}}")

        class RefusedSocket(socket.socket):
            __init__ = refuse

        socket.socket = RefusedSocket
        socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
        sys.addaudithook(lambda event, arguments: refuse(event) if event.startswith("socket.") else None)
        {textwrap.indent(GENERATE, " " * 8)}
        result = text
        """,
        str(storyteller_int8),
    )
    assert text


@pytest.mark.parametrize(
    ("given", "kept", "state"),
    [
        (None, "1", "disabled"),
        ("1", "1", "disabled"),
        ("0", "0", f"left as the environment has it ({TELEMETRY}=0)"),
        ("", "", f"left as the environment has it ({TELEMETRY}=)"),
    ],
)
def test_telemetry_is_switched_off_unless_the_user_decided(
    interpreter: Interpreter, given: str | None, kept: str, state: str
) -> None:
    code = """
    import gpt2_edge
    value = os.environ.get(sys.argv[1])
    import gpt2_edge.telemetry
    result = value, os.environ[sys.argv[1]], gpt2_edge.telemetry.telemetry_state()
    """
    variables = {} if given is None else {TELEMETRY: given}
    assert interpreter.run(code, TELEMETRY, **variables) == [kept, kept, state]


def test_telemetry_cannot_be_switched_off_after_onnxruntime(interpreter: Interpreter) -> None:
    value, state = interpreter.run(
        """
        from types import ModuleType
        sys.modules["onnxruntime"] = ModuleType("onnxruntime")  # the real one would send
        import gpt2_edge.telemetry
        result = os.environ[sys.argv[1]], gpt2_edge.telemetry.telemetry_state()
        """,
        TELEMETRY,
    )
    assert value == "1"
    assert state.startswith("may be on: onnxruntime was imported before gpt2_edge; import gpt2_edge first")


def test_telemetry_is_off_before_onnxruntime_is_imported(interpreter: Interpreter) -> None:
    """Seen by an import hook at the moment when onnxruntime is looked for."""
    seen = interpreter.run(
        """
        seen = []

        class Watcher:
            def find_spec(self, name, path=None, target=None):
                if name == "onnxruntime":
                    seen.append(os.environ.get(sys.argv[1]))

        sys.meta_path.insert(0, Watcher())
        import gpt2_edge
        gpt2_edge.load
        result = seen
        """,
        TELEMETRY,
    )
    assert seen == ["1"]


# Wrong or incomplete installations.


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runtime", "gpt2_edge"),
        ("export", "gpt2_edge.export"),
        ("quantize", "gpt2_edge.quantize"),
        ("benchmarks", "gpt2_edge.benchmarks"),
        ("runtime.commands", "gpt2_edge"),
    ],
)
def test_importing_a_folder_by_its_own_name_is_refused(interpreter: Interpreter, folder: str, name: str) -> None:
    message = interpreter.run(
        """
        import importlib
        try:
            importlib.import_module(sys.argv[1])
        except ImportError as error:
            result = str(error)
        """,
        folder,
        cwd=REPOSITORY,
    )
    assert message.startswith(f"this package is imported as {name}, not as {folder.partition('.')[0]}: ")
    assert "pip install ." in message


WITHOUT_ONNXRUNTIME: Final = """
    sys.modules["onnxruntime"] = None
    import gpt2_edge
"""
INCOMPLETE_ONNXRUNTIME: Final = """
    from types import ModuleType
    sys.modules["onnxruntime"] = ModuleType("onnxruntime")
    import gpt2_edge
"""
ASK_TWICE: Final = """
    result = []
    for name in ("load", "load", "Model"):
        try:
            getattr(gpt2_edge, name)
        except gpt2_edge.MissingDependencyError as error:
            result.append(str(error))
"""


def requirement_of(extra: str) -> str:
    """Return what an extra asks for: pip finds that whether the package itself is released or lies in a clone."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = project["optional-dependencies"][extra]
    return str(requirement)


def test_without_onnxruntime_the_message_names_the_pip_line(interpreter: Interpreter) -> None:
    messages = interpreter.run(WITHOUT_ONNXRUNTIME + ASK_TWICE)
    assert len(messages) == 3
    for message in messages:
        assert message.startswith(f'ONNX Runtime is not installed: run pip install "{requirement_of("cpu")}", or for')
        assert f'an NVIDIA GPU pip install "{requirement_of("cuda")}" (not both: they break each other).' in message


def test_with_half_an_onnxruntime_the_message_names_the_pip_lines(interpreter: Interpreter) -> None:
    messages = interpreter.run(INCOMPLETE_ONNXRUNTIME + ASK_TWICE)
    assert len(messages) == 3
    for message in messages:
        pip_lines = f'run pip uninstall onnxruntime onnxruntime-gpu, then pip install "{requirement_of("cpu")}", or for'
        assert f'{pip_lines} an NVIDIA GPU pip install "{requirement_of("cuda")}"' in message


def test_what_needs_no_onnxruntime_works_without_it(interpreter: Interpreter) -> None:
    code = f"""
    {WITHOUT_ONNXRUNTIME}
    options, piece = gpt2_edge.GenerationOptions(top_k=5), gpt2_edge.Piece("a")
    result = gpt2_edge.__version__, options.top_k, piece.text, issubclass(gpt2_edge.OptionError, ValueError)
    """
    assert interpreter.run(code) == [gpt2_edge.__version__, 5, "a", True]
