"""Download a checkpoint from a model hub: the files that an export needs, and no others.

huggingface_hub does it, with its cache, its resuming of broken downloads and its environment variables (`HF_HOME`,
`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, ...). This module chooses the files, tries again what may pass, and says
in one line what went wrong.
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import huggingface_hub
from huggingface_hub import constants, errors

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.weight_files import is_shard_index, shard_names, weight_file_name, weight_files

CONFIG_NAME: Final = "config.json"
_MAIN: Final = "main"
# `tokenizer.json` says all that the other two say.
_TOKENIZER_FILE: Final = "tokenizer.json"
_VOCABULARY_FILES: Final = ("vocab.json", "merges.txt")
_TOKENIZER_SETTINGS: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

_WAITS_SECONDS: Final = (1.0, 2.0, 4.0)
_PASSING_STATUS: Final = (429, 500, 502, 503, 504)

# What huggingface_hub speaks HTTP with: the first before its 1.0, the last from its 2.0 on.
_HTTP_PACKAGES: Final = ("requests", "httpx", "httpx2")
# The base of everything that package raises.
_HttpError: Final[type[Exception]] = [
    errors.HfHubHTTPError,
    *(base for base in errors.HfHubHTTPError.__mro__ if base.__module__.partition(".")[0] in _HTTP_PACKAGES),
][-1]

_Result = TypeVar("_Result")


def download_checkpoint(name: str, revision: str | None = None, offline: bool = False) -> Path:
    """Return the folder of a repository in huggingface_hub's cache, after downloading what is not there yet.

    Where the hub cannot be reached, what was downloaded before is taken, and standard error says so.

    Args:
        name: Such as `gpt2` or `openai-community/gpt2`.
        revision: Branch, tag or commit; None is the main branch.
        offline: Open no connection. `HF_HUB_OFFLINE=1` says the same.

    Raises:
        CheckpointError: There is no such repository or revision, it is private, it has no GPT-2 checkpoint, the hub
            cannot be reached, or the disk is full.
    """
    wanted = revision or _MAIN
    if offline or constants.HF_HUB_OFFLINE:
        return _cached(name, wanted)
    try:
        return _download(name, wanted)
    except _UnreachableError as error:
        try:
            folder = _cached(name, wanted)
        except CheckpointError:
            # It may be a path that was typed wrongly.
            raise CheckpointError(f"{error}; and there is no folder {name} here") from error.__cause__
        print(f"export: {error}; taking what was downloaded before, commit {folder.name}", file=sys.stderr)
        return folder


class _UnreachableError(CheckpointError):
    """The hub does not answer as it should; it may at another time."""


class _BusyError(_UnreachableError):
    """The hub answers that it cannot answer now."""


def _download(name: str, revision: str) -> Path:
    def ask(call: Callable[[], _Result], again: type[CheckpointError]) -> _Result:
        return _ask(call, lambda error: _explain(name, revision, error), again)

    def fetch(file: str, revision: str) -> Path:
        def download() -> str:
            with _plain_http():
                return huggingface_hub.hf_hub_download(name, file, revision=revision)

        return Path(ask(download, again=_UnreachableError))

    # Without a network, this first question should not wait for one.
    information = ask(lambda: huggingface_hub.HfApi().model_info(name, revision=revision), again=_BusyError)
    names = needed_files(name, {sibling.rfilename for sibling in information.siblings or ()})
    # The name of the revision goes into the cache with the first file; the others are of the same commit.
    folder = fetch(CONFIG_NAME, revision).parent
    for file in names:
        path = fetch(file, folder.name)
        if is_shard_index(file):
            for shard in shard_names(path):
                fetch(shard, folder.name)
    return folder


@contextmanager
def _plain_http() -> Iterator[None]:
    """Let huggingface_hub leave hf_xet alone, unless `HF_HUB_DISABLE_XET=0` asks for it.

    Xet takes large files from servers of other names than the hub's. Where a firewall hides them, or they stall, it
    waits in silence for minutes or for ever. HTTP goes on where it broke off, and says what is wrong.
    """
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or "HF_HUB_DISABLE_XET" not in os.environ
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def needed_files(name: str, available: Collection[str]) -> list[str]:
    """Choose what an export needs of the files of a repository, small files first.

    Raises:
        CheckpointError: It has no config, no tokenizer or no weights that can be read.
    """
    weights = weight_file_name(available)
    tokenizer = [_TOKENIZER_FILE] if _TOKENIZER_FILE in available else list(_VOCABULARY_FILES)
    for needed, what in (
        ([CONFIG_NAME], CONFIG_NAME),
        (tokenizer, "tokenizer.json and not both vocab.json and merges.txt"),
        ([weights], "weights as safetensors or pytorch_model.bin"),
    ):
        if not set(needed) <= set(available):
            adapter = ", but an adapter: merge it into its model first" if "adapter_config.json" in available else ""
            raise CheckpointError(f"{name} is not a GPT-2 checkpoint: it has no {what}{adapter}")
    settings = [file for file in _TOKENIZER_SETTINGS if file in available]
    return [CONFIG_NAME, *settings, *tokenizer, *([weights] if weights else [])]


def _cached(name: str, revision: str) -> Path:
    """Return the folder of what was downloaded before."""
    try:
        config = huggingface_hub.hf_hub_download(name, CONFIG_NAME, revision=revision, local_files_only=True)
        folder = Path(config).parent
        needed_files(name, {path.name for path in folder.iterdir()})
        weight_files(folder)
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name} is not a folder, nor a name that a repository may have") from error
    except (errors.LocalEntryNotFoundError, CheckpointError) as error:
        raise CheckpointError(
            f"offline, and {name} at revision {revision} is not, or not wholly, in the cache "
            f"{constants.HF_HUB_CACHE}: export it once with a network"
        ) from error
    return folder


def _ask(
    call: Callable[[], _Result], explain: Callable[[Exception], CheckpointError], again: type[CheckpointError]
) -> _Result:
    """Ask the hub; ask again after a while if the error is of one kind, and explain any other."""
    for wait_seconds in _WAITS_SECONDS:
        try:
            return call()
        except Exception as error:
            refusal = explain(error)
            if not isinstance(refusal, again):
                raise refusal from error
            print(f"export: {refusal}; trying again", file=sys.stderr)
        time.sleep(wait_seconds)
    try:
        return call()
    except Exception as error:
        raise explain(error) from error


def _explain(name: str, revision: str, error: Exception) -> CheckpointError:
    """Say in one line what went wrong; what nobody thought of is raised as it is."""
    hub = constants.ENDPOINT
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    match cause:
        case errors.HFValidationError():
            return CheckpointError(f"{name} is not a folder, nor a name that a repository may have")
        case errors.GatedRepoError():
            return CheckpointError(
                f"{name} is gated: accept its conditions at {hub}/{name}, and set HF_TOKEN to a token of that account"
            )
        case errors.RepositoryNotFoundError():
            token = "with the token in use" if huggingface_hub.get_token() else "without a token"
            return CheckpointError(
                f"there is no folder {name} here, and {hub} shows no repository of that name {token}: check the name, "
                "or set HF_TOKEN to a token that may read it"
            )
        case errors.RevisionNotFoundError():
            return CheckpointError(f"{name} has no revision {revision}: give a branch, a tag or a commit that it has")
        case errors.HfHubHTTPError(response=response) if response is not None:
            status = response.status_code
            if status in _PASSING_STATUS:
                return _BusyError(f"{hub} answers with the error {status}")
            advice = ": set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
            return CheckpointError(f"{hub} answers with the error {status} when asked for {name}{advice}")
        case errors.FileMetadataError():
            return _UnreachableError(f"{hub} does not answer as a model hub does")
        case _HttpError() | ConnectionError() | TimeoutError() | None:
            return _UnreachableError(f"cannot reach {hub}: {_innermost(error)}")
        case OSError(errno=errno.ENOSPC):
            return CheckpointError(
                f"cannot download {name}: the disk of {constants.HF_HUB_CACHE} is full; free some "
                "space, or set HF_HOME to a folder on another disk; what is there already will be used"
            )
        case OSError(errno=None):  # of huggingface_hub, for a file that is shorter than it should be
            return _UnreachableError(f"a download from {hub} broke off")
        case OSError():
            return CheckpointError(f"cannot download {name} to {constants.HF_HUB_CACHE}: {cause.strerror}")
        case RuntimeError():  # of hf_xet, for anything
            return _UnreachableError(f"cannot download from {hub}: {_innermost(error)}")
    raise error


def _innermost(error: BaseException) -> str:
    """Return what an error comes from in the end, such as that a name is unknown or a connection refused."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return text or type(error).__name__
