"""Refuse graphs that would do harm or could not run, before ONNX Runtime sees them.

ONNX Runtime computes constant parts of a graph while it loads it, and trusts what a file says about its tensors, so a
small hostile file can ask for any amount of memory. What is checked here costs a few milliseconds.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import GRAPH_LIMIT_BYTES, ModelFolder
from gpt2_edge.graph_reader import Graph, Node, Tensor, read_graph
from gpt2_edge.protobuf import ProtobufError

_DOMAINS: Final = ("", "ai.onnx", "com.microsoft")
_SMALL_FILE_LIMIT_BYTES: Final = 64_000_000
_SPARE_WEIGHTS_BYTES: Final = 1 << 20  # that alignment may leave unused
_LARGEST_CONSTANT: Final = 1 << 28  # values; the embedding of GPT-2 XL has 80 million
_LEAST_CHECKED_VALUES: Final = 64  # a mask's minus infinity is a scalar
_CHUNK_BYTES: Final = 1 << 18

# What `export` and `quantize` write for the fused flavour, and operators of the same kind: none runs a graph again and
# again or knows the machine, and only Expand, whose sizes are checked, makes much of little. Add what a new recipe
# needs.
_FUSED_OPERATORS: Final = frozenset(
    re.findall(
        r"\w+",
        """
    Abs Add And BiasGelu BitShift BitwiseAnd BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Concat Constant
    Cos DequantizeLinear Div DynamicQuantizeLinear DynamicQuantizeMatMul Elu Equal Erf Exp Expand FastGelu
    Flatten Floor FusedGemm FusedMatMul Gather GatherBlockQuantized GatherElements GatherND Gelu Gemm Greater
    GreaterOrEqual GroupQueryAttention HardSigmoid HardSwish Identity If LayerNormalization LeakyRelu Less
    LessOrEqual Log MatMul MatMulInteger MatMulIntegerToFloat MatMulNBits Max Min Mish Mod Mul
    MultiHeadAttention Neg Not Or Pow QLinearMatMul QuantizeLinear QuickGelu Reciprocal ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum Relu Reshape Round Selu Shape Sigmoid Sign Sin SkipLayerNormalization Slice
    Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tanh TensorScatter ThresholdedRelu Transpose Trilu
    Unsqueeze Where Xor
    """,
    )
)
# Which inputs of an operator are multiplied to the size of its result. (A negative or unknown one counts as 1.)
_SIZE_INPUTS: Final = {
    "ConstantOfShape": slice(0, 1),
    "Expand": slice(1, 2),
    "OneHot": slice(1, 2),
    "Pad": slice(1, 2),
    "Range": slice(0, 3),
    "Resize": slice(2, 4),
    "Tile": slice(1, 2),
    "Upsample": slice(1, 2),
}
_SIZE_ATTRIBUTES: Final = {"RandomNormal": "shape", "RandomUniform": "shape"}
_ENDLESS: Final = ("Loop", "Scan", "SequenceMap")
_SAME_POSITIONS: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_LOOKUPS: Final = ("Gather", "GatherBlockQuantized")

_BITS: Final = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}
_STRING: Final = 8
_FLOATS: Final[dict[int, npt.DTypeLike]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}


def check_graph(folder: ModelFolder, name: str) -> Graph:
    """Read a graph and refuse it if it is hostile or does not fit its manifest or weights.

    Args:
        folder: An opened model folder.
        name: The graph's file.

    Returns:
        The graph.

    Raises:
        ModelFolderError: It is refused; the message says why.
    """
    content = folder.content(name)
    try:
        graph = read_graph(content.view())
    except ProtobufError as error:
        raise ModelFolderError(f"{content.path} is not a graph that is run here: {error}") from error
    try:
        _check_operators(graph, folder.manifest.flavour)
        for tensor in graph.all_tensors():
            _check_tensor(tensor, folder)
        _check_constants(graph)
        _check_lookups(graph, folder)
    except _RefusalError as error:
        raise ModelFolderError(f"{content.path} is refused: {error}; export the model again") from error
    return graph


def check_file_sizes(graphs: Iterable[Graph], folder: ModelFolder) -> None:
    """Refuse files that are far larger than their use, whose hashing would take forever: sparse ones cost nothing.

    Raises:
        ModelFolderError: There is such a file.
    """
    limits = dict.fromkeys(folder.manifest.graphs.values(), GRAPH_LIMIT_BYTES)
    for graph in graphs:
        for tensor in graph.all_tensors():
            if tensor.location is not None:
                end = tensor.offset + _size_bytes(tensor) + _SPARE_WEIGHTS_BYTES
                limits[tensor.location] = max(limits.get(tensor.location, 0), end)
    for entry in folder.manifest.files:
        limit = limits.get(entry.name, _SMALL_FILE_LIMIT_BYTES)
        if entry.size_bytes > limit:
            raise ModelFolderError(
                f"{folder.content(entry.name).path} has {entry.size_bytes:,} bytes, of which at most {limit:,} have a "
                "use: export the model again"
            )


def check_finite(graph: Graph, folder: ModelFolder) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ModelFolderError: There are some; the message names the tensor.
    """
    for tensor in graph.all_tensors():
        dtype = _FLOATS.get(tensor.data_type)
        if dtype is None or math.prod(tensor.dims) < _LEAST_CHECKED_VALUES:
            continue
        if not all(np.isfinite(chunk.view(dtype)).all() for chunk in _chunks(tensor, folder)):
            raise ModelFolderError(
                f"{folder.graph_path} has weights that are not finite, in {tensor.name}: export the checkpoint again"
            )


def weight_files(graph: Graph) -> list[str]:
    """Return the names of the files that hold the graph's weights."""
    return sorted({tensor.location for tensor in graph.all_tensors() if tensor.location is not None})


class _RefusalError(Exception):
    """Why a graph is refused."""


def _check_operators(graph: Graph, flavour: str) -> None:
    for node in graph.all_nodes():
        if node.domain not in _DOMAINS:
            raise _RefusalError(f"it has an operator {node.operator[:60]} of the foreign domain {node.domain[:60]}")
        if node.operator in _ENDLESS or (flavour == "fused" and node.operator not in _FUSED_OPERATORS):
            raise _RefusalError(f"it has an operator {node.operator[:60]}, which no {flavour} graph of ours has")


def _check_tensor(tensor: Tensor, folder: ModelFolder) -> None:
    if any(dim < 0 for dim in tensor.dims):
        raise _RefusalError(f"{tensor.name or 'a constant'} has the shape {tensor.dims[:8]}")
    count = math.prod(tensor.dims)
    if tensor.data_type == _STRING:
        fits = tensor.strings == count and tensor.location is None
    elif tensor.data_type not in _BITS:
        raise _RefusalError(f"{tensor.name or 'a constant'} has the unknown type {tensor.data_type}")
    else:
        size_bytes = _size_bytes(tensor)
        if tensor.location is not None:
            _check_place(tensor, folder, size_bytes)
            return
        # Elements that are stored one by one take a byte or more each; those of 2 and 4 bits share one.
        least = size_bytes if tensor.data_type in _FLOATS else -(-count * min(_BITS[tensor.data_type], 8) // 8)
        fits = len(tensor.raw) == size_bytes if tensor.raw is not None else tensor.typed_bytes >= least
    if not fits:
        raise _RefusalError(f"{tensor.name or 'a constant'} has the shape {tensor.dims[:8]}, but not the bytes for it")


def _size_bytes(tensor: Tensor) -> int:
    return -(-math.prod(tensor.dims) * _BITS[tensor.data_type] // 8)


def _check_place(tensor: Tensor, folder: ModelFolder, size_bytes: int) -> None:
    location = str(tensor.location)
    if location not in {entry.name for entry in folder.manifest.files}:
        raise _RefusalError(f"it has weights in {location[:120]}, which the manifest does not list")
    if tensor.length is not None and tensor.length != size_bytes:
        raise _RefusalError(f"{tensor.name} needs {size_bytes:,} bytes and is said to have {tensor.length:,}")
    available = folder.content(location).size_bytes
    if tensor.offset + size_bytes > available:
        raise _RefusalError(
            f"{tensor.name} ends at byte {tensor.offset + size_bytes:,} of {location}, which has {available:,}"
        )


def _check_constants(graph: Graph) -> None:
    """Refuse operators that make a huge tensor of a few numbers that stand in the file."""
    constants = {tensor.name: tensor for tensor in graph.all_tensors() if tensor.name}
    for node in graph.all_nodes():
        if node.operator == "Constant" and node.outputs and node.tensors:
            constants[node.outputs[0]] = node.tensors[0]
    for node in graph.all_nodes():
        if size_attribute := _SIZE_ATTRIBUTES.get(node.operator):
            numbers = node.integers.get(size_attribute, [])
        elif inputs := _SIZE_INPUTS.get(node.operator):
            numbers = [number for name in node.inputs[inputs] for number in _values(constants.get(name))]
        else:
            continue
        if math.prod(max(abs(number), 1) for number in numbers) > _LARGEST_CONSTANT:
            raise _RefusalError(f"its {node.operator} makes a tensor of more than {_LARGEST_CONSTANT:,} values")


def _values(tensor: Tensor | None) -> list[int]:
    """Return the numbers of a small constant; those of a large one, or one in another form, count as huge."""
    if tensor is None:
        return []
    dtypes = {1: "<f4", 6: "<i4", 7: "<i8", 11: "<f8"}
    if tensor.raw is None or tensor.data_type not in dtypes or len(tensor.raw) > 1024:
        return [_LARGEST_CONSTANT + 1]
    values = np.frombuffer(tensor.raw, dtypes[tensor.data_type])
    return [int(value) for value in np.nan_to_num(values, nan=2**40, posinf=2**40, neginf=2**40)]


def _check_lookups(graph: Graph, folder: ModelFolder) -> None:
    """Compare the tables of positions and tokens with what the manifest says; ONNX Runtime would only fail later."""
    architecture = folder.manifest.architecture
    tables = {tensor.name: tensor for tensor in graph.initializers if tensor.dims}
    makers = {output: node for node in graph.nodes for output in node.outputs}
    for node in graph.nodes:
        if node.operator not in _LOOKUPS or len(node.inputs) < 2 or node.inputs[0] not in tables:
            continue
        rows = tables[node.inputs[0]].dims[0]
        looked_up = _origin(node.inputs[1], makers)
        is_position_table = looked_up == "position_ids" or node.inputs[0].endswith("wpe.weight")
        if is_position_table and rows < architecture.context_length:
            raise _RefusalError(
                f"it has embeddings for {rows} positions, the manifest has context_length {architecture.context_length}"
            )
        if looked_up == "input_ids" and rows < architecture.vocabulary_size:
            raise _RefusalError(
                f"it has embeddings for {rows} tokens, the manifest has vocabulary_size {architecture.vocabulary_size}"
            )


def _origin(name: str, makers: dict[str, Node]) -> str:
    for _ in range(len(_SAME_POSITIONS)):
        node = makers.get(name)
        if node is None or node.operator not in _SAME_POSITIONS or not node.inputs:
            break
        name = node.inputs[0]
    return name


def _chunks(tensor: Tensor, folder: ModelFolder) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the bytes of a tensor of floats in pieces that hold whole numbers."""
    if tensor.location is None:
        if tensor.raw is not None:
            yield np.frombuffer(tensor.raw, np.uint8)
        return
    content = folder.content(tensor.location)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    position, end = tensor.offset, tensor.offset + _size_bytes(tensor)
    while position < end:
        wanted = buffer[: min(_CHUNK_BYTES, end - position)]
        filled = 0
        while filled < len(wanted):
            filled += content.read_into(position + filled, wanted[filled:])
        yield np.frombuffer(wanted, np.uint8)
        position += len(wanted)
