"""Give a graph to ONNX Runtime, with the weights that were checked and no others."""

from collections.abc import Callable
from typing import Any, Final

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.file_content import releasing_pages
from gpt2_edge.folder import ModelFolder
from gpt2_edge.forked_sessions import keep_where_forked
from gpt2_edge.graph_check import check_graph, weight_files
from gpt2_edge.graph_reader import Graph
from gpt2_edge.onnxruntime_import import onnxruntime

_TAKES_WEIGHTS_FROM_MEMORY: Final = "add_external_initializers_from_files_in_memory"
_WITHOUT_A_COPY: Final = "session.use_external_initializer_file_buffers_directly"
_FIRST_WITHOUT_A_COPY: Final = (1, 31)


def open_graph(
    folder: ModelFolder,
    name: str,
    options: Any,
    part: bytes = b"",
    inspect: Callable[[Graph], object] = lambda graph: None,
    **arguments: Any,
) -> Any:
    """Check a graph and make an `onnxruntime.InferenceSession` of it.

    ONNX Runtime reads the weights where they are mapped, so they are those that the folder's hashes were computed of.
    Versions before 1.31 would copy them; those open the files by their names, and whether a file was exchanged is
    found out after. Only a pack, whose files have no names of their own, is copied then.

    Args:
        folder: An opened model folder.
        name: The graph's file.
        options: `onnxruntime.SessionOptions`.
        part: What is added to the graph, as `graph_writer.model_part` returns it; needs ONNX Runtime 1.31.
        inspect: Called with the graph when it was checked.
        **arguments: What else the session takes.

    Raises:
        ModelFolderError: The graph is refused.
        Exception: ONNX Runtime cannot load it.
    """
    graph = check_graph(folder, name)
    inspect(graph)
    contents = {location: folder.content(location) for location in weight_files(graph)}
    takes_mapped = _version() >= _FIRST_WITHOUT_A_COPY
    if not takes_mapped and not folder.is_pack:
        session = onnxruntime.InferenceSession(str(folder.content(name).path), options, **arguments)
        folder.check_unchanged()
        keep_where_forked(session)
        return session
    if not hasattr(options, _TAKES_WEIGHTS_FROM_MEMORY):
        raise ModelFolderError(
            f"{folder.path} is a pack, which ONNX Runtime {onnxruntime.__version__} cannot load: upgrade it to 1.31 or "
            f"newer, or run gpt2-edge unpack {folder.path} -o FOLDER"
        )
    views = [content.view() for content in contents.values()]
    if contents:
        options.add_session_config_entry(_WITHOUT_A_COPY, "1")
        options.add_external_initializers_from_files_in_memory(list(contents), views, [len(view) for view in views])
    with releasing_pages(content.file for content in contents.values()):
        session = onnxruntime.InferenceSession(folder.content(name).read() + part, options, **arguments)
    session.mapped_weights = views  # it reads them as long as it lives
    keep_where_forked(session)
    return session


def _version() -> tuple[int, int]:
    major, minor = onnxruntime.__version__.split(".")[:2]
    return int(major), int(minor)
