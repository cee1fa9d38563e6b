"""The part of the Hub's HTTP interface that huggingface_hub uses for models, as functions of requests."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.support.hub_repos import (
    LFS_SUFFIXES,
    Commit,
    RefusedError,
    Reply,
    Repo,
    Request,
    as_json,
    blob_id,
    is_lfs,
    metadata_problems,
)

REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_REPO, _REVISION = r"(?P<repo_id>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"


@dataclass(frozen=True)
class User:
    name: str
    writes: bool = True


# By token.
USERS = {"hf_user": User("user"), "hf_reader": User("user", writes=False), "hf_guest": User("guest")}


class HubApi:
    """Repositories, and the answers to requests about them.

    Args:
        url: Where it is served.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        # Larger objects are sent in parts of this size.
        self.part_size: int | None = None
        self._parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.RLock()

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes | Path], private: bool = False, gated: bool = False
    ) -> None:
        self.repos[repo_id] = Repo(private, gated)
        self.repos[repo_id].add("main", "initial commit", "", {}, None)
        self.add_files(repo_id, files)

    def add_files(self, repo_id: str, files: Mapping[str, bytes | Path], revision: str = "main") -> Commit:
        """A commit by somebody."""
        repo = self.repos[repo_id]
        head = repo.find(revision)
        new = {path: value if isinstance(value, bytes) else value.read_bytes() for path, value in files.items()}
        return repo.add(revision, "Somebody's commit", "", dict(head.files) | new, head.oid)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return dict(self.repos[repo_id].find(revision).files)

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        repo = self.repos[repo_id]
        found = [repo.find(revision)]
        while found[-1].parent:
            found.append(repo.commits[found[-1].parent])
        return found

    def answer(self, request: Request) -> Reply:
        with self.lock:
            self.requests.append(request)
            for method, pattern, function in _ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and request.method in method.split():
                    values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    try:
                        reply: Reply = getattr(self, f"_{function}")(request, **values)
                    except RefusedError as refusal:
                        reply = refusal.reply
                    return reply
            return RefusedError(404, f"{request.method} {request.path} is not served").reply

    def _user(self, request: Request) -> User | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _repo(self, request: Request, repo_id: str, *, write: bool = False, content: bool = False) -> Repo:
        user, repo = self._user(request), self.repos.get(repo_id)
        owns = user is not None and user.name == repo_id.partition("/")[0]
        if repo is None or (repo.private and not owns):
            raise RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if content and repo.gated and not owns:
            raise RefusedError(401 if user is None else 403, f"Access to model {repo_id} is restricted.", "GatedRepo")
        if write and user is None:
            raise RefusedError(401, "Invalid username or password.")
        if write and not (owns and user is not None and user.writes):
            raise RefusedError(403, "You don't have the rights to push to this repository")
        return repo

    def _whoami(self, request: Request) -> Reply:
        user = self._user(request)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        role = "write" if user.writes else "read"
        return as_json({"type": "user", "name": user.name, "auth": {"accessToken": {"role": role}}, "orgs": []})

    def _create(self, request: Request) -> Reply:
        user, wanted = self._user(request), request.json
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        owner = wanted.get("organization") or user.name
        repo_id = f"{owner}/{wanted['name']}"
        if not user.writes or owner != user.name:
            raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if not REPO_NAME.fullmatch(repo_id):
            raise RefusedError(400, f"Invalid repo name: {repo_id}")
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            return as_json(answer | {"error": "You already created this model repo"}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repos[repo_id] = Repo(private=bool(private))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.repos[repo_id].add("main", "initial commit", "", {".gitattributes": attributes.encode()}, None)
        return as_json(answer)

    def _validate(self, request: Request) -> Reply:
        _, errors, warnings = metadata_problems(request.json["content"])
        answer = {
            name: [{"message": text} for text in texts] for name, texts in (("errors", errors), ("warnings", warnings))
        }
        return as_json(answer, 400 if errors else 200)

    def _info(self, request: Request, repo_id: str, revision: str = "main") -> Reply:
        repo = self._repo(request, repo_id)
        commit = repo.find(revision)
        card = metadata_problems(commit.files.get("README.md", b"").decode())[0]
        return as_json(
            {
                "id": repo_id,
                "author": repo_id.partition("/")[0],
                "sha": commit.oid,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "tags": card.get("tags", []),
                "cardData": card,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def _refs(self, request: Request, repo_id: str) -> Reply:
        repo = self._repo(request, repo_id)
        refs = [
            {"name": name, "ref": name if name.startswith("refs/") else f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repo.branches.items()
        ]
        pulls = [ref for ref in refs if ref["ref"].startswith("refs/pr/")]
        branches = [ref for ref in refs if ref not in pulls]
        return as_json({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def _tree(self, request: Request, repo_id: str, revision: str, path: str = "") -> Reply:
        commit = self._repo(request, repo_id).find(revision)
        prefix = f"{path.strip('/')}/" if path else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, content in commit.files.items():
            if not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            for end in (index for index, letter in enumerate(rest) if letter == "/"):
                folder = prefix + rest[:end]
                entries[folder] = {"type": "directory", "path": folder, "oid": blob_id(folder, b""), "size": 0}
            oid = blob_id(name, content)
            entries[name] = {"type": "file", "path": name, "oid": oid, "size": len(content)}
            if is_lfs(name, len(content)):
                entries[name]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        if path and not entries:
            raise RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound", X_Repo_Commit=commit.oid)
        if request.query.get("recursive", ["false"])[0].lower() != "true":
            entries = {name: entry for name, entry in entries.items() if "/" not in name.removeprefix(prefix)}
        return as_json(list(entries.values()))

    def _branch(self, request: Request, repo_id: str, revision: str) -> Reply:
        repo = self._repo(request, repo_id, write=True)
        if revision in repo.branches:
            raise RefusedError(409, f"Reference already exists: {revision}")
        if revision.startswith("refs/"):
            raise RefusedError(400, f"Invalid reference for a branch: {revision}")
        repo.branches[revision] = repo.find(request.json.get("startingPoint", "main")).oid
        return as_json({})

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Reply:
        files = self._repo(request, repo_id, write="create_pr" not in request.query).find(revision).files
        answers = []
        for entry in request.json["files"]:
            path = entry["path"]
            mode = "lfs" if is_lfs(path, entry["size"]) else "regular"
            oid = blob_id(path, files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": answers})

    def _batch(self, request: Request, repo_id: str) -> Reply:
        # Without a branch, the objects are for a pull request.
        self._repo(request, repo_id, write="ref" in request.json)
        objects = []
        for entry in request.json["objects"]:
            oid, size = entry["oid"], entry["size"]
            actions = {"upload": {"href": f"{self.url}/lfs/{oid}"}, "verify": {"href": f"{self.url}/lfs/verify"}}
            if self.part_size and size > self.part_size:
                parts = range(1, -(-size // self.part_size) + 1)
                header = {str(part): f"{self.url}/lfs/{oid}/{part}" for part in parts}
                actions["upload"] = {
                    "href": f"{self.url}/lfs/complete",
                    "header": header | {"chunk_size": str(self.part_size)},
                }
            objects.append(entry if oid in self.objects else entry | {"actions": actions})
        return as_json({"transfer": "basic", "objects": objects})

    def _store(self, request: Request, oid: str, part: str | None = None) -> Reply:
        if part is None:
            self._keep(oid, request.body)
        else:
            self._parts[oid, int(part)] = request.body
        return Reply(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def _complete(self, request: Request) -> Reply:
        oid = request.json["oid"]
        self._keep(oid, b"".join(self._parts[oid, part["partNumber"]] for part in request.json["parts"]))
        return as_json({})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, f"The content is not that of {oid}")
        self.objects[oid] = content

    def _verify(self, request: Request) -> Reply:
        content = self.objects.get(request.json["oid"])
        if content is None or len(content) != request.json["size"]:
            raise RefusedError(404, "The object is missing or of another size")
        return as_json({})

    def _commit(self, request: Request, repo_id: str, revision: str) -> Reply:
        pull_request = "create_pr" in request.query
        repo = self._repo(request, repo_id, write=not pull_request)
        if revision not in repo.branches:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repo.find(revision)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        parent = repo.find(header.get("parentCommit", head.oid))
        if parent is not head and not pull_request:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = self._applied(dict(parent.files), lines[1:])
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        branch = f"refs/pr/{number}" if pull_request else revision
        commit = repo.add(branch, header["summary"], header["description"], files, parent.oid)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo_id}/commit/{commit.oid}"}
        return as_json(
            answer | ({"pullRequestUrl": f"{self.url}/{repo_id}/discussions/{number}"} if pull_request else {})
        )

    def _applied(self, files: dict[str, bytes], operations: list[dict[str, Any]]) -> dict[str, bytes]:
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                files[path] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    raise RefusedError(400, f"The LFS object of {path} has not been uploaded")
                files[path] = self.objects[value["oid"]]
            elif kind == "deletedFile" and path in files:
                del files[path]
            else:
                raise RefusedError(400, f"{kind} of {path} cannot be applied")
        errors = metadata_problems(files.get("README.md", b"").decode())[1]
        if errors:
            raise RefusedError(400, f"Invalid metadata in README.md: {errors}")
        return files

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        commit = self._repo(request, repo_id, content=True).find(revision)
        if path not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        content = commit.files[path]
        etag = f'"{blob_id(path, content)}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if is_lfs(path, len(content)):
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return Reply(content, headers=headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        return Reply(content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"})


_ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{_REPO}/refs", "refs"),
    ("GET", f"/api/models/{_REPO}(?:/revision/{_REVISION})?", "info"),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?", "tree"),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", "branch"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", "store"),
    ("POST", "/lfs/complete", "complete"),
    ("POST", "/lfs/verify", "verify"),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
