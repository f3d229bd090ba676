"""Repositories of the Hugging Face hub: what they hold, with sizes, checksums and licence.

``huggingface_hub`` lists them and knows the login. Files are read by ``unike.fetch.web``: since version 2
that library begins an interrupted download anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from unike.fetch.remote import GO_ON, Count, Remote, describe_fault
from unike.fetch.web import save_file
from unike.system.text import one_line
from unike.types import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The same weights for other libraries.
_FOREIGN = re.compile(
    r".*\.(msgpack|h5|onnx|tflite|gguf|ot)$|(flax|tf|rust|coreml|onnx)[_/].*|\.gitattributes$"
)
_PICKLED, _SAFE = (".bin", ".pt", ".pth", ".ckpt"), ".safetensors"
_LOG_IN = "log in with: hf auth login"


@dataclass(frozen=True)
class Repository:
    """A repository at one revision; ``licence`` is what the hub states, None where it states none."""

    id: str
    revision: str
    licence: str | None
    files: tuple[Remote, ...]


def open_api() -> HfApi:
    """The hub that ``HF_ENDPOINT`` names, or the public one."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=find_endpoint(), library_name="unike")


def find_endpoint() -> str:
    """The hub's address."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def list_repository(repository: str, kind: str = "model", revision: str | None = None) -> Repository:
    """A repository's files, at the newest revision or at another one. UserError where it can't be read."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    with explain_hub_errors(repository):
        info: Any = open_api().repo_info(repository, repo_type=kind, revision=revision, files_metadata=True)
    # As the library itself would send it, or not.
    login = build_hf_headers().get("authorization")

    def make(sibling: Any) -> Remote:
        url = hf_hub_url(
            info.id, sibling.rfilename, repo_type=kind, revision=info.sha, endpoint=find_endpoint()
        )
        large = sibling.lfs
        sums = {"sha256": large.sha256} if large else {"git": sibling.blob_id} if sibling.blob_id else {}
        size = sibling.size

        def save(part: Path, count: Count) -> None:
            save_file(url, sibling.rfilename, part, size, count, login=login)

        version = next(iter(sums.values()), info.sha)
        return Remote(sibling.rfilename, size, sums, version, save)

    files = tuple(make(sibling) for sibling in info.siblings or ())
    return Repository(info.id, info.sha, _find_licence(info), files)


def choose_weights(files: tuple[Remote, ...]) -> tuple[Remote, ...]:
    """A model's files without copies of its weights for other libraries, and without pickles where there are
    safetensors."""
    kept = [file for file in files if not _FOREIGN.match(file.name)]
    if any(file.name.endswith(_SAFE) for file in kept):
        kept = [f for f in kept if not f.name.endswith(_PICKLED) and not f.name.endswith(".bin.index.json")]
    return tuple(kept)


def _find_licence(info: Any) -> str | None:
    card = getattr(info, "card_data", None)
    stated = getattr(card, "license", None)
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return stated if isinstance(stated, str) else tags[0] if tags else None


@contextmanager
def explain_hub_errors(repository: str, remedy: str = GO_ON) -> Iterator[None]:
    """What ``huggingface_hub`` raises inside the block becomes a UserError of one line, with the ``remedy``
    where trying again may help."""
    from huggingface_hub import errors

    hub, shown = urlsplit(find_endpoint()).hostname, one_line(repository, 100)
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"{shown}: HF_HUB_OFFLINE is set; unset it to use {hub}") from error
    except errors.GatedRepoError as error:
        where = f"{find_endpoint()}/{shown}"
        raise UserError(f"{shown}: is gated: accept its terms on {where}, then {_LOG_IN}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{shown}: is not on {hub}, or is private; if it is yours, {_LOG_IN}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{shown}: has no such revision on {hub}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{shown}: is no name of a repository: {one_line(error, 160)}") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        more = _LOG_IN if code in (401, 403) else remedy
        raise UserError(f"{shown}: {hub}: answers {code}; {more}") from error
    except Exception as error:
        if isinstance(error, UserError) or (line := describe_fault(error)) is None:
            raise
        raise UserError(f"{shown}: {hub}: {line}; {remedy}") from error
