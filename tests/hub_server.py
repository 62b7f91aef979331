"""A model hub on this machine: the endpoints that huggingface_hub uses to download a repository.

It answers as huggingface.co does: `/api/models/NAME/revision/REV` lists the files, `/NAME/resolve/REV/FILE` gives a
small file, and redirects a large one to another address, which takes ranges. A renamed repository redirects to its
new name. Every request is written down, and a test may have some of them fail.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

COMMIT: Final = "11c5a3d5811f50298f278a704980280950aedb10"
LARGE_SUFFIXES: Final = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".ot")


@dataclass
class Repository:
    """A repository of one commit.

    Attributes:
        files: Contents by name.
        commit: The hash.
        revisions: Branches and tags.
        token: Which may read it; None if everybody may.
        is_gated: Everybody sees that it exists, and what is in it, but only the token may download.
    """

    files: Mapping[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    is_gated: bool = False


@dataclass
class Hub:
    """The state of the server.

    Attributes:
        repositories: By their names.
        renamed: New names by the old ones.
        failures: Status codes with which the next requests for a path are answered, by a part of the path.
        cut_after: How many bytes of the next answers for a large file are sent, before the connection is cut.
        requests: Method and path of every request, with its range if it has one.
        xet: Where a Xet server is said to have the large files; None if they come by HTTP alone.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    xet: str | None = None
    address: str = ""

    def downloaded(self) -> list[str]:
        """Names of small files and hashes of large ones that were downloaded, once each, in their order."""
        requests = map(str.split, self.requests)
        paths = [path for command, path, *_ in requests if command == "GET" and not path.startswith("api/")]
        return list(dict.fromkeys(path.rpartition("/")[2] for path in paths))


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the server in a thread; `hub.address` is where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        asked_range = self.headers.get("Range")
        self.hub.requests.append(" ".join(filter(None, (self.command, path, asked_range))))
        for part, statuses in self.hub.failures.items():
            if part in path and statuses:
                return self._send(statuses.pop(0), {}, b"")
        match path.split("/"):
            case ["large", sha256]:
                return self._send_large(sha256, asked_range)
            case ["api", "xet-token"]:
                token = {
                    "X-Xet-Cas-Url": self.hub.xet or "",
                    "X-Xet-Access-Token": "t",
                    "X-Xet-Token-Expiration": "9" * 10,
                }
                return self._send(200, token, b"")
            case ["api", "models", *rest]:
                name, _, revision = "/".join(rest).partition("/revision/")
                return self._in_repository(name, revision or "main", None)
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        return self._in_repository(name, revision, file)

    def _in_repository(self, name: str, revision: str, file: str | None) -> None:
        if name in self.hub.renamed:
            return self._send(307, {"Location": self.path.replace(name, self.hub.renamed[name], 1)}, b"")
        repository = self.hub.repositories.get(name)
        has_token = repository is not None and self.headers.get("Authorization") == f"Bearer {repository.token}"
        if repository is None or (repository.token is not None and not has_token and not repository.is_gated):
            # Nobody can tell a private repository from one that is not there.
            return self._refuse(401, "RepoNotFound", "Repository Not Found")
        if repository.is_gated and not has_token and file is not None:
            return self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        if revision not in (repository.commit, *repository.revisions):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file is None:
            siblings = [{"rfilename": name} for name in ("README.md", ".gitattributes", *repository.files)]
            document = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings, "tags": []}
            return self._send(200, {"Content-Type": "application/json"}, json.dumps(document).encode())
        content = repository.files.get(file)
        headers = {"X-Repo-Commit": repository.commit}
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", headers)
        if not Path(file).name.endswith(LARGE_SUFFIXES):
            return self._send(200, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content)
        sha256 = hashlib.sha256(content).hexdigest()
        # The real hub sends large files from other hosts; a name is what makes this one another.
        location = f"{self.hub.address.replace('127.0.0.1', 'localhost')}/large/{sha256}"
        linked = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "Location": location}
        if self.hub.xet is not None:
            linked |= {"X-Xet-Hash": sha256, "X-Xet-Refresh-Route": f"{self.hub.address}/api/xet-token"}
        return self._send(302, headers | linked, b"")

    def _send_large(self, sha256: str, asked_range: str | None) -> None:
        contents = [content for repository in self.hub.repositories.values() for content in repository.files.values()]
        content = next(content for content in contents if hashlib.sha256(content).hexdigest() == sha256)
        assert "Authorization" not in self.headers  # a token is for the hub alone
        start = int(asked_range.removeprefix("bytes=").removesuffix("-")) if asked_range else 0
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if asked_range:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if asked_range else 200, headers, content[start:])

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message}, b"")

    def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.path.startswith("/large/") and self.hub.cut_after:
            content = content[: self.hub.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Stay silent."""
