"""The facade: load a model folder, generate, stream, look at the next token, score."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, Unpack, cast, overload

import numpy as np

from gpt2_edge.async_threads import AsyncThreads
from gpt2_edge.checked_loading import VerifyHashes, checked
from gpt2_edge.core import ModelCore, Prompt, row_seeds
from gpt2_edge.device import Device, open_session, parse_device
from gpt2_edge.engine import Engine
from gpt2_edge.errors import OptionError, PromptError
from gpt2_edge.folder import TOKENIZER_NAME, open_folder
from gpt2_edge.generation import GenerationRow, LogitsRow, NextTokenRow
from gpt2_edge.manifest import Manifest
from gpt2_edge.options import GenerationOptions, OptionKeywords, checked_integer
from gpt2_edge.results import Generation, NextToken, Piece, Score
from gpt2_edge.scoring import score_texts
from gpt2_edge.session import Logits
from gpt2_edge.session_file import SessionState, read_session
from gpt2_edge.signature import check_signature
from gpt2_edge.standard_folder import is_unsealed, open_unsealed, warn_of_unsealed
from gpt2_edge.stream import TextStream
from gpt2_edge.text_session import Session
from gpt2_edge.threads import usable_cores
from gpt2_edge.tokenizer import Tokenizer

PromptList = list[str] | list[list[int]] | list[str | list[int]]

_MAXIMUM_THREADS: Final = 1024  # ONNX Runtime takes any number, and a process that asks for a million dies


def load(
    folder: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    verify_hashes: VerifyHashes = True,
    public_key: str | Path | bytes | None = None,
    verify_machine: bool = False,
) -> "Model":
    """Load a model.

    Args:
        folder: Path of a model folder or a pack, or "storyteller" for the bundled model.
        device: "cpu"; "cuda" for the first NVIDIA GPU, "cuda:1" for the second; or "auto" for a GPU if there is one
            that runs this folder and the CPU otherwise. `Model.device_reason` says why.
        threads: Threads that compute; None takes the cores that this process may really use.
        verify_hashes: Compare every file with the manifest's SHA-256 before it is used. "changed" skips files that were
            compared on this machine before and that nobody has touched since.
        public_key: Refuse a folder that the owner of this Ed25519 key did not sign: a PEM file, or its content.
        verify_machine: Compare what this machine computes with the folder's golden logits, once for each folder,
            ONNX Runtime and processor: see `docs/quality.md`.

    Returns:
        A model, which may be used from many threads. Close it, or use it in a `with` block, to free its memory.

    Raises:
        ModelFolderError: The folder is not a model folder, is damaged, or cannot be run.
        DeviceError: The GPU that was asked for cannot be used, or the device cannot run this folder.
        OptionError: The device or the number of threads is not allowed.
        MachineError: This machine does not compute what the folder should.
    """
    parse_device(device)
    threads = usable_cores() if threads is None else checked_integer("threads", threads, 1, _MAXIMUM_THREADS)
    if str(folder).startswith("~"):
        folder = _at_home(folder)
    if is_unsealed(folder):
        warn_of_unsealed(folder)
        opened = open_unsealed(folder)
    else:
        opened = open_folder(folder)
    if public_key is not None:
        if verify_hashes is False:
            raise OptionError("public_key needs verify_hashes: a signature is over the hashes of the files")
        check_signature(opened, public_key)
    with checked(opened, verify_hashes):
        session, chosen = open_session(opened, device, threads)
        tokenizer = Tokenizer(opened.content(TOKENIZER_NAME))
    core = ModelCore(opened.manifest, tokenizer, Engine(session))
    model = Model(core, chosen, threads, (folder, device, threads, verify_hashes, public_key))
    if verify_machine:
        from gpt2_edge.machine_check import ensure_machine, read_golden

        try:
            ensure_machine(model, read_golden(opened))
        except BaseException:
            model.close()
            raise
    return model


def _at_home(folder: str | Path) -> str | Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # nobody knows where that is: it is no model folder, and the message says its name
        return folder


class Model:
    """A loaded GPT-2; made by `load`.

    A model may be used from many threads at once: they share steps. A process that was forked after `load` has to
    load its own; a pickled model is loaded again where it is unpickled.

    Attributes:
        device: Where it runs: "cpu", or "cuda:0" and so on.
        device_reason: Why it runs there.
        manifest: What the model folder says about itself.
        threads: Threads that compute a step.
    """

    def __init__(self, core: ModelCore, device: Device, threads: int, loaded_with: tuple[Any, ...]) -> None:
        self.device = device.name
        self.device_reason = device.reason
        self.manifest: Manifest = core.manifest
        self.threads = threads
        self._core = core
        self._loaded_with = loaded_with
        self._async_threads = AsyncThreads()

    @property
    def context_length(self) -> int:
        """How many tokens the model can hold, prompt and continuation together."""
        return self._core.facts.context_length

    @overload
    def generate(self, prompt: Prompt, *, n: None = None, **options: Unpack[OptionKeywords]) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        n: int,
        row_options: Sequence[OptionKeywords] | None = None,
        **options: Unpack[OptionKeywords],
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompt: PromptList,
        *,
        n: None = None,
        row_options: Sequence[OptionKeywords] | None = None,
        **options: Unpack[OptionKeywords],
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | PromptList,
        *,
        n: int | None = None,
        row_options: Sequence[OptionKeywords] | None = None,
        **options: Unpack[OptionKeywords],
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several side by side.

        Args:
            prompt: Text or token ids; an empty text starts from end-of-text, as a new document does. Or a list of
                prompts, of any lengths; an empty list is refused, since it may be no prompts or no tokens.
            n: So many samples of one prompt, as a list.
            row_options: For each prompt of a list, or each sample, what differs from the options given for all: as in
                `generate(["One", "Two"], max_new_tokens=20, row_options=[{}, {"stop": ["."], "seed": 7}])`.
            **options: See `GenerationOptions`. In a list each row has a seed of its own, derived from the given
                one; the first row's is the given one.

        Returns:
            The continuation, or a list of them in the order of the prompts.

        Raises:
            OptionError: An option is unknown or has a value that is not allowed.
            PromptError: A prompt is not text or token ids of this model; `ContextLengthError` if it is too long.
            LogitsError: The model computed NaN, or the options or the logits processor leave no token.
            ModelClosedError: The model was closed.
        """
        if isinstance(prompt, list | tuple) and not prompt:
            raise PromptError(
                f"the prompt is {prompt!r}, which may be no prompts or a prompt of no tokens: "
                'give "" to start from end-of-text'
            )
        rows = self._generation_rows(prompt, n, options, row_options)
        self._core.run(rows)
        results = [row.result() for row in rows]
        return results[0] if n is None and _list_of_prompts(prompt) is None else results

    def stream(self, prompt: Prompt, **options: Unpack[OptionKeywords]) -> TextStream:
        """Continue a prompt piece by piece: the same options and the same text as `generate`.

        Args:
            prompt: Text or token ids.
            **options: See `GenerationOptions`.

        Returns:
            An iterator of pieces. Nothing is computed before the first is asked for, and closing it stops.

        Raises:
            OptionError: An option is unknown or has a value that is not allowed.
            PromptError: The prompt is not text or token ids of this model; `ContextLengthError` if it is too long.
        """
        _check_single(prompt, "stream continues one prompt: give generate the list, or open a stream for each")
        (row,) = self._generation_rows(prompt, None, options)
        return TextStream(self._core.engine, row)

    async def agenerate(self, prompt: Prompt, **options: Unpack[OptionKeywords]) -> Generation:
        """Continue a prompt as `generate` does, in another thread; the event loop goes on meanwhile.

        Cancelling the task stops the generation.
        """
        _check_single(prompt, "agenerate continues one prompt: gather one call for each")
        self._core.engine.check_usable()
        (row,) = await self._async_threads.run(self._generation_rows, prompt, None, options)
        try:
            await self._async_threads.run(self._core.run, [row])
        finally:
            self._core.engine.leave([row])
        return row.result()

    async def astream(self, prompt: Prompt, **options: Unpack[OptionKeywords]) -> AsyncIterator[Piece]:
        """Continue a prompt as `stream` does, computing in another thread; the event loop goes on meanwhile.

        Cancelling the task, or leaving the loop and closing the iterator, stops the generation.
        """
        self._core.engine.check_usable()
        with await self._async_threads.run(partial(self.stream, prompt, **options)) as stream:
            while (piece := await self._async_threads.run(next, stream, None)) is not None:
                yield piece

    def next_tokens(self, prompt: Prompt, k: int = 10) -> list[NextToken]:
        """Return the k likeliest next tokens with their probabilities, the likeliest first.

        Args:
            prompt: Text or token ids.
            k: How many; at most the vocabulary.

        Raises:
            OptionError: k is not allowed.
            PromptError: The prompt cannot be used.
        """
        _check_single(prompt, "next_tokens looks after one prompt: call it for each")
        return self._core.next_tokens(NextTokenRow(self._core.prompt_tokens(prompt)), k)

    @overload
    def score(self, text: Prompt, *, stride: int | None = None, on_scored: Callable[[int], object] = ...) -> Score: ...
    @overload
    def score(
        self, text: PromptList, *, stride: int | None = None, on_scored: Callable[[int], object] = ...
    ) -> list[Score]: ...
    def score(
        self,
        text: Prompt | PromptList,
        *,
        stride: int | None = None,
        on_scored: Callable[[int], object] = lambda count: None,
    ) -> Score | list[Score]:
        """Return the log-probability of each token of a text but the first, given those before it.

        A text that is longer than the context is scored in overlapping windows: `docs/scoring.md` says which.

        Args:
            text: Text or token ids, at least two tokens. Or a list of texts, each of which is scored as if alone.
            stride: Tokens from the begin of one window to that of the next, from 1 to the context less 1; None takes
                half the context. A smaller one lets the model see more before each token, and takes longer.
            on_scored: Called as the work goes on, with how many more tokens were scored.

        Returns:
            The score, or a list of them in the order of the texts.

        Raises:
            OptionError: The stride is not allowed.
            PromptError: A text cannot be used, or has fewer than two tokens.
        """
        texts = _list_of_prompts(text)
        scores = score_texts(self._core, [cast(Prompt, text)] if texts is None else texts, stride, on_scored)
        return scores[0] if texts is None else scores

    def logits(self, prompt: Prompt) -> Logits:
        """Return the raw logits after every token of a prompt.

        Args:
            prompt: Text or token ids.

        Returns:
            Logits, float32, shape [tokens, vocabulary].

        Raises:
            PromptError: The prompt cannot be used.
        """
        _check_single(prompt, "logits takes one prompt: call it for each")
        row = LogitsRow(self._core.prompt_tokens(prompt))
        self._core.run([row])
        return np.concatenate(row.chunks)

    def session(self) -> Session:
        """Return an empty text session: append, generate, go back, branch, save."""
        return Session(self._core, SessionState())

    def load_session(self, path: str | Path) -> Session:
        """Return a session that `Session.save` wrote.

        Raises:
            SessionError: The file cannot be read, is damaged, or was saved with another model folder.
        """
        return Session(self._core, read_session(Path(path), self.manifest))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._core.tokenizer.encode(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._core.tokenizer.decode(self._core.tokens(tokens))

    def close(self) -> None:
        """Free the model's memory; what is being generated fails. May be called again."""
        self._core.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, self._loaded_with

    def _generation_rows(
        self,
        prompt: Prompt | PromptList,
        n: int | None,
        keywords: OptionKeywords,
        row_keywords: Sequence[OptionKeywords] | None = None,
    ) -> list[GenerationRow]:
        options = self._core.options(keywords)
        if n is not None:
            n = checked_integer("n", n, 1, None)
        prompts = _list_of_prompts(prompt)
        if n is not None and prompts is not None:
            raise OptionError("n is for one prompt: repeat the prompts in the list instead")
        if prompts is None:
            token_lists = [self._core.prompt_tokens(cast(Prompt, prompt))] * (n or 1)
        else:
            token_lists = [self._core.prompt_tokens(each) for each in prompts]
        seeds = row_seeds(options.seed, len(token_lists))
        each_options = [options] * len(token_lists)
        if row_keywords is not None:
            each_options = self._options_of_rows(keywords, row_keywords, len(token_lists))
            has_own = [row.get("seed") is not None for row in row_keywords]
            seeds = [
                row_options.seed if own and row_options.seed is not None else derived
                for derived, own, row_options in zip(seeds, has_own, each_options, strict=True)
            ]
        return [
            GenerationRow(tokens, row_options, seed, self._core.facts)
            for tokens, row_options, seed in zip(token_lists, each_options, seeds, strict=True)
        ]

    def _options_of_rows(
        self, keywords: OptionKeywords, row_keywords: Sequence[OptionKeywords], rows: int
    ) -> list[GenerationOptions]:
        if not isinstance(row_keywords, list | tuple) or not all(isinstance(row, Mapping) for row in row_keywords):
            raise OptionError("row_options is not a list of dictionaries: give one with options for each prompt")
        if len(row_keywords) != rows:
            raise OptionError(f"row_options has {len(row_keywords)} entries for {rows} rows: give one for each")
        made = []
        for number, row in enumerate(row_keywords):
            try:
                made.append(self._core.options({**keywords, **row}))
            except OptionError as error:
                raise OptionError(f"row_options[{number}]: {error}") from error
        return made


def _load_again(
    folder: str | Path, device: str, threads: int, verify_hashes: VerifyHashes, public_key: str | Path | bytes | None
) -> Model:
    return load(folder, device=device, threads=threads, verify_hashes=verify_hashes, public_key=public_key)


def _check_single(prompt: Prompt, otherwise: str) -> None:
    if _list_of_prompts(cast(PromptList, prompt)) is not None:
        raise PromptError(otherwise)


def _list_of_prompts(prompt: Prompt | PromptList) -> list[Prompt] | None:
    """Tell a list of prompts, whose first element is a text, a list or an array, from one prompt: None."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return None
    first = cast(object, prompt[0])
    if isinstance(first, str | list | tuple) or (isinstance(first, np.ndarray) and first.ndim > 0):
        return list(cast(Sequence[Prompt], prompt))
    return None
