"""Fetch a model from the Hugging Face hub: weights in safetensors, JSON and tokenizer files, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from fptq_export.errors import UserError
from fptq_export.progress import Progress

__all__ = ["directory_from_hub", "directory_from_model"]

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_LOCAL_CHOICES = "check the spelling, or give a local directory or a .gguf file"


def directory_from_model(model: str, *, trust_remote_code: bool, progress: Progress) -> Path:
    """The directory of a model: the one that is named, or that of a hub id.

    Raises:
        UserError: There is no such directory, and it is no hub id or cannot be downloaded.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(model, "neither a directory nor a .gguf file", "give the directory that holds config.json")
    if not _HUB_ID.fullmatch(model):
        raise UserError(model, "no such directory", "give a Hugging Face directory, a hub id or a .gguf file")
    return directory_from_hub(model, trust_remote_code=trust_remote_code, progress=progress)


def directory_from_hub(repo_id: str, *, trust_remote_code: bool, progress: Progress) -> Path:
    """Download a model repository, or find it in the local cache.

    Args:
        repo_id: `name` or `organisation/name`.
        trust_remote_code: Fetch the repository's Python files too.
        progress: Where the download is reported.

    Returns:
        The snapshot directory in the hub's cache.

    Raises:
        UserError: There is no such repository, it is gated, or it is neither cached nor reachable.
    """
    patterns = [*_PATTERNS, "*.py"] if trust_remote_code else list(_PATTERNS)
    try:
        with progress.task(f"download {repo_id}", None):
            return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(repo_id, "no such file or directory, and not a hub id", _LOCAL_CHOICES) from None
    except GatedRepoError:
        hint = "accept its terms on the model page, then log in with `hf auth login`"
        raise UserError(repo_id, "the repository is gated", hint) from None
    except RepositoryNotFoundError:
        raise UserError(repo_id, "no such file or directory, and no such model on the hub", _LOCAL_CHOICES) from None
    except LocalEntryNotFoundError:
        cause = "no such file or directory here; the hub cannot be reached and its cache does not hold the model"
        raise UserError(repo_id, cause, f"connect to the network; or {_LOCAL_CHOICES}") from None
    except HfHubHTTPError as error:
        raise UserError(repo_id, f"the hub refused the download ({error})", "try again later") from None
