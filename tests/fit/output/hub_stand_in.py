"""A stand-in for the Hugging Face Hub on this machine: as much of its HTTP interface as an upload needs.

It answers who is logged in, makes repositories, says which files go through LFS (those of tensors), takes these, and
takes commits. Nothing leaves the machine.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class HubStandIn(ThreadingHTTPServer):
    """A Hub with nothing in it.

    Attributes:
        files: Content of every file, by repository and path.
        private: Whether a repository is private, by its name.
        asked: Every request, as method and path.
        role: Of the token: "write" or "read".
        failing: A part of a path; requests whose path has it are answered with an error of the server's.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.role, self.failing = "write", "nothing at all"
        self.large: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        """Change the files of a repository as the lines of a commit say."""
        files = self.files[repository]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert line["key"] == "header", line


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer({r"/api/whoami-v2": self._whoami, r"/api/models/(.+)/(?:tree|revision)/.+": self._tree})

    def do_POST(self) -> None:
        self._answer(
            {
                r"/api/repos/create": self._create,
                r"/api/validate-yaml": lambda: {"errors": [], "warnings": []},
                r"/api/models/(.+)/preupload/main": self._preupload,
                r"/(.+)\.git/info/lfs/objects/batch": self._batch,
                r"/api/models/(.+)/commit/main": self._commit,
            }
        )

    def do_PUT(self) -> None:
        self._answer({r"/large/(\w+)": self._take})

    def _answer(self, routes: dict[str, Callable[..., Any]]) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        known = path.startswith("/large/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = [(make, match) for route, make in routes.items() if (match := re.fullmatch(route, path))]
        if self.server.failing in path:
            status, answer = 403, {"error": "no <b>room</b> left"}
        elif not known:
            status, answer = 401, {"error": "Invalid credentials"}
        elif not found:
            status, answer = 404, {"error": f"no such address: {path}"}
        else:
            make, match = found[0]
            status, answer = 200, make(*match.groups())
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _whoami(self) -> Any:
        return {"type": "user", "name": "ada", "orgs": [], "auth": {"accessToken": {"role": self.server.role}}}

    def _create(self) -> Any:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name not in self.server.files:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.server.files[name], self.server.private[name] = {}, private
        return {"url": f"{self.server.address}/{name}", "name": name, "id": name}

    def _tree(self, name: str) -> Any:
        files = self.server.files[name]
        if "/revision/" in self.path:
            return {"id": name, "sha": "0" * 40, "siblings": [{"rfilename": path} for path in files]}
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]

    def _preupload(self, _: str) -> Any:
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        return {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]}

    def _batch(self, _: str) -> Any:
        objects = json.loads(self.body)["objects"]
        upload = "{address}/large/{oid}".format
        return {
            "transfer": "basic",
            "objects": [
                one | {"actions": {"upload": {"href": upload(address=self.server.address, oid=one["oid"])}}}
                for one in objects
            ],
        }

    def _take(self, oid: str) -> Any:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        return {}

    def _commit(self, name: str) -> Any:
        self.server.commit(name, [json.loads(line) for line in self.body.splitlines() if line])
        return {"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1" * 40}
