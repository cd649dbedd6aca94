"""A Hugging Face Hub on loopback: the endpoints that huggingface_hub uses to create, push to and load a model.

Files go in as on the Hub, small ones inside the commit and weights through Git LFS, and each commit is a snapshot that
is served by its id, a branch or a tag. Everything asked for is recorded; an endpoint that it does not know gives 404.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


TOKEN = "hf_standin"


class Repository:
    """Commits, each all of its files by path, and the branches and tags that name them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {"0" * 40: {}}
        self.names = {"main": "0" * 40}

    def find(self, revision: str) -> str | None:
        commit = self.names.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes], deleted: frozenset[str] = frozenset()) -> str:
        snapshot = {p: x for p, x in self.commits[self.names[branch]].items() if p not in deleted} | files
        digest = hashlib.sha1(repr(sorted((p, hashlib.sha1(x).digest()) for p, x in snapshot.items())).encode())
        self.commits[digest.hexdigest()] = snapshot
        self.names[branch] = digest.hexdigest()
        return digest.hexdigest()


class HubStandIn:
    """The Hub's state; ``url`` is its endpoint."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by sha256, waiting for their commit
        self.requests: list[str] = []
        self.url = ""


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Serve an empty Hub until the block ends."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)", "choose_upload"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "offer_large"),
    ("PUT", r"/large/(?P<oid>\w+)", "store_large"),
    ("POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{ID}/tag/(?P<revision>[^/]+)", "tag"),
    ("GET", rf"/api/models/{ID}(/revision/(?P<revision>[^/]+))?", "describe"),
    ("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, name in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                fields = match.groupdict()
                if name not in ("create", "validate_card", "whoami", "store_large"):
                    repository = self.hub.repositories.get(fields["id"])
                    allowed = repository and self.headers.get("Authorization") == f"Bearer {TOKEN}"
                    if not allowed and not (repository and not repository.private and method in ("GET", "HEAD")):
                        return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                    fields["repository"] = repository
                return getattr(self, name)(**fields)
        self._answer(404, {"error": f"the stand-in has no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def create(self):
        request = json.loads(self.body)
        name = "/".join(filter(None, [request.get("organization") or "me", request["name"].rpartition("/")[2]]))
        new = name not in self.hub.repositories
        if new:
            private = request.get("private") or request.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private)
        self._answer(200 if new else 409, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def validate_card(self):
        self._answer(200, {"errors": [], "warnings": []})

    def whoami(self):
        self._answer(200, {"name": "me", "type": "user", "orgs": []})

    def choose_upload(self, id, revision, repository):
        files = json.loads(self.body)["files"]
        modes = [{**f, "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]
        self._answer(200, {"files": [{**f, "shouldIgnore": False} for f in modes]})

    def offer_large(self, id, repository):
        objects = [
            {**x, "actions": {"upload": {"href": f"{self.hub.url}/large/{x['oid']}"}}}
            for x in json.loads(self.body)["objects"]
        ]
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        self._answer(200, {"transfer": "basic", "objects": objects}, headers)

    def store_large(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "the content is not what its name says"})
        self.hub.large_files[oid] = self.body
        self._answer(200, {})

    def commit(self, id, revision, repository):
        files, deleted = {}, set()
        for line in filter(None, self.body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files.pop(value["oid"])
            elif entry["key"] == "deletedFile":
                deleted.add(value["path"])
        commit = repository.commit(revision, files, frozenset(deleted))
        self._answer(200, {"commitOid": commit, "commitUrl": f"{self.hub.url}/{id}/commit/{commit}", "success": True})

    def tag(self, id, revision, repository):
        repository.names[json.loads(self.body)["tag"]] = repository.find(revision)
        self._answer(200, {})

    def describe(self, id, repository, revision=None):
        commit = repository.find(revision or "main")
        if commit is None:
            return self._revision_not_found()
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        self._answer(
            200, {"id": id, "modelId": id, "sha": commit, "private": repository.private, "siblings": siblings}
        )

    def tree(self, id, revision, repository, folder=None):
        commit = repository.find(revision)
        if commit is None:
            return self._revision_not_found()
        files = {p: x for p, x in repository.commits[commit].items() if not folder or p.startswith(folder + "/")}
        if folder and not files:
            return self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        self._answer(
            200,
            [
                {"type": "file", "path": p, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for p, x in files.items()
            ],
        )

    def resolve(self, id, revision, path, repository):
        commit = repository.find(revision)
        if commit is None:
            return self._revision_not_found()
        headers = {"X-Repo-Commit": commit}
        content = repository.commits[commit].get(path)
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Content-Type": "application/octet-stream"}
        self._answer(200, content, headers)

    def _revision_not_found(self):
        self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
