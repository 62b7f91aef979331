"""Which prompts a fused graph may compute in one run, on the CPU."""

from dataclasses import dataclass
from typing import Final

from gpt2_edge.graph_names import MOST_FEW_TOKENS
from gpt2_edge.graph_reader import Graph

_WHOLE_MATRICES: Final = ("FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulIntegerToFloat")
# Four prompts of 64 tokens in one run save a quarter of the time or more, two of 128 a tenth. The kernels of blocks of
# weights, `MatMulNBits`, read them again for each row, so that there is less to save.
_LONGEST_PROMPT: Final = 64
_LONGEST_PROMPT_OF_BLOCKS: Final = 16


@dataclass(frozen=True, slots=True)
class BatchRule:
    """Says which prompts may be computed in one run, if that gives each the bits that it gets alone.

    Attributes:
        longest_prompt: Longer ones are computed alone.
        most_few_tokens: Up to so many tokens of a row take another branch of the graph than more; 0 if there is one.
    """

    longest_prompt: int
    most_few_tokens: int

    def batch_class(self, tokens: int) -> int | None:
        """Return a number that prompts have in common which may be computed in one run; None: one is computed alone.

        Args:
            tokens: Of the prompt.
        """
        return int(tokens > self.most_few_tokens) if tokens <= self.longest_prompt else None

    def example_lengths(self, batch_class: int) -> list[int]:
        """Return lengths of prompts to find out with whether a row of a class gets the bits that it gets alone.

        The first is as short as can be: products with one row often have a kernel of their own.
        """
        shortest, longest = (self.most_few_tokens + 1, None) if batch_class else (1, self.most_few_tokens)
        lengths = [shortest, shortest + 4, shortest + 1]
        return lengths if longest is None else [min(length, longest) for length in lengths]


def batch_rule(graph: Graph) -> BatchRule:
    """Return the rule for a graph."""
    nodes = list(graph.all_nodes())
    most_few_tokens = _most_few_tokens(graph) if any(node.operator == "If" for node in nodes) else 0
    if most_few_tokens is None:
        return BatchRule(0, 0)
    has_whole_matrices = any(node.operator in _WHOLE_MATRICES for node in nodes)
    return BatchRule(_LONGEST_PROMPT if has_whole_matrices else _LONGEST_PROMPT_OF_BLOCKS, most_few_tokens)


def _most_few_tokens(graph: Graph) -> int | None:
    """Return where the branches of a graph part; None if it does not say so as ours do."""
    for tensor in graph.initializers:
        if tensor.name == MOST_FEW_TOKENS and tensor.raw is not None:
            return int.from_bytes(tensor.raw, "little", signed=True)
    return None
