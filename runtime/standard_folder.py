"""A folder with a GPT-2 that optimum exported: without a manifest, so what one would say is found out here.

Nothing says whether such a folder is whole. `seal` writes the manifest, which does from then on.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gpt2_edge.errors import ModelFolderError, UnsealedFolderWarning
from gpt2_edge.file_content import FileContent
from gpt2_edge.folder import BUNDLED_MODELS, TOKENIZER_NAME, ModelFolder, open_file
from gpt2_edge.graph_check import weight_files
from gpt2_edge.graph_reader import Graph, read_graph
from gpt2_edge.manifest import MANIFEST_NAME, Architecture, FileEntry, Manifest
from gpt2_edge.protobuf import ProtobufError
from gpt2_edge.version import VERSION

CONFIG_NAME: Final = "config.json"
# What transformers and optimum read beside the graph, if it is there.
COMPANIONS: Final = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "ort_config.json",
)

_USUAL_GRAPHS: Final = ("model.onnx", "decoder_model_merged.onnx")
_GRAPH_SUFFIX: Final = ".onnx"
_CONFIG_LIMIT_BYTES: Final = 1_000_000
MINIMUM_ONNXRUNTIME: Final = "1.22"
_LARGEST_NUMBER: Final = 2**31 - 1
_MOST_LAYERS: Final = 1000
# Name of a field, its other name, and what it is if the file has neither: transformers' GPT2Config.
_SHAPE_FIELDS: Final = {
    "n_layer": ("num_hidden_layers", 12),
    "n_head": ("num_attention_heads", 12),
    "n_embd": ("hidden_size", 768),
    "n_positions": ("max_position_embeddings", 1024),
    "vocab_size": ("vocab_size", 50257),
}
_END_OF_TEXT: Final = 50256
_INTEGER_OPERATORS: Final = ("MatMulInteger", "MatMulNBits", "QLinearMatMul", "DynamicQuantizeMatMul")


def is_unsealed(folder: str | Path) -> bool:
    """Tell whether a path is a folder with a config and a graph, and without a manifest."""
    if not isinstance(folder, str | Path) or folder in BUNDLED_MODELS:
        return False
    path = Path(folder)
    try:
        return (
            path.is_dir()
            and not (path / MANIFEST_NAME).exists()
            and (path / CONFIG_NAME).is_file()
            and bool(_graph_names(path))
        )
    except (OSError, ValueError):  # whoever opens it says what is wrong with it
        return False


def open_unsealed(folder: str | Path, graph_name: str | None = None) -> ModelFolder:
    """Open a folder that has no manifest, with the manifest that `seal` would write.

    Args:
        folder: Has `config.json`, `tokenizer.json` and a graph.
        graph_name: Which graph; None takes `model.onnx`, else `decoder_model_merged.onnx`, else the only one.

    Raises:
        ModelFolderError: It is no GPT-2, lacks something, or has several graphs and none of the usual name.
    """
    path = Path(folder)
    try:
        return _open(path, graph_name)
    except OSError as error:
        raise ModelFolderError(f"cannot read {path}: {error.strerror or error}") from error


def warn_of_unsealed(folder: str | Path) -> None:
    """Say that nothing tells whether a folder is whole."""
    warnings.warn(
        f"{folder} has no {MANIFEST_NAME}, so nothing tells whether its files are whole: "
        f"`gpt2-edge seal {folder}` makes one",
        UnsealedFolderWarning,
        stacklevel=3,
    )


def _open(path: Path, graph_name: str | None) -> ModelFolder:
    home = path.resolve()
    graph_name = _chosen_graph(path) if graph_name is None else graph_name
    graph_content = open_file(path, home, graph_name)
    graph = _read_graph(graph_content)
    config = _read_object(open_file(path, home, CONFIG_NAME))
    architecture = _architecture(path / CONFIG_NAME, config)
    if not (path / TOKENIZER_NAME).is_file():
        raise ModelFolderError(
            f"{path} has no {TOKENIZER_NAME}: make one with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    contents = {graph_name: graph_content}
    for name in (*weight_files(graph), TOKENIZER_NAME):
        if Path(name).name != name or "\\" in name:
            raise ModelFolderError(f"{path / graph_name} has weights outside of the folder, in {name[:120]}")
        contents[name] = open_file(path, home, name)
    contents |= {name: open_file(path, home, name) for name in COMPANIONS if (path / name).is_file()}
    generation = _read_object(contents["generation_config.json"]) if "generation_config.json" in contents else {}
    operators = {node.operator for node in graph.all_nodes()}
    manifest = Manifest(
        architecture=architecture,
        flavour="standard",
        precision="int8" if operators.intersection(_INTEGER_OPERATORS) else "fp32",
        cache_precision="fp32",
        recipe=None,
        graphs={"decoder": graph_name},
        end_of_text=_end_of_text(config, generation, architecture.vocabulary_size),
        source={"name": home.name, "revision": None},
        tools={"gpt2-edge": VERSION},
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        files=tuple(
            FileEntry(name, content.size_bytes, content.sha256()) for name, content in sorted(contents.items())
        ),
    )
    return ModelFolder(home, manifest.to_json().encode(), manifest, contents, None, is_sealed=False)


def _graph_names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.name.endswith(_GRAPH_SUFFIX) and file.is_file())


def _chosen_graph(path: Path) -> str:
    names = _graph_names(path)
    usual = next((name for name in _USUAL_GRAPHS if name in names), None)
    if usual is not None:
        return usual
    if not names:
        raise ModelFolderError(
            f"{path} has no {_GRAPH_SUFFIX} file: give a folder that optimum exported; a checkpoint goes to "
            "`gpt2-edge export`"
        )
    if len(names) > 1:
        raise ModelFolderError(
            f"{path} has several graphs, {', '.join(names[:6])}: choose one with "
            f"`gpt2-edge seal {path} --graph {names[0]}`, say"
        )
    return names[0]


def _read_graph(content: FileContent) -> Graph:
    try:
        return read_graph(content.view())
    except ProtobufError as error:
        raise ModelFolderError(f"{content.path} is not a graph that is run here: {error}") from error


def _read_object(content: FileContent) -> dict[str, Any]:
    if content.size_bytes > _CONFIG_LIMIT_BYTES:
        raise ModelFolderError(f"{content.path} is larger than {_CONFIG_LIMIT_BYTES:,} bytes")
    try:
        document = json.loads(content.read())
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{content.path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelFolderError(f"{content.path} does not hold a JSON object")
    return document


def _architecture(path: Path, config: Mapping[str, Any]) -> Architecture:
    """Read the shape of a GPT-2 from its `config.json`.

    Raises:
        ModelFolderError: It is another model's, or has a field that is not allowed.
    """
    model_type = config.get("model_type")
    if model_type != "gpt2":
        raise ModelFolderError(f"{path}: model_type is {str(model_type)[:60]!r}; only 'gpt2' can be run")
    sizes = {name: _size(path, config, name) for name in _SHAPE_FIELDS}
    width, heads = sizes["n_embd"], sizes["n_head"]
    if width % heads:
        raise ModelFolderError(f"{path}: n_embd {width} is not a multiple of n_head {heads}")
    if sizes["n_layer"] > _MOST_LAYERS:
        raise ModelFolderError(f"{path}: n_layer is {sizes['n_layer']}, expected at most {_MOST_LAYERS}")
    inner = config.get("n_inner")
    return Architecture(
        layers=sizes["n_layer"],
        heads=heads,
        head_size=width // heads,
        width=width,
        inner_width=4 * width if inner is None else _checked(path, "n_inner", inner),
        context_length=sizes["n_positions"],
        vocabulary_size=sizes["vocab_size"],
        activation=str(config.get("activation_function", "gelu_new")),
        tied_head=config.get("tie_word_embeddings") is not False,
    )


def _size(path: Path, config: Mapping[str, Any], name: str) -> int:
    other_name, default = _SHAPE_FIELDS[name]
    return _checked(path, name, config.get(name, config.get(other_name, default)))


def _checked(path: Path, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_NUMBER:
        raise ModelFolderError(f"{path}: {name} is {str(value)[:60]}, expected an integer from 1 to {_LARGEST_NUMBER}")
    return value


def _end_of_text(config: Mapping[str, Any], generation: Mapping[str, Any], vocabulary_size: int) -> int | None:
    """Return the token that ends a text; of a list the first. None if there is none inside the vocabulary."""
    for document in (generation, config):
        given = document.get("eos_token_id")
        token = given[0] if isinstance(given, list) and given else given
        if isinstance(token, int) and not isinstance(token, bool):
            return token if 0 <= token < vocabulary_size else None
    is_absent = "eos_token_id" not in config
    return _END_OF_TEXT if is_absent and vocabulary_size > _END_OF_TEXT else None
