"""Written files as a pull request to a repository on the Hugging Face hub.

Nothing of a repository's main branch is changed: whoever owns it merges the request, or not. Uploaded is what was
written, and nothing else of the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from softbridge import untrusted
from softbridge.errors import PublishError


@dataclass(frozen=True)
class PullRequest:
    """What was proposed.

    Attributes:
        url: of the pull request; None where the repository has all of it already.
        replaces: names of files that the main branch has, too.
    """

    url: str | None
    replaces: tuple[str, ...]


def check_publishable(repository: str) -> None:
    """Refuse what cannot be proposed whatever the files are: before the work.

    Raises:
        PublishError: this is no id, the hub is switched off, or there is no token.
    """
    from huggingface_hub import constants, get_token

    named = untrusted.hub_id(repository)
    if named is None or named[1] is not None or named[2] is not None:
        raise PublishError(f"'{repository}' to push to", "OWNER/NAME, a repository on the hub", "correct --push-to-hub")
    if constants.HF_HUB_OFFLINE:
        raise PublishError("HF_HUB_OFFLINE is set, so that no hub is asked", "the hub", "unset it, or do not push")
    if get_token() is None:
        raise PublishError("no token for the hub", "one that may write", "run 'hf auth login', or set HF_TOKEN")


def publish(repository: str, folder: Path, files: Collection[str], *, title: str, create: bool = False) -> PullRequest:
    """Open a pull request with these files.

    Args:
        repository: ``owner/name``.
        folder: where they are on this machine.
        files: their names.
        title: of the request.
        create: make the repository, private, if it does not exist.

    Raises:
        PublishError: the hub is not reached, knows no such repository, or does not let this token propose anything.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _explained(repository, folder):
        if create:
            api.create_repo(repository, private=True, exist_ok=True)
        there = set(api.list_repo_files(repository))
        replaces = tuple(sorted(there & set(files)))
        description = "Written by softbridge. README.md says what the prompt is, and how it was verified."
        if replaces:
            description += "\n\nIt replaces these files, which are there already: " + ", ".join(replaces)
        adds = [CommitOperationAdd(name, folder / name) for name in files]
        done = api.create_commit(repository, adds, commit_message=title, commit_description=description, create_pr=True)
    return PullRequest(done.pr_url, replaces)


@contextmanager
def _explained(repository: str, written: Path) -> Iterator[None]:
    """The hub's errors in softbridge's words."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except Exception as error:  # which HTTP library's errors leave the client depends on its release
        status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
        expected, remedy = "a hub that this machine reaches", "check the network and HF_ENDPOINT"
        if isinstance(error, RepositoryNotFoundError):
            expected = "a repository that this token sees"
            remedy = "check its name, make it on the hub, or say --create-repo (create_repo=True) for a private one"
        elif status in (401, 403):
            expected, remedy = "a token that may propose changes", "log in with another: 'hf auth login', or HF_TOKEN"
        elif status is not None:
            expected, remedy = "a pull request", "try again, or propose the files on the hub's own page"
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
        raise PublishError(
            f"'{repository}' on the hub: {said}", expected, f"{remedy}; the files stay in '{written}'"
        ) from error
