"""`gpt2-edge score`: how likely a model finds each text."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from gpt2_edge.commands.arguments import add_model_arguments, decode_utf8
from gpt2_edge.commands.documents import STANDARD_INPUT, Document, document_batches
from gpt2_edge.errors import Gpt2EdgeError, LogitsError, PromptError
from gpt2_edge.progress import Progress
from gpt2_edge.results import Score

if TYPE_CHECKING:
    from gpt2_edge.model import Model

_BAR_STEPS: Final = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    add_model_arguments(parser)
    parser.add_argument(
        "files", metavar="FILE", nargs="*", default=[STANDARD_INPUT], help="texts, UTF-8; standard input without any"
    )
    parser.add_argument("--lines", action="store_true", help="each line is a document, instead of each FILE")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="score a text that is longer than the context in windows that begin N tokens apart (default: half of it)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line, with the tokens' log-probabilities"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each document; one that cannot be scored gets a line on standard error."""
    from gpt2_edge.model import load
    from gpt2_edge.scoring import check_stride

    with load(arguments.folder, device=arguments.device, threads=arguments.threads) as model:
        # Before any document is read: a wrong option is not a document's fault.
        check_stride(arguments.stride, model.context_length)
        with _Output(_total_bytes(arguments.files)) as output:
            report = _JsonLines(output) if arguments.json else _Table(output)
            for documents in document_batches(arguments.files, arguments.lines):
                output.begin(sum(len(document.data) for document in documents))
                outcomes = _score(model, documents, arguments.stride, output)
                for document, outcome in zip(documents, outcomes, strict=True):
                    if isinstance(outcome, Score):
                        report.add(document.name, outcome)
                    else:
                        report.add_failure(document.name, outcome)
            report.finish()
    return 1 if report.failed else 0


def _total_bytes(paths: Sequence[str]) -> int | None:
    """Return how much there is to read; None if standard input is a pipe and does not say."""
    total = 0
    for path in paths:
        try:
            size = os.fstat(sys.stdin.fileno()).st_size if path == STANDARD_INPUT else Path(path).stat().st_size
        except OSError:
            size = 0  # it gets its message when it is its turn
        if path == STANDARD_INPUT and size == 0:
            return None
        total += size
    return total


def _score(
    model: "Model", documents: Sequence[Document], stride: int | None, output: "_Output"
) -> list[Score | Gpt2EdgeError]:
    """Score documents together; return for each its score, or why it has none."""
    outcomes: dict[int, Score | Gpt2EdgeError] = {}
    texts: dict[int, list[int]] = {}
    for index, document in enumerate(documents):
        try:
            texts[index] = _tokens(model, document)
        except PromptError as error:
            outcomes[index] = error
    total_bytes, scored_tokens = sum(len(each.data) for each in documents), sum(map(len, texts.values())) - len(texts)
    scores = _score_texts(
        model, list(texts.values()), stride, lambda count: output.advance(total_bytes * count / scored_tokens)
    )
    outcomes.update(zip(texts, scores, strict=True))
    return [outcomes[index] for index in range(len(documents))]


def _score_texts(
    model: "Model", texts: list[list[int]], stride: int | None, on_scored: Callable[[int], object]
) -> Sequence[Score | LogitsError]:
    if not texts:
        return []
    try:
        return model.score(texts, stride=stride, on_scored=on_scored)
    except LogitsError as error:
        if len(texts) == 1:
            return [error]
        # Whose fault it is shows when each is alone.
        return [outcome for text in texts for outcome in _score_texts(model, [text], stride, lambda count: None)]


def _tokens(model: "Model", document: Document) -> list[int]:
    """Return the tokens of a document.

    Raises:
        PromptError: It cannot be read, is not UTF-8, or has fewer than two tokens.
    """
    from gpt2_edge.scoring import check_scorable

    if document.error is not None:
        raise document.error
    tokens = model.tokenize(decode_utf8(document.data, "the text"))
    check_scorable(tokens, model.context_length)
    return tokens


class _Output:
    """Prints results as they come, and on a terminal a bar below them that shows how much of the input is scored.

    Args:
        total_bytes: Of all documents; None if it is not known, and then there is no bar.
    """

    def __init__(self, total_bytes: int | None) -> None:
        self._total_bytes = total_bytes
        self._bytes_before = 0  # of the documents before these
        self._bytes = 0.0
        self._steps = 0
        self._document_bytes = 0
        self._progress = Progress("score", _BAR_STEPS) if total_bytes and sys.stderr.isatty() else None

    def begin(self, document_bytes: int) -> None:
        """Go on to the next documents, which have so many bytes together."""
        self._bytes_before += self._document_bytes
        self._document_bytes = document_bytes
        self._bytes = self._bytes_before
        self.advance(0)

    def advance(self, scored_bytes: float) -> None:
        """Say that so much more of these documents is scored."""
        self._bytes += scored_bytes
        if self._progress is None or not self._total_bytes:
            return
        while self._steps < math.floor(_BAR_STEPS * self._bytes / self._total_bytes):
            self._progress.advance()
            self._steps += 1

    def print(self, line: str, *, error: bool = False) -> None:
        """Print a line to standard output or standard error."""
        file = sys.stderr if error else sys.stdout
        if self._progress is None:
            print(line, file=file, flush=True)
            return
        from tqdm import tqdm

        tqdm.write(line, file=file)  # moves the bar out of the way
        file.flush()

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, traceback)


class _Report:
    """What is printed about the documents.

    Attributes:
        failed: Whether a document could not be scored.
    """

    def __init__(self, output: _Output) -> None:
        self.failed = False
        self._output = output

    def add(self, name: str, score: Score) -> None:
        """Print the score of a document."""

    def add_failure(self, name: str, error: Gpt2EdgeError) -> None:
        """Say why a document has no score."""
        self.failed = True
        self._output.print(f"gpt2-edge: {name}: {error}", error=True)

    def finish(self) -> None:
        """Print what comes after all documents."""


class _Table(_Report):
    """A row for each document, and one for all together."""

    def __init__(self, output: _Output) -> None:
        super().__init__(output)
        self._documents = self._tokens = self._scored_tokens = 0
        self._total_logprob = 0.0

    def add(self, name: str, score: Score) -> None:
        if not self._documents:
            self._output.print(f"{'tokens':>7}  {'log-probability':>15}  {'perplexity':>10}  document")
        self._documents += 1
        self._tokens += len(score.tokens)
        self._scored_tokens += len(score.logprobs)
        self._total_logprob += score.total_logprob
        self._print_row(len(score.tokens), score.total_logprob, score.perplexity, name)

    def finish(self) -> None:
        if self._documents > 1:
            perplexity = math.exp(-self._total_logprob / self._scored_tokens)
            self._print_row(self._tokens, self._total_logprob, perplexity, f"total of {self._documents} documents")

    def _print_row(self, tokens: int, total_logprob: float, perplexity: float, name: str) -> None:
        self._output.print(f"{tokens:7}  {total_logprob:15.3f}  {perplexity:10.3f}  {name}")


class _JsonLines(_Report):
    """A JSON object for each document, also for one that has no score."""

    def add(self, name: str, score: Score) -> None:
        self._print_object(
            {
                "document": name,
                "tokens": score.tokens,
                "logprobs": score.logprobs,
                "total_logprob": score.total_logprob,
                "perplexity": score.perplexity,
            }
        )

    def add_failure(self, name: str, error: Gpt2EdgeError) -> None:
        super().add_failure(name, error)
        self._print_object({"document": name, "error": str(error)})

    def _print_object(self, document: dict[str, object]) -> None:
        self._output.print(json.dumps(document, ensure_ascii=False))
