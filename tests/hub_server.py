"""A small Hugging Face Hub on loopback: the endpoints that huggingface_hub, transformers and kernels call, without Xet.

Repositories live in memory, their files in a directory, named by their SHA-256. A client reaches it through `HF_ENDPOINT`,
which huggingface_hub reads when it is imported, so clients are processes of their own (`environment`).

    POST /_faults {"drop_uploads": true, "refuse_commits": true, "cuts": [1000, 0, 0], "hide_cuts": true}

lets a client that is being tested break what comes next (`Faults`); what it does not name works afterwards.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_me": "me", "hf_you": "you"}
"""Bearer token -> user, who may write in the namespace of this name and read its private repositories."""

TRUSTED_PUBLISHERS = ("trusted",)
"""Organizations whose kernels the kernels client loads without being told to trust them."""

LFS_SUFFIXES = (".safetensors", ".bin", ".so")


@dataclass(frozen=True)
class Blob:
    """A stored file: ``oid`` is what git calls it, the SHA-1 of the blob or the SHA-256 of an LFS object."""

    sha256: str
    oid: str
    size: int
    lfs: bool


@dataclass
class Repo:
    """Commits are snapshots: path -> blob. A branch names one."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        """Make ``files`` the content of a branch, under a new commit id."""
        oid = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files.items())}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


@dataclass
class Faults:
    """What goes wrong next."""

    drop_uploads: bool = False  # the connection is closed when half of an LFS object has arrived
    refuse_commits: bool = False
    cuts: list[int] = field(default_factory=list)  # the next bodies of LFS objects end after so many bytes
    hide_cuts: bool = False  # and Content-Length says that this is all of it


class HubError(Exception):
    """An answer other than 200: status, the code that the client turns into an exception, a message."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(status, code, message or code)


class Hub(ThreadingHTTPServer):
    """The server: its repositories, the faults it makes, ``requests``: (method, path, Range header) of each, and ``unknown`` paths."""

    daemon_threads = True

    def __init__(self, directory: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str, str | None]] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or cut off is not worth a traceback."""

    def store(self, content: bytes, lfs: bool) -> Blob:
        """Keep a file."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.directory / sha256).write_bytes(content)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Blob(sha256, sha256 if lfs else git, len(content), lfs)

    def publish(
        self, kind: str, name: str, files: dict[str, bytes], branch: str = "main", private: bool = False
    ) -> None:
        """Make a repository, or another branch of it, without a client. ``kind``: "models" or "kernels"."""
        repo = self.repos.setdefault((kind, name), Repo(private))
        repo.commit(
            branch,
            {path: self.store(content, path.endswith(LFS_SUFFIXES)) for path, content in files.items()},
        )

    def files(self, name: str, branch: str = "main", kind: str = "models") -> dict[str, bytes]:
        """What a branch holds."""
        repo = self.repos[kind, name]
        blobs = repo.commits[repo.branches[branch]]
        return {path: (self.directory / blob.sha256).read_bytes() for path, blob in blobs.items()}

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables of a client process; it knows no other server and, without ``token``, no user."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and not name.startswith(("HF_", "HUGGING_FACE_"))
        }
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }


@contextmanager
def running(directory: Path) -> Iterator[Hub]:
    """A Hub that serves while the block runs."""
    hub = Hub(directory)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_REPO = rf"/api/(?P<kind>models|kernels)/{_NAME}"
_REVISION = r"(?P<revision>[^/]+)"

ROUTES = [
    (method, re.compile(pattern), function)
    for method, pattern, function in (
        ("POST", "/_faults", "set_faults"),
        ("POST", "/api/repos/create", "create_repo"),
        ("POST", "/api/validate-yaml", "validate_card"),
        ("GET", "/api/whoami-v2", "whoami"),
        ("GET", "/api/organizations/(?P<name>[^/]+)/overview", "organization"),
        ("GET", _REPO, "info"),
        ("GET", f"{_REPO}/revision/{_REVISION}", "info"),
        ("GET", f"{_REPO}/refs", "refs"),
        ("GET", rf"{_REPO}/tree/{_REVISION}(/(?P<path>.+))?", "tree"),
        ("POST", f"{_REPO}/branch/{_REVISION}", "create_branch"),
        ("POST", f"{_REPO}/preupload/{_REVISION}", "preupload"),
        ("POST", f"{_REPO}/commit/{_REVISION}", "commit"),
        ("POST", rf"(/(?P<kind>kernels))?/{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", rf"(/(?P<kind>kernels))?/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", "download"),
        ("HEAD", rf"(/(?P<kind>kernels))?/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", "download"),
    )
]
"""Method, path, and the method of `Handler` that answers: with something for JSON, or by itself, returning None."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr; `Hub.requests` has what a test wants to know."""

    def do_GET(self) -> None:
        """Every method comes here."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.requests.append((self.command, unquote(url.path), self.headers.get("Range")))
        found = (
            (pattern.fullmatch(url.path), name) for verb, pattern, name in ROUTES if verb == self.command
        )
        match, function = next((pair for pair in found if pair[0]), (None, "unknown"))
        values = match.groupdict() if match else {}
        values = {key: unquote(value) for key, value in values.items() if value is not None}
        try:
            answer = getattr(self, function)(**values)
        except HubError as error:
            status, code, message = error.args
            self.body()  # the next request of the connection begins behind it
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.reply(json.dumps({"error": message}).encode(), status, headers)
        else:
            if answer is not None:
                self.reply(json.dumps(answer).encode(), headers={"Content-Type": "application/json"})

    do_HEAD = do_POST = do_PUT = do_GET

    def unknown(self) -> None:
        """The client asks for what this server does not have."""
        self.server.unknown.append(self.path)
        raise HubError(501, "NotImplemented", f"no route for {self.command} {self.path}")

    # --- reading and writing

    def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a whole answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self, limit: int | None = None) -> bytes:
        """The request's body, once; with a limit, not more than its first bytes."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = bytearray()
            while (size := int(self.rfile.readline(), 16)) and (limit is None or len(content) < limit):
                content += self.rfile.read(size)
                self.rfile.readline()
            if not size:
                self.rfile.readline()
            del self.headers["Transfer-Encoding"]
            return bytes(content)
        length = int(self.headers.get("Content-Length") or 0)
        if length:
            self.headers.replace_header("Content-Length", "0")
        return self.rfile.read(length if limit is None else min(length, limit))

    def json(self) -> Any:
        """The request's body as JSON."""
        return json.loads(self.body())

    # --- who may do what

    @property
    def user(self) -> str | None:
        """Who sent the request."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "InvalidToken", "Invalid user token.")
        return TOKENS.get(token)

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        """A repository that the sender may see, and write to."""
        repo = self.server.repos.get((kind, name))
        owner = name.split("/")[0]
        if repo is None or (repo.private and self.user != owner):
            raise HubError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != owner:
            raise HubError(403, "Forbidden", f"you may not write to {name}")
        return repo

    def commit_id(self, repo: Repo, revision: str) -> str:
        """A branch or commit id as a commit id."""
        found = repo.branches.get(revision, revision)
        if found not in repo.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # --- accounts and repositories

    def set_faults(self) -> Any:
        """What a client under test breaks."""
        self.server.faults = Faults(**self.json())
        return {}

    def whoami(self) -> Any:
        """The user of a token."""
        if self.user is None:
            raise HubError(401, "InvalidToken", "Invalid user token.")
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def organization(self, name: str) -> Any:
        """Every publisher is known, few are trusted."""
        return {
            "name": name,
            "fullname": name,
            "avatarUrl": "",
            "trustedKernelPublisher": name in TRUSTED_PUBLISHERS,
        }

    def create_repo(self) -> Any:
        """A repository with an empty commit on main."""
        asked = self.json()
        owner = asked.get("organization") or self.user
        if self.user is None or owner != self.user:
            raise HubError(
                403 if self.user else 401, "Forbidden", f"you may not create a repository of {owner}"
            )
        name = f"{owner}/{asked['name']}"
        key = (f"{asked.get('type', 'model')}s", name)
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if key in self.server.repos:
            self.reply(json.dumps({**answer, "error": "You already created this repo"}).encode(), 409)
            return None
        # Clients of version 1 send "private", those of version 2 "visibility".
        self.server.repos[key] = repo = Repo(
            bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        repo.commit("main", {})
        return answer

    def create_branch(self, kind: str, name: str, revision: str) -> Any:
        """A branch that begins at main, or where the request says."""
        repo = self.repo(kind, name, write=True)
        start = self.commit_id(repo, self.json().get("startingPoint") or "main")
        if revision in repo.branches:
            raise HubError(409, "BranchExists", "Reference already exists")
        repo.branches[revision] = start
        return {}

    def info(self, kind: str, name: str, revision: str = "main") -> Any:
        """The repository at a revision."""
        repo = self.repo(kind, name)
        oid = self.commit_id(repo, revision)
        files = [{"rfilename": path} for path in repo.commits[oid]]
        return {
            "_id": oid,
            "id": name,
            "modelId": name,
            "sha": oid,
            "private": repo.private,
            "tags": [],
            "siblings": files,
        }

    def refs(self, kind: str, name: str) -> Any:
        """The branches."""
        branches = self.repo(kind, name).branches.items()
        found = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in branches]
        return {"branches": found, "tags": [], "converts": []}

    def tree(self, kind: str, name: str, revision: str, path: str | None = None) -> Any:
        """Files and folders of one folder, or below it."""
        repo = self.repo(kind, name)
        prefix = f"{path}/" if path else ""
        files = repo.commits[self.commit_id(repo, revision)]
        inside = {file: blob for file, blob in files.items() if file.startswith(prefix)}
        if not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        entries, recursive = {}, self.query.get("recursive") in (["true"], ["True"], ["1"])
        for file, blob in inside.items():
            parts = file.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else [1] if len(parts) > 1 else []:
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {}
                entries[file] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": file, **lfs}
        return list(entries.values())

    # --- uploads

    def validate_card(self) -> Any:
        """What the Hub checks of a README.md: its metadata are YAML, and a base model has an id."""
        content = self.json()["content"]
        block = re.match(r"---\n(.*?)\n---(\n|$)", content, re.DOTALL)
        base = re.search(r"^base_model: *(.*)$", block[1], re.MULTILINE) if block else None
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1]):
            raise HubError(400, "BadRequest", f"base_model is no id: {base[1]}")
        return {"errors": [], "warnings": []}

    def preupload(self, kind: str, name: str, revision: str) -> Any:
        """Which files go through LFS."""
        repo = self.repo(kind, name, write=True)
        present = repo.commits[self.commit_id(repo, revision)]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": present[file["path"]].oid if file["path"] in present else None,
                }
                for file in self.json()["files"]
            ]
        }

    def lfs_batch(self, name: str, kind: str = "models") -> Any:
        """Where to upload each object that is not here yet."""
        self.repo(kind, name, write=True)
        objects = []
        for asked in self.json()["objects"]:
            wanted = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if not (self.server.directory / asked["oid"]).exists():
                upload = {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}
                wanted["actions"] = {"upload": upload}
            objects.append(wanted)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> None:
        """Keep an object if all of it arrived; the address is the permission, as with a signed link."""
        if self.server.faults.drop_uploads:
            self.body(limit=1000)
            self.close_connection = True
            return
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "BadRequest", "the object's SHA-256 is another one")
        self.server.store(content, lfs=True)
        self.reply(b"")

    def commit(self, kind: str, name: str, revision: str) -> Any:
        """Add and delete files: all of them or, if one cannot be, none."""
        repo = self.repo(kind, name, write=True)
        if self.server.faults.refuse_commits:
            raise HubError(403, "Forbidden", "this repository takes no commits now")
        files = dict(repo.commits[self.commit_id(repo, revision)])
        for line in self.body().splitlines():
            operation, value = (item := json.loads(line))["key"], item["value"]
            if operation == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]), lfs=False)
            elif operation == "lfsFile":
                stored = self.server.directory / value["oid"]
                if not stored.exists():
                    raise HubError(400, "BadRequest", f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(value["oid"], value["oid"], stored.stat().st_size, True)
            elif operation == "deletedFile":
                files.pop(value["path"])
            elif operation != "header":
                raise HubError(400, "BadRequest", f"unknown operation {operation}")
        with self.server.lock:
            oid = repo.commit(revision, files)
        return {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.server.url}/{name}/commit/{oid}",
            "hookOutput": "",
        }

    # --- downloads

    def download(self, name: str, revision: str, path: str, kind: str = "models") -> None:
        """A file, or with a Range header the rest of one; it may be cut (`Faults`)."""
        repo = self.repo(kind, name)
        commit = self.commit_id(repo, revision)
        blob = repo.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.reply(b"", 404, headers)
            return
        headers["ETag"] = f'"{blob.oid}"'
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)}
        content = (self.server.directory / blob.sha256).read_bytes()
        status, start = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, start = 206, int(found[1])
            headers["Content-Range"] = f"bytes {start}-{blob.size - 1}/{blob.size}"
        content = content[start:]
        faults = self.server.faults
        if self.command == "HEAD" or not blob.lfs or not faults.cuts:
            self.reply(content, status, headers)
            return
        cut = content[: faults.cuts.pop(0)]
        if faults.hide_cuts:
            self.reply(cut, status, headers)
            return
        self.reply(cut, status, {**headers, "Content-Length": str(len(content))})
        self.close_connection = True
