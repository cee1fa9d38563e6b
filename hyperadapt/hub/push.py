"""Publishing on the Hugging Face Hub: an adapter with its card, in one commit or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path, PurePath

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from hyperadapt.cards.card import CARD, addressed, may_be_written_anew, write_card
from hyperadapt.config.checks import shown
from hyperadapt.tuner.active import find_tuner

# Of PEFT, of MLX and of diffusers.
_LAYOUTS = (
    (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME),
    (CONFIG_NAME, "adapters.safetensors"),
    ("pytorch_lora_weights.safetensors",),
)
# What only a run needs that goes on; the arguments of a training may hold a token.
_LEFT_OUT = (
    "checkpoint-*",
    "global_step*",
    "optimizer.*",
    "optimizer_*",
    "rng_state*",
    "scaler.*",
    "scheduler.*",
    "training_args.bin",
    "*.tmp",
)
_RESULTS = ".eval_results"
_CONFLICT = "Somebody else changed the repository at the same time: push again."
_REMEDIES = {
    401: "Log in with `hf auth login`, or pass as token= one that may write.",
    403: "The token may not write there: take one that may, ask the owner, or open a pull request with create_pr=True.",
    404: "Check the name and the revision, and that the token may see the repository.",
    409: _CONFLICT,
    412: _CONFLICT,
    429: "The Hub limits how often it is called: wait some minutes and push again.",
}
_FAULT = "The Hub has a fault: push again later. What has been uploaded is not sent again."
_LOST = "The connection was lost: push again. What has been uploaded is not sent again."


@dataclass(frozen=True)
class _Target:
    repo_id: str
    private: bool | None = None
    token: str | bool | None = field(default=None, repr=False)
    revision: str | None = None
    subfolder: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    commit_description: str | None = None

    def __post_init__(self) -> None:
        validate_repo_id(self.repo_id)
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError(
                f"revision={self.revision!r} cannot be used with create_pr=True: a pull request is for main. Drop one "
                "of the two."
            )
        parts = [] if self.subfolder is None else self.subfolder.split("/")
        if any(re.fullmatch(r"[\w-][\w.-]*", part) is None for part in parts):
            raise ValueError(
                f"subfolder={self.subfolder!r} must be a path of names such as 'adapters/first', made of letters, "
                "digits, '-', '_' and '.'."
            )

    @property
    def prefix(self) -> str:
        return "" if self.subfolder is None else f"{self.subfolder}/"


def push(  # noqa: DOC502, DOC503
    source: PeftModel | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Publish an adapter and its card on the Hub, in one commit or not at all.

    What is there to publish is checked first, so that a damaged file never gets there. If the repository has a card, a
    model's push keeps the text of one that somebody has edited, completes its metadata, and replaces any other; a
    folder's own card replaces it. Other files in the repository stay. A repository that is missing is made, and stays
    even if the rest fails.

    Args:
        source: A ``PeftModel``, whose active hyperadapter is published, or the folder of an adapter or of an exported
            LoRA. Of a folder, states of a training (``checkpoint-*``, optimizers, ``training_args.bin``), ``*.tmp``
            and hidden files are left out, but not ``.eval_results``.
        repo_id: Name on the Hub, ``"user/name"``; your own without ``"user/"``.
        private: Whether a new repository is private; None for what the owner has set.
        token: A token that may write; None for the one of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch to commit to, made if missing; None for ``"main"``.
        subfolder: Folder in the repository; None for its top.
        create_pr: Whether to open a pull request instead.
        commit_message: Title of the commit.
        commit_description: Its description.

    Returns:
        The commit; `oid` is its hash, `pr_url` leads to the pull request. If nothing has changed, the last one.

    Raises:
        TypeError: If the source is something else.
        ValueError: If the folder has no adapter, a file is damaged, several adapters are active, an argument is
            malformed, or `private` is asked of a repository that is public.
        OSError: If the Hub refuses (``HfHubHTTPError``), or requests are switched off.
        RuntimeError: If a file cannot be uploaded.
    """
    target = _Target(repo_id, private, token, revision, subfolder, create_pr, commit_message, commit_description)
    if isinstance(source, PeftModel):
        return _push_model(source, [_active_adapter(source)], target)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source is of type {type(source).__name__}, but must be a PeftModel or a folder.")
    return _publish(Path(source), target)


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """``PeftModel.push_to_hub``: all adapters and the card in one commit; adapters are not split into shards."""
    target = _Target(repo_id, private, token, revision, None, create_pr, commit_message, commit_description)
    return _push_model(model, list(model.peft_config), target, tags or ())


def create_or_update_model_card(model: PeftModel, output_dir: str) -> None:
    """The method of ``PeftModel``, which saving calls: our card."""
    write_card(model, output_dir)


def _push_model(model: PeftModel, names: list[str], target: _Target, tags: Sequence[str] = ()) -> CommitInfo:
    """Publish adapters: the active one at the top, where it is looked for, others in folders of their names."""
    active = _active_adapter(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "published")
        for name in names:
            saved, place = Path(temporary, "saved", name), folder if name == active else folder / name
            model.save_pretrained(str(saved), selected_adapters=[name])
            place.mkdir(parents=True, exist_ok=True)
            for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                shutil.move((saved if name == "default" else saved / name) / file, place / file)
        # Before anything is made on the Hub, in case that it cannot be written.
        write_card(model, folder, repo_id=target.repo_id, tags=tags)
        return _publish(folder, target, model, tags)


def _publish(folder: Path, target: _Target, model: PeftModel | None = None, tags: Sequence[str] = ()) -> CommitInfo:
    files = _checked_files(folder)
    api = HfApi(token=target.token, library_name="hyperadapt", library_version=metadata.version("hyperadapt"))
    with _explained(target.repo_id):
        repo_id = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
        if target.revision is not None and not target.create_pr and not target.revision.startswith("refs/"):
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
        info = api.model_info(repo_id, revision=target.revision)
        if target.private and not info.private:
            raise ValueError(f"private=True, but {repo_id!r} is public already. Make it private in its settings.")
        if model is not None:
            _take_over_card(api, info, folder / CARD, target.prefix)
            write_card(model, folder, overwrite=may_be_written_anew(folder), repo_id=repo_id, tags=tags)
        # Not upload_folder, which may make several commits.
        return api.create_commit(
            repo_id,
            [
                CommitOperationAdd(target.prefix + name, _content(name, path, repo_id, target.subfolder))
                for name, path in files.items()
            ],
            commit_message=target.commit_message or "Upload adapter",
            commit_description=target.commit_description,
            revision=target.revision,
            create_pr=target.create_pr,
            # The card was read there.
            parent_commit=info.sha,
        )


def _take_over_card(api: HfApi, info: ModelInfo, path: Path, prefix: str) -> None:
    """Replace a card by the one of the repository, if it has one."""
    name = prefix + CARD
    if any(sibling.rfilename == name for sibling in info.siblings or ()):
        shutil.copyfile(api.hf_hub_download(info.id, name, revision=info.sha), path)


def _content(name: str, path: Path, repo_id: str, subfolder: str | None) -> Path | bytes:
    """A file as it is published: the card loads the adapter from the Hub."""
    if name != CARD:
        return path
    text = addressed(path.read_text(encoding="utf-8"), repo_id)
    if subfolder is not None:
        call = f"PeftModel.from_pretrained(base_model, {json.dumps(repo_id)}"
        text = text.replace(f"{call})", f"{call}, subfolder={json.dumps(subfolder)})")
    return text.encode()


def _active_adapter(model: PeftModel) -> str:
    active = find_tuner(model).active_adapters
    if len(active) != 1:
        raise ValueError(f"One adapter is published, but {active} are active. Set one with set_adapter.")
    return active[0]


def _checked_files(folder: Path) -> dict[str, Path]:
    """The files to publish by their names in the folder; an error if they are no adapter or damaged."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _is_published(path.relative_to(folder))
    }
    if not any(files.keys() >= set(layout) for layout in _LAYOUTS):
        layouts = "; or ".join(" and ".join(layout) for layout in _LAYOUTS)
        raise ValueError(
            f"The folder {str(folder)!r} holds no adapter: it must have {layouts}. Pass a folder that save_pretrained, "
            "a trainer or an export wrote."
        )
    for name, path in files.items():
        if path.suffix == ".safetensors":
            _check_weights(path)
        elif path.name == CONFIG_NAME:
            _check_config(path)
        elif name == CARD:
            _check_card(path)
    return files


def _is_published(path: PurePath) -> bool:
    hidden = any(part.startswith(".") and part != _RESULTS for part in path.parts)
    return not hidden and not any(fnmatchcase(part, pattern) for part in path.parts for pattern in _LEFT_OUT)


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            is_empty = not file.keys()
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Save or export the adapter again.") from error
    if is_empty:
        raise ValueError(f"{str(path)!r} holds no tensors. Save or export the adapter again.")


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Save or export the adapter again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds {shown(config)} instead of a dict. Save or export the adapter again.")


def _check_card(path: Path) -> None:
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
        base = card.data.get("base_model") or []
        for name in base if isinstance(base, list) else [base]:
            validate_repo_id(name)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"The metadata of {str(path)!r} cannot be published ({error}). Correct them; base_model is the base "
            "model's name on the Hub, or is left out."
        ) from error


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Add to what goes wrong on the Hub what has been published, and what to do."""
    try:
        yield
    except Exception as error:
        # Uploads wrap what went wrong.
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        text = _explanation(repo_id, causes)
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{error.args[0].rstrip()}\n{text}",)
        else:
            error.add_note(text)
        raise


def _explanation(repo_id: str, causes: Sequence[BaseException]) -> str:
    status = next((cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    address, is_upload = _address(causes), isinstance(causes[0], RuntimeError)
    if isinstance(causes[0], LocalTokenNotFoundError):
        remedy = _REMEDIES[401]
    elif status is None:
        # Xet's client knows no requests.
        is_lost = address or type(causes[0]) in (ConnectionError, TimeoutError)
        remedy = _LOST if is_lost else ""
    elif status >= 500:
        remedy = _FAULT
    else:
        # Storage refuses for reasons of its own, such as an address that has expired.
        remedy = "Push again." if is_upload else _REMEDIES.get(status, "")
    if remedy in (_FAULT, _LOST) and "/commit/" in address:
        return (
            f"Whether the commit to {repo_id!r} arrived is not known; if so, it is complete. Look at the repository, "
            "or push again: files that are there already are left out."
        )
    # Not the full text, which shows the signed address that the file goes to.
    reason = f" ({f'status {status}' if status else causes[1]})" if is_upload and len(causes) > 1 else ""
    return f"Nothing was published on {repo_id!r}{reason}. {remedy}".rstrip()


def _address(causes: Sequence[BaseException]) -> str:
    """What the request that failed was sent to; empty if it was none."""
    for cause in causes:
        # An error of the HTTP library may have been raised without its request.
        with suppress(AttributeError, RuntimeError):
            return str(getattr(cause, "request").url)  # noqa: B009
    return ""
