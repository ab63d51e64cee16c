"""A stand-in for the Hugging Face Hub on the loopback interface: repositories, commits and access, in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITES, READS = "token-that-writes", "token-that-reads"
LARGE = ".safetensors"  # files that go to the storage for large ones, as the hub has it


@dataclass
class Repository:
    """Its commits, files by name, and the commit of each branch or tag."""

    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files, ref="main"):
        """A commit with exactly these files; returns its name."""
        name = hashlib.sha1(json.dumps([len(self.commits), *sorted(files)]).encode()).hexdigest()
        self.commits[name], self.refs[ref] = dict(files), name
        return name

    def files(self, revision):
        """The commit of a revision, and its files; None without it."""
        name = self.refs.get(revision, revision)
        return (name, self.commits[name]) if name in self.commits else None


class Hub:
    """What the stand-in holds, what it was asked (`log`: method and path), and answers that it is told to give."""

    def __init__(self):
        self.repositories, self.large, self.log, self.address = {}, {}, [], ""
        self.failing = None  # (part of a path, status): such requests fail
        self.cut = 0  # bytes after which downloads break off

    def asked(self, part):
        return [path for _, path in self.log if part in path]


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method):
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((method, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.failing and self.hub.failing[0] in path:
            return self._send(self.hub.failing[1], {"error": "told to fail"})
        if path == "/":
            return self._send(200, {})
        if path == "/api/validate-yaml":
            wrong = b"license: nonsense" in body
            return self._send(400 if wrong else 200, {"errors": [{"message": '"license" must be known'}] * wrong})
        if path.startswith("/large/"):
            self.hub.large[path.removeprefix("/large/")] = body
            return self._send(200, {})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        words = path.removeprefix("/api/models").strip("/").split("/")
        repository = self.hub.repositories.get("/".join(words[:2]).removesuffix(".git"))
        if fault := self._refusal(repository, writes=method == "POST"):
            return fault
        if path.startswith("/api/models/"):
            return self._interface(repository, words[2:3], "/".join(words[3:]), body)
        if words[2:3] == ["resolve"]:
            return self._file(repository, words[3], "/".join(words[4:]))
        return self._large(json.loads(body))  # .git/info/lfs/objects/batch

    @property
    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _refusal(self, repository, *, writes):
        if repository is None or (repository.private and self.token not in (WRITES, READS)):
            return self._send(404 if self.token else 401, {"error": "Repository not found"}, "RepoNotFound")
        if repository.gated and self.token not in (WRITES, READS):
            return self._send(403, {"error": "Access is restricted"}, "GatedRepo")
        if writes and self.token != WRITES:
            return self._send(403 if self.token else 401, {"error": "You may not write here"})
        return None

    def _create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.token not in (WRITES, READS):
            return self._send(401, {"error": "Invalid username or password."})
        if self.token == READS:
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        status = 409 if name in self.hub.repositories else 200
        repository = self.hub.repositories.setdefault(name, Repository(private=_is_private(asked)))
        if not repository.commits:
            repository.commit({".gitattributes": b""})
        return self._send(status, {"url": f"{self.hub.address}/{name}"})

    def _interface(self, repository, what, rest, body):
        if what == ["commit"]:
            return self._commit(repository, rest, body)
        if what == ["preupload"]:
            modes = {True: "lfs", False: "regular"}
            asked = [each["path"] for each in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": modes[p.endswith(LARGE)], "shouldIgnore": False} for p in asked]
            return self._send(200, {"files": files})
        if what == ["branch"]:
            if rest in repository.refs:
                return self._send(409, {"error": "Reference already exists"})
            repository.refs[rest] = repository.refs["main"]
            return self._send(200, {})
        revision = rest.split("/")[0] if what == ["tree"] else rest or "main"
        found = repository.files(revision)
        if found is None:
            return self._send(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        commit, files = found
        if what == ["tree"]:
            return self._send(
                200, [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()]
            )
        siblings = [{"rfilename": path} for path in files]
        return self._send(200, {"id": "x/y", "sha": commit, "siblings": siblings, "private": repository.private})

    def _commit(self, repository, branch, body):
        files = dict(repository.files(branch)[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        name = repository.commit(files, branch)
        self._send(200, {"commitOid": name, "commitUrl": f"{self.hub.address}/x/y/commit/{name}"})

    def _large(self, asked):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.address}/large/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _file(self, repository, revision, path):
        found = repository.files(revision)
        if found is None:
            return self._send(404, {}, "RevisionNotFound")
        commit, files = found
        if path not in files:
            return self._send(404, {}, "EntryNotFound")
        content = files[path]
        return self._send(200, content, more={"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit})

    def _send(self, status, content, code=None, more=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), **({"X-Error-Code": code} if code else {}), **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            cut = self.hub.cut if isinstance(content, bytes) and self.hub.cut else len(data)
            self.wfile.write(data[:cut])
            self.close_connection = self.close_connection or cut < len(data)
        return True


def _is_private(asked):
    """As the client says it today, and as it did before 2.0."""
    return bool(asked.get("private")) or asked.get("visibility") == "private"


def _oid(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def stand_in():
    """Serve an empty hub on a free port of this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    server.hub = hub = Hub()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(monkeypatch, address, cache):
    """Let the hub's client of this process ask that address, with that cache and no token."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before 1.0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by plain HTTP
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
