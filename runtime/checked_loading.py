"""Check the files of a folder while they are loaded."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, Literal

from gpt2_edge.errors import Gpt2EdgeError, OptionError
from gpt2_edge.folder import TOKENIZER_NAME, ModelFolder
from gpt2_edge.graph_check import check_file_sizes, check_finite, check_graph, weight_files
from gpt2_edge.graph_reader import Graph
from gpt2_edge.known_hashes import changed_files, remember

VerifyHashes = bool | Literal["changed"]

_CHOICES: Final = (True, False, "changed")


@contextmanager
def checked(folder: ModelFolder, verify_hashes: VerifyHashes) -> Iterator[None]:
    """Compare all hashes, and find weights that are not finite, while the block loads the folder.

    The graph and the tokenizer are compared before the block begins, weights meanwhile in other threads: until they are
    known to be right nothing is computed with them that leaves the block.

    Args:
        folder: An opened model folder.
        verify_hashes: False checks nothing; "changed" skips files that were checked on this machine before and that
            nobody has touched since.

    Raises:
        ModelFolderError: A file is not what the manifest says, was changed while it was loaded, or does harm.
    """
    if verify_hashes not in _CHOICES:
        raise OptionError(f"verify_hashes is {verify_hashes!r}: give True, False or 'changed'")
    if not verify_hashes:
        yield
        return
    names = changed_files(folder) if verify_hashes == "changed" else {entry.name for entry in folder.manifest.files}
    first = names & {*folder.manifest.graphs.values(), TOKENIZER_NAME}
    folder.check_hashes(first)
    graphs = [check_graph(folder, name) for name in sorted(set(folder.manifest.graphs.values()))]
    check_file_sizes(graphs, folder)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(_check, folder, graphs, names - first, stop)
        try:
            try:
                yield
            except Gpt2EdgeError:
                folder.check_unchanged()  # a better explanation
                check.result()  # another one: the weights are damaged
                raise
            check.result()
        except BaseException:
            stop.set()
            raise
    folder.check_unchanged()
    if verify_hashes == "changed" and names:
        remember(folder)


def _check(folder: ModelFolder, graphs: list[Graph], names: set[str], stop: threading.Event) -> None:
    folder.check_hashes(names, go_on=lambda: not stop.is_set())
    seen: set[tuple[str | None, int]] = set()
    for graph in graphs:
        # Graphs for several devices share their weights.
        places = {(tensor.location, tensor.offset) for tensor in graph.all_tensors()}
        if names.intersection(weight_files(graph)) and not places <= seen:
            check_finite(graph, folder)
        seen |= places
