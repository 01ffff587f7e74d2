"""A hub on the loopback interface, as far as a pull request needs one: what huggingface_hub asks of it, and no more.

Of its repositories ``owner/forbidden`` lets nobody propose anything; ``owner/missing`` is not there until it is made.
A commit that is no pull request changes the main branch, which tests look at.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "hf_" + "a" * 34


class Hub(ThreadingHTTPServer):
    """Attributes:
    requests: method and path of all that was asked.
    repositories: id -> the files of its main branch.
    made: id -> the settings of what was made.
    pull_requests: id of the repository, the commit's header, and its files.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.repositories: dict[str, dict[str, bytes]] = {
            "owner/prompts": {"README.md": b"theirs", "model.bin": b"theirs"},
            "owner/forbidden": {},
        }
        self.made: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}
        self.pull_requests: list[tuple[str, dict[str, Any], dict[str, bytes]]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def _asked(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {url.path}")
        size = self.headers.get("Content-Length")
        content = self._chunks() if size is None and self.command != "GET" else self.rfile.read(int(size or 0))
        if self.command == "PUT":
            self.server.stored[hashlib.sha256(content).hexdigest()] = content
            return self._answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(
                {"error": "who are you"}, 401, X_Error_Message="Invalid credentials in Authorization header"
            )
        if url.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if url.path == "/api/repos/create":
            told = json.loads(content)
            name = f"{told.get('organization') or 'owner'}/{told['name']}"
            self.server.made[name] = told
            self.server.repositories.setdefault(name, {".gitattributes": b""})
            return self._answer({"url": f"{self.server.endpoint}/{name}", "name": name})
        if url.path == "/api/whoami-v2":
            return self._answer({"name": "owner", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(/.*)?", url.path)
        name, rest = (match.group(1), match.group(2) or "") if match else ("", "")
        if name not in self.server.repositories:
            return self._answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        main = self.server.repositories[name]
        if rest == "/tree/main":
            files = [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in main.items()]
            return self._answer(files)
        if rest in ("", "/revision/main"):
            return self._answer({"id": name, "sha": "1" * 40, "siblings": []})
        if name == "owner/forbidden":
            return self._answer({"error": "you may not"}, 403, X_Error_Message="you may not propose anything here")
        if rest == "/preupload/main":
            return self._answer({"files": [self._mode(main, one["path"]) for one in json.loads(content)["files"]]})
        if rest == "/info/lfs/objects/batch":
            upload = {"href": f"{self.server.endpoint}/upload"}
            objects = [{**one, "actions": {"upload": upload}} for one in json.loads(content)["objects"]]
            return self._answer({"transfer": "basic", "objects": objects})
        if rest == "/commit/main":
            head, files = self._commit(content)
            if parse_qs(url.query).get("create_pr") != ["1"]:
                main.update(files)
                return self._answer({"commitUrl": "", "commitOid": "2" * 40})
            self.server.pull_requests.append((name, head, files))
            number = len(self.server.pull_requests)
            urls = {
                key: f"{self.server.endpoint}/{name}/{what}"
                for key, what in (("commitUrl", "commit/2"), ("pullRequestUrl", f"discussions/{number}"))
            }
            return self._answer({"commitOid": "2" * 40, **urls})
        return self._answer({"error": f"not here: {self.command} {self.path}"}, 500)

    do_GET = do_POST = do_PUT = _asked  # noqa: N815

    def _mode(self, main: dict[str, bytes], path: str) -> dict[str, Any]:
        """The hub keeps files of tensors apart from the repository, and says which file it has."""
        large = path.endswith((".safetensors", ".bin"))
        found = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        data = main.get(path)
        if data is not None:
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data)
            found["oid"] = hashlib.sha256(data).hexdigest() if large else blob.hexdigest()
        return found

    def _commit(self, content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
        head: dict[str, Any] = {}
        files = {}
        for line in content.splitlines():
            value = json.loads(line)
            match value["key"]:
                case "header":
                    head = value["value"]
                case "file":
                    files[value["value"]["path"]] = base64.b64decode(value["value"]["content"])
                case "lfsFile":
                    files[value["value"]["path"]] = self.server.stored[value["value"]["oid"]]
        return head, files

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found


@contextmanager
def running() -> Iterator[Hub]:
    """The hub, in a thread."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
