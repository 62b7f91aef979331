"""Which weight files a graph refers to, read without the onnx package."""

import re
from typing import Final

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import ModelFolder

# A StringStringEntryProto {key: "location", value: NAME} as protocol buffers write it: field 1, 8 bytes, the key,
# then field 2 and the length of the name, which is below 128 as a plain file name is.
_LOCATION: Final = re.compile(rb"\x0a\x08location\x12([\x00-\xff])")


def check_external_data(folder: ModelFolder) -> None:
    """Refuse a graph whose weights lie in files that the manifest does not list: nobody hashed them.

    ONNX Runtime itself refuses those that lie outside of the folder.

    Raises:
        ModelFolderError: There is such a file.
    """
    graph = folder.graph_path.read_bytes()
    listed = {entry.name for entry in folder.manifest.files}
    for found in _LOCATION.finditer(graph):
        name = graph[found.end() : found.end() + found[1][0]].decode("utf-8", errors="replace")
        if name not in listed:
            raise ModelFolderError(
                f"{folder.graph_path} has weights in {name}, which the manifest does not list: export the model again"
            )
