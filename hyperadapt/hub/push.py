"""Publishing on the Hugging Face Hub: an adapter with its card, in one commit or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from hyperadapt.cards.card import CARD, addressed, may_be_written_anew, write_card
from hyperadapt.hub.failures import explained
from hyperadapt.hub.folder import checked_files
from hyperadapt.tuner.active import active_network


@dataclass(frozen=True)
class _Destination:
    """Where on the Hub something is published, and as which commit."""

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


def push(  # noqa: DOC503
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
    destination = _Destination(
        repo_id, private, token, revision, subfolder, create_pr, commit_message, commit_description
    )
    if isinstance(source, PeftModel):
        return _push_model(source, [active_network(source)[0]], destination)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source is of type {type(source).__name__}, but must be a PeftModel or a folder.")
    return _publish(Path(source), destination)


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
    tags: str | Sequence[str] | None = None,
) -> CommitInfo:
    """``PeftModel.push_to_hub``: all adapters and the card in one commit; adapters are not split into shards."""
    destination = _Destination(repo_id, private, token, revision, None, create_pr, commit_message, commit_description)
    return _push_model(model, list(model.peft_config), destination, tags or ())


def create_or_update_model_card(model: PeftModel, output_dir: str) -> None:
    """The method of ``PeftModel``, which saving calls: our card."""
    write_card(model, output_dir)


def _push_model(
    model: PeftModel, names: list[str], destination: _Destination, tags: str | Sequence[str] = ()
) -> CommitInfo:
    """Publish adapters: the active one at the top, where it is looked for, others in folders of their names."""
    active, _ = active_network(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "published")
        for name in names:
            saved, place = Path(temporary, "saved", name), folder if name == active else folder / name
            model.save_pretrained(str(saved), selected_adapters=[name])
            place.mkdir(parents=True, exist_ok=True)
            for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                shutil.move((saved if name == "default" else saved / name) / file, place / file)
        # Before anything is made on the Hub, in case that it cannot be written.
        write_card(model, folder, repo_id=destination.repo_id, tags=tags)
        return _publish(folder, destination, model, tags)


def _publish(
    folder: Path, destination: _Destination, model: PeftModel | None = None, tags: str | Sequence[str] = ()
) -> CommitInfo:
    files = checked_files(folder)
    api = HfApi(token=destination.token, library_name="hyperadapt", library_version=metadata.version("hyperadapt"))
    with explained(destination.repo_id):
        repo_id = api.create_repo(destination.repo_id, private=destination.private, exist_ok=True).repo_id
        if (
            destination.revision is not None
            and not destination.create_pr
            and not destination.revision.startswith("refs/")
        ):
            api.create_branch(repo_id, branch=destination.revision, exist_ok=True)
        info = api.model_info(repo_id, revision=destination.revision)
        if destination.private and not info.private:
            raise ValueError(f"private=True, but {repo_id!r} is public already. Make it private in its settings.")
        if model is not None:
            _take_over_card(api, info, folder / CARD, destination.prefix)
            write_card(model, folder, overwrite=may_be_written_anew(folder), repo_id=repo_id, tags=tags)
        # Not upload_folder, which may make several commits.
        return api.create_commit(
            repo_id,
            [
                CommitOperationAdd(destination.prefix + name, _content(name, path, repo_id, destination.subfolder))
                for name, path in files.items()
            ],
            commit_message=destination.commit_message or "Upload adapter",
            commit_description=destination.commit_description,
            revision=destination.revision,
            create_pr=destination.create_pr,
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
    return addressed(path.read_text(encoding="utf-8"), repo_id, subfolder).encode()
