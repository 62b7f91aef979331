"""`export NAME` downloads from a hub what it needs and no more, and says in one line what went wrong.

huggingface_hub's own client talks to a server on this machine that answers as the hub does.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import huggingface_hub
import pytest
from hub_server import COMMIT, Hub, Repository, serve
from tiny_model import write_checkpoint

import gpt2_edge
from gpt2_edge import CheckpointError
from gpt2_edge.export.source import describe_source, find_checkpoint, is_hub_name
from gpt2_edge.folder import open_folder

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links or /dev/full")

# What openai-community/gpt2 has, in small.
GPT2_FILES: Final[dict[str, bytes]] = {
    "config.json": b'{"model_type": "gpt2"}',
    "flax_model.msgpack": b"flax",
    "generation_config.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "model.safetensors": bytes(range(256)) * 400,
    "onnx/decoder_model.onnx": b"onnx",
    "pytorch_model.bin": b"pickle",
    "rust_model.ot": b"rust",
    "tf_model.h5": b"tensorflow",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"model_max_length": 1024}',
    "vocab.json": b'{"a": 0}',
}
NEEDED: Final = ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
WEIGHTS_SHA256: Final = hashlib.sha256(GPT2_FILES["model.safetensors"]).hexdigest()

DOWNLOAD: Final = """
import sys
from gpt2_edge import Gpt2EdgeError
from gpt2_edge.export.hub import download_checkpoint
name, revision, *offline = sys.argv[1:]
try:
    print(download_checkpoint(name, revision or None, bool(offline)))
except Gpt2EdgeError as error:
    sys.exit(f"refused: {error}")
"""

# Files that are being downloaded lie on a disk that is full.
FULL_DISK: Final = """
from pathlib import Path
open_file = Path.open
def open_on_full_disk(path, *arguments, **options):
    return open_file(Path("/dev/full") if path.suffix == ".incomplete" else path, *arguments, **options)
Path.open = open_on_full_disk
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub({"openai-community/gpt2": Repository(GPT2_FILES)}, {"gpt2": "openai-community/gpt2"})) as hub:
        yield hub


@dataclass
class Client:
    """huggingface_hub in processes of its own, which read the environment when they start."""

    environment: dict[str, str]
    cache: Path

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            timeout=60,
        )

    def download(self, name: str, revision: str = "", *, offline: bool = False, **variables: str) -> Path:
        done = self.run("-c", DOWNLOAD, name, revision, *(["offline"] if offline else []), **variables)
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        return Path(done.stdout.rstrip("\n"))

    def refused(
        self, name: str, revision: str = "", *, offline: bool = False, prelude: str = "", **variables: str
    ) -> str:
        """Return the last line of what was said, which must be the refusal and all of it."""
        done = self.run("-c", prelude + DOWNLOAD, name, revision, *(["offline"] if offline else []), **variables)
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stderr
        self.said = done.stderr
        *_, last = done.stderr.splitlines()
        assert last.startswith("refused: "), done.stderr
        return last.removeprefix("refused: ")


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    removed = ("HF_", "TRANSFORMERS_", "XDG_CACHE_HOME", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return Client(environment | settings | {"NO_PROXY": "127.0.0.1,localhost"}, tmp_path / "home" / "hub")


def contents(folder: Path) -> Mapping[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def free_address() -> str:
    """An address where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_only_what_is_needed_is_downloaded(name: str, hub: Hub, client: Client) -> None:
    folder = client.download(name)
    assert contents(folder) == {file: GPT2_FILES[file] for file in NEEDED}
    assert hub.downloaded() == [*NEEDED[:-1], WEIGHTS_SHA256]
    assert folder.name == COMMIT
    assert client.said == ""  # a progress bar is for terminals


def test_what_is_there_is_not_downloaded_again(hub: Hub, client: Client) -> None:
    folder = client.download("gpt2")
    hub.requests.clear()
    assert client.download("gpt2") == folder
    assert [request for request in hub.requests if request.startswith("GET") and "/api/" not in f"/{request[4:]}"] == []


@pytest.mark.parametrize(
    ("dropped", "added", "expected"),
    [
        (
            ["tokenizer.json"],
            {},
            ["config.json", "tokenizer_config.json", "vocab.json", "merges.txt", "model.safetensors"],
        ),
        (["model.safetensors"], {}, [*NEEDED[:-1], "pytorch_model.bin"]),
        (
            ["tokenizer_config.json"],
            {"added_tokens.json": b"{}", "special_tokens_map.json": b'{"a": 1}', "model.fp16.safetensors": b"half"},
            ["config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "model.safetensors"],
        ),
        (
            ["model.safetensors"],
            {
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
                ).encode(),
                "model-00001-of-00002.safetensors": b"one",
                "model-00002-of-00002.safetensors": b"two",
                "model-00001-of-00001.safetensors": b"of another time",
            },
            [
                *NEEDED[:-1],
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ],
        ),
    ],
    ids=["vocabulary and merges", "pickle only", "old settings, variant weights", "shards"],
)
def test_other_repositories(
    dropped: list[str], added: dict[str, bytes], expected: list[str], hub: Hub, client: Client
) -> None:
    files = {name: content for name, content in (GPT2_FILES | added).items() if name not in dropped}
    hub.repositories["someone/else"] = Repository(files)
    assert contents(client.download("someone/else")) == {name: files[name] for name in expected}


def test_revision_is_resolved_to_its_commit(hub: Hub, client: Client) -> None:
    older = "0" * 39 + "1"
    hub.repositories["openai-community/gpt2"].revisions = ("main", "v1.0", "refs/pr/1", COMMIT)
    assert client.download("openai-community/gpt2", "v1.0").name == COMMIT
    assert client.download("openai-community/gpt2", COMMIT).name == COMMIT
    # Main moves on; the tag, asked for offline, is what it was.
    hub.repositories["openai-community/gpt2"] = Repository(
        GPT2_FILES | {"config.json": b'{"model_type": "gpt2", "n_ctx": 1}'}, commit=older
    )
    assert client.download("openai-community/gpt2").name == older
    assert client.download("openai-community/gpt2", "v1.0", offline=True).name == COMMIT
    assert client.download("openai-community/gpt2", offline=True).name == older


def test_offline_opens_no_connection(hub: Hub, client: Client) -> None:
    message = client.refused("gpt2", offline=True)
    assert "offline, and gpt2 at revision main is not, or not wholly, in the cache" in message
    assert str(client.cache) in message
    assert hub.requests == []
    folder = client.download("gpt2")
    hub.requests.clear()
    assert client.download("gpt2", offline=True) == folder
    assert client.download("gpt2", HF_HUB_OFFLINE="1") == folder
    assert "at revision v2" in client.refused("gpt2", "v2", offline=True)
    (folder / "model.safetensors").unlink()
    assert "not wholly" in client.refused("gpt2", offline=True)
    assert hub.requests == []


def test_connection_that_is_cut_half_way(hub: Hub, client: Client) -> None:
    """What had come is kept: huggingface_hub writes 10 MiB at a time."""
    weights = bytes(range(256)) * 100_000
    hub.repositories["openai-community/gpt2"] = Repository(GPT2_FILES | {"model.safetensors": weights})
    hub.cut_after = [15_000_000, 3_000_000, 12_000_000]
    assert contents(client.download("gpt2"))["model.safetensors"] == weights
    assert [request.partition(" bytes=")[2] for request in hub.requests if request.startswith("GET large")] == [
        "",
        f"{10 * 2**20}-",
        f"{10 * 2**20}-",
        f"{20 * 2**20}-",
    ]


@pytest.mark.skipif(
    tuple(map(int, huggingface_hub.__version__.split(".")[:2])) >= (1, 18),
    reason="this huggingface_hub begins a file anew in each run",
)
def test_download_is_resumed_by_the_next_run(hub: Hub, client: Client) -> None:
    """A first run that was killed left the beginning of the file."""
    blobs = client.cache / "models--openai-community--gpt2" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{WEIGHTS_SHA256}.incomplete").write_bytes(GPT2_FILES["model.safetensors"][:50_000])
    folder = client.download("openai-community/gpt2")
    assert (folder / "model.safetensors").read_bytes() == GPT2_FILES["model.safetensors"]
    assert f"GET large/{WEIGHTS_SHA256} bytes=50000-" in hub.requests


def test_large_files_come_by_http_where_the_hub_has_them_in_xet_too(hub: Hub, client: Client) -> None:
    pytest.importorskip("hf_xet")
    weights = bytes(range(256)) * 100_000
    hub.repositories["openai-community/gpt2"] = Repository(GPT2_FILES | {"model.safetensors": weights})
    hub.xet = free_address()
    hub.cut_after = [15_000_000]
    assert contents(client.download("openai-community/gpt2"))["model.safetensors"] == weights
    assert hub.requests[-1].endswith(f" bytes={10 * 2**20}-")
    assert "GET api/xet-token" not in hub.requests


def test_xet_for_those_who_ask_for_it(hub: Hub, client: Client) -> None:
    pytest.importorskip("hf_xet")
    hub.xet = free_address()
    hub.failures["api/xet-token"] = [418] * 100
    assert "answers with the error 418" in client.refused("openai-community/gpt2", HF_HUB_DISABLE_XET="0")


@pytest.mark.parametrize("part", ["api/models", "resolve/main/config.json", "large"])
def test_busy_hub_is_asked_again(part: str, hub: Hub, client: Client) -> None:
    hub.failures[part] = [503]
    assert contents(client.download("gpt2")).keys() == set(NEEDED)
    assert hub.failures[part] == []


def test_hub_that_stays_busy(hub: Hub, client: Client) -> None:
    hub.failures["api/models"] = [503] * 100
    message = client.refused("gpt2")
    assert message == f"{hub.address} answers with the error 503; and there is no folder gpt2 here"
    assert client.said.count("trying again") == 100 - len(hub.failures["api/models"]) - 1 > 0


def test_no_network(hub: Hub, client: Client) -> None:
    nowhere = free_address()
    message = client.refused("gpt2", HF_ENDPOINT=nowhere)
    cause = f"cannot reach {nowhere}: Connection refused"
    assert message == f"{cause}; and there is no folder gpt2 here"
    folder = client.download("gpt2")
    assert client.download("gpt2", HF_ENDPOINT=nowhere) == folder
    assert client.said == f"export: {cause}; taking what was downloaded before, commit {COMMIT}\n"


def test_name_that_does_not_resolve(client: Client) -> None:
    message = client.refused("gpt2", HF_ENDPOINT="http://hub.invalid")
    assert message.startswith("cannot reach http://hub.invalid: ")


def test_repository_that_is_not_there(hub: Hub, client: Client) -> None:
    message = client.refused("gtp2")
    assert message == (
        f"there is no folder gtp2 here, and {hub.address} shows no repository of that name without a token: check the "
        "name, or set HF_TOKEN to a token that may read it"
    )


def test_private_repository_needs_its_token(hub: Hub, client: Client) -> None:
    hub.repositories["me/mine"] = Repository(GPT2_FILES, token="hf_secret")
    assert "without a token" in client.refused("me/mine")
    assert "with the token in use" in client.refused("me/mine", HF_TOKEN="hf_wrong")
    assert contents(client.download("me/mine", HF_TOKEN="hf_secret")).keys() == set(NEEDED)


def test_gated_repository_needs_an_agreement(hub: Hub, client: Client) -> None:
    hub.repositories["them/theirs"] = Repository(GPT2_FILES, token="hf_secret", is_gated=True)
    assert client.refused("them/theirs") == (
        f"them/theirs is gated: accept its conditions at {hub.address}/them/theirs, and set HF_TOKEN to a token of "
        "that account"
    )
    assert contents(client.download("them/theirs", HF_TOKEN="hf_secret")).keys() == set(NEEDED)


def test_unknown_revision(client: Client) -> None:
    assert client.refused("gpt2", "v9") == ("gpt2 has no revision v9: give a branch, a tag or a commit that it has")


@pytest.mark.parametrize("status", [401, 403, 404, 418])
def test_other_answers(status: int, hub: Hub, client: Client) -> None:
    hub.failures["api/models"] = [status]
    message = client.refused("gpt2")
    assert f"{hub.address} " in message
    assert str(status) in message or "no repository" in message


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["README.md"], "it has no config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "but an adapter: merge it"),
        (["config.json", "model.safetensors", "vocab.json"], "not both vocab.json and merges.txt"),
        (["config.json", "tokenizer.json", "tf_model.h5"], "no weights as safetensors or pytorch_model.bin"),
    ],
)
def test_repository_that_is_no_checkpoint(files: list[str], said: str, hub: Hub, client: Client) -> None:
    hub.repositories["a/b"] = Repository(dict.fromkeys(files, b"{}"))
    assert said in client.refused("a/b")
    assert hub.downloaded() == []


@posix_only
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(client: Client) -> None:
    message = client.refused("gpt2", prelude=FULL_DISK)
    assert message.startswith(f"cannot download gpt2: the disk of {client.cache} is full; free some space")


def test_cache_that_cannot_be_written(client: Client, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the cache should be")
    assert "cannot download gpt2 to" in client.refused("gpt2")


@pytest.mark.parametrize(
    ("given", "is_name"),
    [
        ("gpt2", True),
        ("openai-community/gpt2", True),
        ("cerebras/Cerebras-GPT-111M", True),
        ("./gpt2", False),
        ("../gpt2", False),
        ("/gpt2", False),
        ("a/b/c", False),
        ("gpt2/", False),
        ("a\\b", False),
        ("~/gpt2", False),
        ("gpt2\n", False),
        ("", False),
        (Path("gpt2"), False),
    ],
)
def test_what_may_be_a_name(given: str | Path, is_name: bool) -> None:
    assert is_hub_name(given) == is_name


def test_folder_comes_before_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert find_checkpoint("gpt2") == Path("gpt2")
    with pytest.raises(CheckpointError, match="gpt2 is a folder here, which has no revision v1"):
        find_checkpoint("gpt2", revision="v1")
    (tmp_path / "file").write_text("")
    for given in ("file", Path("nowhere"), "./nowhere"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            find_checkpoint(given)


def test_export_of_a_name(hub: Hub, client: Client, tmp_path: Path) -> None:
    """The whole way, on the command line; then again from the cache's folder of links, offline."""
    write_checkpoint(tmp_path / "checkpoint")
    files = contents(tmp_path / "checkpoint")
    hub.repositories["openai-community/gpt2"] = Repository(files | {"tf_model.h5": b"tensorflow"}, revisions=("v1",))
    done = client.run("-m", "gpt2_edge", "export", "gpt2", "-o", str(tmp_path / "model"), "--revision", "v1")
    assert done.returncode == 0, done.stderr
    source = open_folder(tmp_path / "model").manifest.source
    assert source == {
        "name": "gpt2",
        "revision": COMMIT,
        "sha256": {"model.safetensors": hashlib.sha256(files["model.safetensors"]).hexdigest()},
    }
    with gpt2_edge.load(tmp_path / "model", threads=1) as model:
        assert len(model.generate([1], max_new_tokens=3, ignore_eos=True).tokens) == 3
    cached = client.cache / "models--gpt2" / "snapshots" / COMMIT
    if sys.platform != "win32":
        assert (cached / "model.safetensors").is_symlink()
    assert describe_source(cached) == source
    assert "tf_model.h5" not in contents(cached)
    failed = client.run("-m", "gpt2_edge", "export", "gtp2", "-o", str(tmp_path / "new" / "model"))
    assert failed.returncode == 1
    assert failed.stderr.startswith("gpt2-edge: there is no folder gtp2 here, and ")
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


@posix_only
def test_damaged_file_of_the_cache(client: Client, tmp_path: Path) -> None:
    folder = client.download("openai-community/gpt2")
    assert describe_source(folder)["sha256"] == {"model.safetensors": WEIGHTS_SHA256}
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_SHA256} is damaged"):
        describe_source(folder)
    # Copied out of the cache, a file has no name to be compared with.
    shutil.copytree(folder, tmp_path / "copy")
    assert describe_source(tmp_path / "copy")["name"] == "copy"
