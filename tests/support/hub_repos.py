"""What a Hub keeps: repositories with their commits, and how it answers and refuses."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
LFS_SIZE = 10 * 2**20


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    files: Mapping[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, branch: str, title: str, description: str, files: Mapping[str, bytes], parent: str | None) -> Commit:
        identity = repr((len(self.commits), title, parent, sorted(files)))
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, description, dict(files))
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def find(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.commits[self.branches[revision]]
        if len(revision) >= 7:
            for oid, commit in self.commits.items():
                if oid.startswith(revision):
                    return commit
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        names = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.reply = as_json({"error": message}, status, names)


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | dict(headers or {}))


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def blob_id(path: str, content: bytes) -> str:
    """What the Hub calls a file's content: as git does, or by SHA-256 in LFS."""
    if is_lfs(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata_problems(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """The metadata of a README.md, and what is wrong with them: errors and warnings."""
    match = re.match(r"---\r?\n(.*?)\r?\n?---(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata: {error}"], []
    if not isinstance(data, dict):
        return {}, ["YAML metadata: must be of type object"], []
    errors = []
    for name in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in ("base_model", "tags", "datasets", "metrics", "language"):
        values = data.get(name, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{name}" must be a string or a list of strings')
        elif name == "base_model":
            names = values if isinstance(values, list) else [values]
            errors += [f'"base_model" with value "{entry}" is not valid' for entry in names if entry.count("/") > 1]
    return data, errors, []
