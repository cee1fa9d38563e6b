"""What the Hub refuses, with what was published and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

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


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
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
