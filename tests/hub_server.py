"""A double of the Hugging Face Hub: the HTTP that the real client speaks to pull, push and tag, with faults on order.

Two servers, as in reality: the hub itself, and a storage on another host to which it redirects for large files. Plain
LFS, no Xet. It lives in a folder; `python -m tests.hub_server FOLDER` runs one as a process of its own and prints its
two addresses.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.faulty_http import Fault, Handler, Record, Seen, serve

LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Repo:
    """Commits by id, each a map of paths to (sha256, size); branches and tags by name. `access` is "open", "private" or
    "gated"."""

    access: str = "open"
    commits: dict[str, dict[str, tuple[str, int]]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, tuple[str, int]], branch: str = "main") -> str:
        identity = json.dumps([sorted(files.items()), self.refs.get(branch), len(self.commits)])
        made = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[made], self.refs[branch] = files, made
        return made

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


class HubDouble(Record):
    """The state of both servers: repositories, objects in a folder, tokens (none: everybody may do everything)."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self._servers = [serve(handler, record=self, hub=self) for handler in (Api, Storage)]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.storage = f"http://localhost:{self._servers[1].server_port}"

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def keep(self, data: bytes) -> tuple[str, int]:
        """Make an object of bytes; its sha256 and size."""
        sha = hashlib.sha256(data).hexdigest()
        (self.folder / sha).write_bytes(data)
        return sha, len(data)

    def add(self, repo: str, folder: Path, prefix: str = "") -> str:
        """Commit a folder's files on top of a repository's main branch; the commit."""
        held = self.repos.setdefault(repo, Repo())
        files = dict(held.commits.get(held.refs.get("main", ""), {}))
        for path in sorted(folder.iterdir()):
            with path.open("rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            if not (self.folder / sha).exists():
                (self.folder / sha).symlink_to(path.resolve())
            files[prefix + path.name] = sha, path.stat().st_size
        return held.commit(files)

    def change(self, repo: str, path: str, data: bytes) -> str:
        """Commit one file, as somebody would on the web page."""
        held = self.repos[repo]
        return held.commit({**held.commits[held.refs["main"]], path: self.keep(data)})

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        held = self.repos[repo]
        return (self.folder / held.commits[held.find(revision) or ""][path][0]).read_bytes()

    def downloads(self, ending: str = "", method: str = "GET") -> list[Seen]:
        """The requests for files' bytes, of files whose paths end so."""
        files = [one for one in self.seen if "/resolve/" in one.path or one.path.startswith("/objects/")]
        served = [one for one in files if one.method == method and one.sent]
        return [one for one in served if urlsplit(one.path).path.endswith(ending) or f"name={ending}" in one.path]


class Storage(Handler):
    """Where large files lie. It asks for no token; whoever has the address may read."""

    hub: HubDouble

    def route(self, path: str) -> None:
        sha = path.rpartition("/")[2]
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != sha:
                return self.refuse(400)
            self.hub.keep(self.body)
            return self.answer(b"")
        self.file(self.hub.folder / sha, {"ETag": f'"{sha}"'})


class Api(Handler):
    """The hub."""

    hub: HubDouble

    ROUTES = (
        (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", "info"),
        (r"/api/models/([^/]+/[^/]+)/tree/(.+)", "tree"),
        (r"/api/models/([^/]+/[^/]+)/refs", "refs"),
        (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        (r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
        (r"/api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
        (r"/api/models/([^/]+/[^/]+)/tag/(.+)", "tag"),
        (r"/api/repos/create()()", "create"),
        (r"/api/validate-yaml()()", "validate"),
        (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch()", "batch"),
        (r"/([^/]+/[^/]+)/resolve/(.+)", "resolve"),
    )

    def route(self, path: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.hub.tokens and token and token not in self.hub.tokens:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                self.repo_id, rest = (*match.groups(), "")[:2]
                repo = self.hub.repos.get(self.repo_id)
                if name in ("create", "validate"):
                    if self.hub.tokens and not token:
                        return self.refuse(401)
                    return getattr(self, name)()
                if repo is None or (repo.access == "private" and not token):
                    return self.refuse(404 if token or not self.hub.tokens else 401, "RepoNotFound")
                self.repo = repo
                return getattr(self, name)(rest or "main")
        self.refuse(404)

    def found(self, revision: str) -> str | None:
        commit = self.repo.find(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
        return commit

    def info(self, revision: str) -> None:
        commit = self.found(revision)
        if commit:
            rows = [self.row(path, *held) for path, held in sorted(self.repo.commits[commit].items())]
            siblings = [
                {"rfilename": row["path"], "size": row["size"], "blobId": row["oid"]}
                | (
                    {"lfs": {"sha256": row["lfs"]["oid"], "size": row["size"], "pointerSize": 130}}
                    if "lfs" in row
                    else {}
                )
                for row in rows
            ]
            self.json({"id": self.repo_id, "sha": commit, "siblings": siblings, "private": False})

    def tree(self, revision: str) -> None:
        commit = self.found(revision)
        if commit:
            self.json([self.row(path, *held) for path, held in sorted(self.repo.commits[commit].items())])

    def row(self, path: str, sha: str, size: int) -> dict[str, Any]:
        """A file as the API states it: git's id of a small one, the sha256 of a large one."""
        row: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": size,
            "oid": hashlib.sha1(sha.encode()).hexdigest(),
        }
        if path.endswith(LFS_SUFFIXES):
            return row | {"lfs": {"oid": sha, "size": size, "pointerSize": 130}}
        return row | {"oid": git_id((self.hub.folder / sha).read_bytes())}

    def refs(self, _: str) -> None:
        def listed(kind: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in refs.items()]

        self.json({"branches": listed("heads", self.repo.refs), "tags": listed("tags", self.repo.tags), "converts": []})

    def resolve(self, rest: str) -> None:
        revision, _, path = rest.partition("/")
        commit = self.found(revision)
        held = self.repo.commits[commit].get(path) if commit else None
        if commit is None:
            return
        if self.repo.access == "gated":
            return self.refuse(403, "GatedRepo")
        if held is None:
            return self.refuse(404, "EntryNotFound")
        sha, size = held
        row = self.row(path, sha, size)
        etag = sha if "lfs" in row else row["oid"]
        wrong = self.record.fault("etag", self.path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{wrong.value if wrong else etag}"'}
        if "lfs" not in row:
            return self.file(self.hub.folder / sha, headers)
        linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(size)}
        name = path.rpartition("/")[2]
        place = f"{self.hub.storage}/objects/{sha}?signature=s3cret&name={name}"
        self.answer(b"", 302, headers | linked | {"Location": place})

    def create(self) -> None:
        wish = json.loads(self.body)
        name = f"{wish['organization']}/{wish['name']}"
        if name in self.hub.repos:
            return self.json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        repo = self.hub.repos[name] = Repo("private" if wish.get("visibility") == "private" else "open")
        repo.commit({".gitattributes": self.hub.keep(b"*.safetensors filter=lfs\n")})
        self.json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        good = json.loads(self.body)["content"].startswith("---\n")
        self.json({"errors": [], "warnings": [] if good else [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, revision: str) -> None:
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(self.body)["files"]
        ]
        self.json({"files": files})

    def batch(self, _: str) -> None:
        objects = []
        for wish in json.loads(self.body)["objects"]:
            place = {"upload": {"href": f"{self.hub.storage}/objects/{wish['oid']}"}}
            there = (self.hub.folder / wish["oid"]).exists()
            objects.append(wish if there else wish | {"actions": place})
        self.json({"transfer": "basic", "objects": objects})

    def commit(self, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        with self.hub.lock:
            head = self.repo.refs.get(branch)
            if header.get("parentCommit") not in (None, head):
                return self.json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            files = dict(self.repo.commits[head or ""])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if not (self.hub.folder / value["oid"]).exists():
                        return self.json({"error": "the LFS object is missing"}, 400)
                    files[value["path"]] = (value["oid"], value["size"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            made = self.repo.commit(files, branch)
        self.json({"commitUrl": f"{self.hub.url}/{self.repo_id}/commit/{made}", "commitOid": made})

    def branch(self, name: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        self.repo.refs.setdefault(name, self.repo.find(start) or "")
        self.json({})

    def tag(self, revision: str) -> None:
        self.repo.tags[json.loads(self.body)["tag"]] = self.found(revision) or ""
        self.json({})


def connect(hub: HubDouble, monkeypatch: Any) -> None:
    """Let the client in this process know this hub and no other, nor any token, nor any other cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(hub.folder / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("hubkit.remotes.patience.FIRST_WAIT", 0.01)


def git_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def main() -> None:
    """Serve the folders that are given as `owner/name=folder`, until standard input ends; a line there resets and
    prints what was sent."""
    hub = HubDouble(Path(sys.argv[1]))
    for argument in sys.argv[2:]:
        repo, _, folder = argument.partition("=")
        hub.add(repo, Path(folder))
    print(hub.url, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        hub.rate = command.get("rate", hub.rate)
        if "faults" in command:
            hub.faults = [Fault(**fault) for fault in command["faults"]]
        files = hub.downloads()
        print(json.dumps({"downloads": len(files), "bytes": sum(one.sent for one in files)}), flush=True)
        hub.seen.clear()


if __name__ == "__main__":
    main()
