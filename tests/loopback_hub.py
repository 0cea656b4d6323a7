"""A Hub on the loopback interface for the real huggingface_hub client: what the tests of pushing and pulling talk to.

It keeps repositories in memory, speaks the endpoints that models need (LFS transfers, no Xet), checks tokens and branches
as the Hub does, and can break off a transfer in the middle. `python tests/loopback_hub.py` serves until it is stopped.

    with LoopbackHub() as hub:
        hub.endpoint    # for HF_ENDPOINT; HF_HUB_DISABLE_XET=1 is needed too
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_loopbackowner"
READER = "hf_loopbackreader"
USERS = {TOKEN: "owner", READER: "reader"}
_LFS = re.compile(r"\.(safetensors|bin|gguf)$")
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repo:
    """One repository: branches, and the files of every commit."""

    private: bool
    branches: dict[str, list[str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self):
        first = hashlib.sha1(b"first").hexdigest()
        self.commits[first] = {".gitattributes": b""}
        self.branches["main"] = [first]

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch's name, a commit or the beginning of one."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision)), None)


class LoopbackHub:
    """The server and what it has stored.

    Attributes:
        repos: by id. blobs: large files by SHA-256.
        requests: every request as (method, path, Range header, bytes received).
        cut: {name of a file: bytes}: its next download breaks off after this many bytes.
        lost: names of files whose downloads break off at once, every time.
        refuse_uploads_after: this many large files are accepted; then connections are cut until this is None again.
        hold_uploads: whether uploads of large files wait for `release`; `held` says that one does.
    """

    def __init__(self, port: int = 0):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str, int]] = []
        self.cut: dict[str, int] = {}
        self.lost: set[str] = set()
        self.refuse_uploads_after: int | None = None
        self.counting = threading.Lock()
        self.hold_uploads = False
        self.held, self.release = threading.Event(), threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        # large files are on another host, as on the Hub: the client treats a redirection to it in another way
        self.servers = [ThreadingHTTPServer(("127.0.0.1", number), handler) for number in (port, 0)]
        ports = [server.server_address[1] for server in self.servers]
        self.endpoint, self.storage = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> LoopbackHub:
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        return self.repos[repo].commits[self.repos[repo].resolve(revision)]

    def count(self, method: str, pattern: str) -> int:
        """How many requests there were whose path matches."""
        return sum(m == method and re.search(pattern, path) is not None for m, path, *_ in self.requests)


class _Error(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        body = self.read_body()
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", ""), len(body)))
        try:
            for pattern, method in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match:
                    return method(self, body, *match.groups())
            raise _Error(404, "EntryNotFound", f"no endpoint {self.command} {path}")
        except _Error as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.answer({"error": error.message}, error.status, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content, status: int = 200, headers: dict | None = None, cut: int | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(raw[:cut])
        if cut is not None:
            self.drop()

    def drop(self) -> None:
        """Break the connection off."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    # Who asks, and for what

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Error(401, message="Invalid credentials in Authorization header")
        return USERS.get(token)

    def repo(self, name: str, write: bool = False) -> Repo:
        """The repository, if this user may see it: to all others a private one does not exist."""
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and user != name.partition("/")[0]):
            raise _Error(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user != name.partition("/")[0]:
            raise _Error(403, message="You don't have the rights to write to this repository")
        return repo

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(name)
        commit = repo.resolve(revision)
        if commit is None:
            raise _Error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    # Endpoints

    def whoami(self, body: bytes) -> None:
        if self.user() is None:
            raise _Error(401, message="Invalid username or password.")
        self.answer({"type": "user", "name": self.user(), "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self, body: bytes) -> None:
        values = json.loads(body)
        if self.user() is None:
            raise _Error(401, message="Invalid username or password.")
        name = f"{values.get('organization') or self.user()}/{values['name']}"
        if not name.startswith(f"{self.user()}/"):
            raise _Error(403, message=f"You don't have the rights to create a model under this namespace: {name}")
        private = bool(values.get("private")) or values.get("visibility") == "private"
        new = name not in self.hub.repos
        if new:
            self.hub.repos[name] = Repo(private)
        self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}, 200 if new else 409)

    def validate_yaml(self, body: bytes) -> None:
        """The checks of a model card that can be made without the Hub's data."""
        content = json.loads(body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        warnings = [] if match else ["empty or missing yaml metadata in repo card"]
        errors = []
        data = yaml.safe_load(match[1]) if match else {}
        bases = data.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            if not _REPO_ID.fullmatch(base):
                errors.append(f"base_model {base!r} is not a repo id")
        if data.get("base_model_relation", "quantized") not in ("quantized", "finetune", "adapter", "merge"):
            errors.append("base_model_relation")
        if not all(isinstance(tag, str) for tag in data.get("tags", [])):
            errors.append("tags")
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                    errors.append("model-index: task and dataset")
                if not all("type" in metric and "value" in metric for metric in result["metrics"]):
                    errors.append("model-index: metrics")
        answer = {"errors": errors, "warnings": warnings}
        answer = {kind: [{"message": message} for message in messages] for kind, messages in answer.items()}
        self.answer(answer, 400 if errors else 200)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self.repo(name, write=True)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _LFS.search(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": modes})

    def lfs_batch(self, body: bytes, name: str) -> None:
        self.repo(name, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            there = wanted["oid"] in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.storage}/lfs/{wanted['oid']}"}}
            objects.append({**wanted, **({} if there else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if self.hub.hold_uploads:
            self.hub.held.set()
            self.hub.release.wait(60)
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Error(400, message="the content does not have this SHA-256")
        with self.hub.counting:  # several files come at once
            limit = self.hub.refuse_uploads_after
            if limit is not None:
                if limit <= 0:
                    return self.drop()
                self.hub.refuse_uploads_after = limit - 1
            self.hub.blobs[oid] = body
        self.answer({})

    def create_branch(self, body: bytes, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise _Error(409, message=f"Reference already exists: {branch}")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = [repo.resolve(start)]
        self.answer({})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if branch not in repo.branches:
            raise _Error(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files = dict(repo.commits[repo.branches[branch][-1]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = hashlib.sha1(body + repo.branches[branch][-1].encode()).hexdigest()
        repo.commits[commit] = files
        repo.branches[branch].append(commit)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        _, files = self.at(name, revision)
        self.answer([{"type": "file", "path": path, "size": len(raw), **_oids(path, raw)} for path, raw in files.items()])

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        commit, files = self.at(name, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.repos[name].private
        self.answer({"id": name, "modelId": name, "sha": commit, "private": private, "tags": [], "siblings": siblings})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        commit, files = self.at(name, revision)
        if path not in files:
            raise _Error(404, "EntryNotFound", f"no {path} in {revision}")
        raw = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_oid(raw)}"'}
        if _LFS.search(path):
            oid = hashlib.sha256(raw).hexdigest()
            self.hub.blobs[oid] = raw
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(raw))}
            headers["Location"] = f"{self.hub.storage}/storage/{oid}?name={urllib.parse.quote(path)}"
            return self.answer(b"", 302, headers)
        self.send_range(raw, headers, path)

    def storage(self, body: bytes, oid: str) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        self.send_range(self.hub.blobs[oid], {"ETag": f'"{oid}"'}, query["name"][0])

    def send_range(self, raw: bytes, headers: dict, path: str) -> None:
        cut = None
        if self.command == "GET":
            cut = 0 if path in self.hub.lost else self.hub.cut.pop(path, None)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {**headers, "Accept-Ranges": "bytes"}
        if match is None:
            return self.answer(raw, 200, headers, cut)
        begin, end = int(match[1]), min(int(match[2] or len(raw) - 1), len(raw) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(raw)}"
        self.answer(raw[begin : end + 1], 206, headers, cut)


def _git_oid(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def _oids(path: str, raw: bytes) -> dict:
    if not _LFS.search(path):
        return {"oid": _git_oid(raw)}
    large = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 130}
    return {"oid": _git_oid(raw), "lfs": large}


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create_repo),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"/api/models/{_NAME}/branch/(.+)", _Handler.create_branch),
    (rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"/api/models/{_NAME}", _Handler.info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/lfs/([0-9a-f]{64})", _Handler.lfs_upload),
    (r"/storage/([0-9a-f]{64})", _Handler.storage),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


if __name__ == "__main__":
    with LoopbackHub(8765) as running:
        print(f"HF_ENDPOINT={running.endpoint} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
