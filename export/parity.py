"""The gate at the end of an export: the graph against the checkpoint, over several shapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from gpt2_edge.errors import ParityError
from gpt2_edge.export.config import CheckpointConfig
from gpt2_edge.export.reference import reference_logits
from gpt2_edge.export.weights import Weights
from gpt2_edge.graph_names import key_value_names
from gpt2_edge.onnxruntime_import import onnxruntime

_ABSOLUTE_TOLERANCE: Final = 1e-4
# Of the largest logit: large models have logits of over 100. In half precision each rounding is of one part in 2048.
_RELATIVE_TOLERANCES: Final = {"fp32": 1e-5, "fp16": 1e-2}
_SEED: Final = 2019

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the graph: for each row how many tokens are in the cache and how many are new.

    Several new tokens in several rows need an empty cache: that is a limit of the attention kernel.
    """

    past: tuple[int, ...]
    new: tuple[int, ...]


CASES: Final = (
    Case(past=(0,), new=(1,)),
    Case(past=(0,), new=(7,)),
    Case(past=(5,), new=(3,)),
    Case(past=(8,), new=(1,)),
    Case(past=(0, 0, 0), new=(5, 3, 1)),
    Case(past=(5, 3, 1), new=(1, 1, 1)),
)
# A cache of all positions would take more memory than the weights of a small model.
_CAPACITY: Final = max(past + new for case in CASES for past, new in zip(case.past, case.new, strict=True))


@dataclass(frozen=True, slots=True)
class Parity:
    """What the gate measured.

    Attributes:
        cases: How many runs were compared.
        largest_difference: Largest absolute difference of any logit.
        tolerance: What was allowed.
    """

    cases: int
    largest_difference: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a graph has to compute in one case.

    Attributes:
        case: The case.
        rows: Token ids of each row, those in the cache and the new ones.
        logits: After each row's new tokens, row after row, shape [sum of new, vocabulary].
    """

    case: Case
    rows: list[IntArray]
    logits: FloatArray


def expected_logits(
    weights: Weights, config: CheckpointConfig, on_case: Callable[[], object] = lambda: None
) -> list[Expectation]:
    """Compute in plain torch what a graph of the checkpoint has to compute in each case.

    It is done before there is a graph, so that the weights of a large checkpoint need not lie in memory beside those
    of its graph.

    Args:
        weights: The checkpoint's weights.
        config: Its config.
        on_case: Called after each case.

    Returns:
        The cases that fit into the checkpoint's context.
    """
    random = np.random.default_rng(_SEED)
    expected = []
    for case in CASES:
        if max(map(sum, zip(case.past, case.new, strict=True))) <= config.n_positions:
            rows = [
                random.integers(0, config.vocab_size, past + new) for past, new in zip(case.past, case.new, strict=True)
            ]
            logits = [
                reference_logits(weights, config, torch.from_numpy(row))[past:].numpy()
                for row, past in zip(rows, case.past, strict=True)
            ]
            expected.append(Expectation(case, rows, np.concatenate(logits)))
        on_case()
    return expected


def check_parity(
    graph_path: Path,
    config: CheckpointConfig,
    expected: Sequence[Expectation],
    on_case: Callable[[], object] = lambda: None,
    precision: str = "fp32",
) -> Parity:
    """Compare the logits of a graph with those of the checkpoint in plain torch.

    Args:
        graph_path: The exported graph.
        config: The checkpoint's config.
        expected: What `expected_logits` computed from the checkpoint.
        on_case: Called after each case.
        precision: Of the graph, "fp32" or "fp16".

    Raises:
        ParityError: They differ by more than 1e-4, or 1e-5 of the largest logit if that is more; in half precision by
            more than 1 % of it.
    """
    return compare(_Graph(graph_path, config), expected, on_case, precision)


class ComparedGraph(Protocol):
    """A graph that runs the cases."""

    def logits(self, rows: list[IntArray], case: Case) -> FloatArray:
        """Return the logits after each row's new tokens, row after row, shape [sum of new, vocabulary]."""


def compare(
    graph: ComparedGraph,
    expected: Sequence[Expectation],
    on_case: Callable[[], object] = lambda: None,
    precision: str = "fp32",
) -> Parity:
    """Compare the logits of a graph with those of the checkpoint; see `check_parity`."""
    largest_difference, tolerance = 0.0, _ABSOLUTE_TOLERANCE
    for one in expected:
        difference = float(np.abs(graph.logits(one.rows, one.case) - one.logits).max())
        tolerance = max(tolerance, _RELATIVE_TOLERANCES[precision] * float(np.abs(one.logits).max()))
        largest_difference = max(largest_difference, difference)
        # Written so that NaN fails as well.
        if not difference <= tolerance:
            raise ParityError(
                f"the exported graph differs from the checkpoint by {difference:.2g} in a logit, allowed is "
                f"{tolerance:.2g} (past {one.case.past}, new {one.case.new}): no folder was written; "
                "please report this checkpoint's config.json"
            )
        on_case()
    return Parity(len(expected), largest_difference, tolerance)


class _Graph:
    def __init__(self, path: Path, config: CheckpointConfig) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Each would take another copy of the weights, or keep the largest buffers of all that follow.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._config = config
        self._past_names, self._present_names = key_value_names(config.n_layer)
        cache_input = next(node for node in self._session.get_inputs() if node.name == self._past_names[0])
        self._capacity = cache_input.shape[2] if isinstance(cache_input.shape[2], int) else _CAPACITY
        self._cache_type = np.float16 if cache_input.type == "tensor(float16)" else np.float32

    def logits(self, rows: list[IntArray], case: Case) -> FloatArray:
        """Return the logits after each row's new tokens, row after row, shape [sum of new, vocabulary]."""
        shape = (len(rows), self._config.n_head, self._capacity, self._config.padded_head_size)
        cache = {name: np.zeros(shape, self._cache_type) for name in self._past_names}
        for index, (row, past) in enumerate(zip(rows, case.past, strict=True)):
            if past:
                of_row = {name: values[index : index + 1] for name, values in cache.items()}
                self._run(row[np.newaxis, :past], np.arange(past)[np.newaxis], np.array([past]), [], of_row)
        longest = max(case.new)
        input_ids = np.zeros((len(rows), longest), np.int64)  # shorter rows are padded on the right
        position_ids = np.zeros((len(rows), longest), np.int64)
        wanted: list[int] = []
        for index, (row, past, new) in enumerate(zip(rows, case.past, case.new, strict=True)):
            input_ids[index, :new] = row[past:]
            position_ids[index, :new] = np.arange(past, past + new)
            wanted += range(index * longest, index * longest + new)
        return self._run(input_ids, position_ids, np.add(case.past, case.new), wanted, cache)

    def _run(
        self,
        input_ids: IntArray,
        position_ids: IntArray,
        valid_lengths: IntArray,
        logit_positions: list[int],
        cache: Mapping[str, FloatArray],
    ) -> FloatArray:
        """Compute logits, and update the cache in place: where its capacity is fixed, another may take gigabytes."""
        binding = self._session.io_binding()
        for name, values in {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "seqlens_k": (valid_lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(valid_lengths.max(), np.int32),
            "logit_positions": np.array(logit_positions, np.int64),
        }.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values))
        for past_name, present_name in zip(self._past_names, self._present_names, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(cache[past_name])
            binding.bind_ortvalue_input(past_name, value)
            binding.bind_ortvalue_output(present_name, value)
        logits = np.empty((len(logit_positions), self._config.vocab_size), np.float32)
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(binding)
        return logits
