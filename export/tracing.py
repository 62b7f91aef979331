"""Trace the fused module to an ONNX graph and clean what the tracer leaves behind."""

import contextlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx_ir
import torch

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.config import CheckpointConfig
from gpt2_edge.export.fused_model import FusedGpt2
from gpt2_edge.export.weights import Weights
from gpt2_edge.graph_names import key_value_names
from gpt2_edge.version import VERSION

OPSET: Final = 21
# The shapes that are traced: sizes 0 and 1 would be taken for constants.
_BATCH, _SEQUENCE, _CAPACITY, _LOGITS = 2, 3, 11, 4


@contextlib.contextmanager
def traced(weights: Weights, config: CheckpointConfig) -> Iterator[onnx_ir.Model]:
    """Trace a checkpoint to a graph with dynamic batch, sequence, cache capacity and number of logits.

    Yields:
        The graph, over the memory of the given weights; it has none any more when the block ends.

    Raises:
        CheckpointError: The tracer made another graph than this project knows how to run.
    """
    module = FusedGpt2(weights, config).eval()
    try:
        yield _trace(module, config)
    finally:
        # The rules of onnxscript's rewriter remember what they last looked at, and with it the whole graph, for as
        # long as the process lives. Without this a large checkpoint would stay mapped.
        for parameter in module.parameters():
            parameter.data = torch.empty(0)


def _trace(module: FusedGpt2, config: CheckpointConfig) -> onnx_ir.Model:
    past = [torch.zeros(_BATCH, config.n_head, _CAPACITY, config.padded_head_size) for _ in range(2 * config.n_layer)]
    arguments = (
        torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64),
        torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64),
        torch.zeros(_BATCH, dtype=torch.int32),
        torch.tensor(_CAPACITY - 1, dtype=torch.int32),
        torch.zeros(_LOGITS, dtype=torch.int64),
        past,
    )
    batch, sequence, capacity, logits = map(torch.export.Dim, ("batch", "sequence", "capacity", "logits"))
    past_names, present_names = key_value_names(config.n_layer)
    with quiet():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=[
                "input_ids",
                "position_ids",
                "seqlens_k",
                "total_sequence_length",
                "logit_positions",
                *past_names,
            ],
            output_names=["logits", *present_names],
            dynamic_shapes=(
                {0: batch, 1: sequence},
                {0: batch, 1: sequence},
                {0: batch},
                {},
                {0: logits},
                [{0: batch, 2: capacity}] * len(past),
            ),
            verbose=False,
        )
    if program is None:
        raise CheckpointError("torch.onnx.export returned no graph")
    model = program.model
    _check_operators(model.graph, config)
    strip_metadata(model)
    return model


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write a graph and, beside it, its weights as external data, which is memory-mapped when it is loaded."""
    onnx_ir.save(model, path, external_data=f"{path.name}.data")


def _check_operators(graph: onnx_ir.Graph, config: CheckpointConfig) -> None:
    """Count the operators that carry the model: another tracer that decomposed them would make a slow graph."""
    counts = Counter(node.op_type for node in graph)
    expected = {
        "GroupQueryAttention": config.n_layer,
        "LayerNormalization": 2 * config.n_layer + 1,
        "MatMul": 4 * config.n_layer,
        "Gemm": 1,
        "Gather": 4,  # tokens, positions, and twice those whose logits are wanted
    }
    for operator, count in expected.items():
        if counts[operator] != count:
            raise CheckpointError(
                f"torch {torch.__version__} traced {counts[operator]} {operator} operators where {count} belong: "
                "export with torch 2.13"
            )


def strip_metadata(model: onnx_ir.Model) -> None:
    """Remove stack traces and other notes of the tracer, which hold paths of the machine it ran on."""
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "gpt2-edge", VERSION, None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.name = "gpt2"
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracer's warnings about its own internals off the user's terminal."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "optimum", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
