"""A server on this machine that plays the Hugging Face hub, Google Drive and a storage of plain files.

It answers as ``huggingface_hub`` expects: ``/api/models/ID?blobs=true``, ``/ID/resolve/REVISION/FILE`` with
``ETag``, ``X-Repo-Commit``, ``X-Linked-Size`` and ``X-Linked-Etag``, a redirect to where large files are,
ranges, and for uploads ``repos/create``, ``preupload``, LFS batches and commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "1" * 40
LARGE = (".safetensors", ".bin", ".pth", ".zip", ".tar", ".msgpack")


@dataclass
class Request:
    """What was asked for: the path, from which byte on, and with which token."""

    method: str
    path: str
    start: int
    authorization: str | None


@dataclass
class StandIn:
    """What the server has and how it misbehaves.

    ``cuts`` holds by the end of a path how many bytes the next answers send before the connection breaks;
    ``codes`` a status that is answered instead. ``stated`` changes what is stated of a file's content.
    ``stalls`` holds how many bytes are sent before the server waits for ``go_on``.
    """

    address: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    stated: dict[str, bytes] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)
    go_on: threading.Event = field(default_factory=threading.Event)
    licence: str | None = "mit"
    is_gated: bool = False
    asked: list[Request] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)

    def count(self, ending: str, method: str = "GET") -> int:
        """How often a path with this end was asked for."""
        return sum(r.method == method and r.path.endswith(ending) for r in self.asked)

    def starts(self, ending: str) -> list[int]:
        """From which bytes on a file was sent."""
        return [r.start for r in self.asked if r.method == "GET" and r.path.endswith(ending)]


def git_sum(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    @property
    def state(self) -> StandIn:
        return self.server.state

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        self.state.asked.append(Request(self.command, path, start, self.headers.get("Authorization")))
        return path

    def _answer(self, with_body: bool) -> None:
        path, state = self._note(), self.state
        if code := next((c for end, c in state.codes.items() if path.endswith(end)), None):
            return self._send(code, b"{}")
        if found := re.match(r"/api/(model|dataset)s/([^/]+/[^/]+)", path):
            return self._send_info(found[2])
        if found := re.match(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = state.repositories.get(found[1], {}).get(found[2])
            return self._send(404, b"") if data is None else self._send_file(path, data, with_body, found[2])
        if path.startswith("/large/"):
            return self._send_bytes(path, state.files[path], with_body, {})
        if path in state.files:
            return self._send_plain(path, state.files[path], with_body)
        return self._send(404, b"")

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_info(self, name: str) -> None:
        state = self.state
        if state.is_gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if name not in state.repositories:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        siblings = []
        for path, data in state.repositories[name].items():
            stated = state.stated.get(path, data)
            entry: dict[str, Any] = {"rfilename": path, "size": len(stated), "blobId": git_sum(stated)}
            if path.endswith(LARGE):
                digest = hashlib.sha256(stated).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(stated), "pointerSize": 134}
            siblings.append(entry)
        tags = [f"license:{state.licence}"] if state.licence else []
        return self._send_json(
            {
                "id": name,
                "sha": REVISION,
                "tags": tags,
                "siblings": siblings,
                "private": False,
                "downloads": 0,
            }
        )

    def _send_file(self, path: str, data: bytes, with_body: bool, name: str) -> None:
        etag = hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else git_sum(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "X-Linked-Size": str(len(data))}
        if not name.endswith(LARGE):
            return self._send_bytes(path, data, with_body, headers)
        place = f"/large/{etag}/{name}"
        self.state.files[place] = data
        # Another host than the hub's, as where it stores large files.
        elsewhere = self.state.address.replace("127.0.0.1", "localhost")
        more = {"Location": f"{elsewhere}{place}", "X-Linked-Etag": f'"{etag}"'}
        return self._send(302, b"", headers | more)

    def _send_plain(self, path: str, data: bytes, with_body: bool) -> None:
        stated = self.state.stated.get(path, data)
        md5 = base64.b64encode(hashlib.md5(stated).digest()).decode()
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"}
        if path.startswith("/drive/"):
            # As the drive sends a file, and not a page that asks first.
            headers["Content-Type"] = "application/octet-stream"
            headers["Content-Disposition"] = 'attachment; filename="a.bin"'
        if self.headers.get("If-Range") not in (None, headers["ETag"]):
            del self.headers["Range"]
        return self._send_bytes(path, data, with_body, headers)

    def _send_bytes(self, path: str, data: bytes, with_body: bool, headers: dict[str, str]) -> None:
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        if start and start >= len(data):
            return self._send(416, b"")
        body = data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return None
        cuts = next((c for end, c in self.state.cuts.items() if path.endswith(end) and c), None)
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        if stall := next((n for end, n in self.state.stalls.items() if path.endswith(end)), 0):
            self.wfile.write(body[:stall])
            self.wfile.flush()
            self.state.go_on.wait(60)
            self.close_connection = True
            return None
        self.wfile.write(body)
        return None

    # ------------------------------------------------------------ uploads

    def do_PUT(self) -> None:
        path = self._note()
        self.state.uploads[path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, b"")

    def do_POST(self) -> None:
        path, state = self._note(), self.state
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if code := next((c for end, c in state.codes.items() if path.endswith(end)), None):
            return self._send(code, b"{}")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            state.created.append(asked)
            state.repositories.setdefault(name, {})
            return self._send_json({"url": f"{state.address}/{name}", "id": name})
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
            return self._send_json({"files": files})
        if path.endswith("/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{state.address}/put/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self._send_json({"transfer": "basic", "objects": objects})
        if found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", path):
            self._commit(state.repositories[found[1]], body)
            url = f"{state.address}/{found[1]}/commit/{REVISION}"
            return self._send_json({"commitUrl": url, "commitOid": REVISION})
        return self._send(404, b"{}")

    def _commit(self, repository: dict[str, bytes], body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository[value["path"]] = self.state.uploads[value["oid"]]


@contextmanager
def serve() -> Iterator[StandIn]:
    """The server, on a free port."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.state = StandIn(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.state
    finally:
        server.shutdown()
        server.server_close()


class FakeGdown(SimpleNamespace):
    """``gdown`` as far as it is used: it reads a stand-in's ``/drive/ID``, and keeps what has arrived in a
    file beside the output, which it goes on with."""

    def __init__(self, state: StandIn, folders: dict[str, dict[str, str]]) -> None:
        super().__init__(state=state, folders=folders)

    def download_folder(self, id: str, skip_download: bool, quiet: bool, use_cookies: bool) -> list[Any]:
        assert (skip_download, quiet, use_cookies) == (True, True, False)
        listed = self.folders[id]
        return [
            SimpleNamespace(id=i, path=f"editing-data/{name}", local_path=name) for name, i in listed.items()
        ]

    def download(
        self,
        id: str,
        output: str,
        quiet: bool,
        use_cookies: bool,
        resume: bool,
        timeout: float,
        progress: Any,
    ) -> str:
        import os
        import urllib.request

        assert (quiet, use_cookies, resume) == (True, False, True)
        part = f"{output}abcdefgh.part"
        had = os.path.getsize(part) if os.path.exists(part) else 0
        headers = {"Range": f"bytes={had}-"} if had else {}
        asked = urllib.request.Request(f"{self.state.address}/drive/{id}", headers=headers)
        with urllib.request.urlopen(asked, timeout=timeout) as response, open(part, "ab") as file:
            expected = had + int(response.headers["Content-Length"])
            while block := response.read(1 << 12):
                file.write(block)
                had += len(block)
                progress(had, expected)
        if had < expected:
            raise RuntimeError(f"Download is incomplete: received {had} bytes\nThe received bytes are kept")
        os.rename(part, output)
        return output
