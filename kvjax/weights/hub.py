"""A checkpoint from the Hugging Face hub, through `huggingface_hub` and its own cache."""

from __future__ import annotations

from pathlib import Path

PATTERNS = ("*.json", "*.jinja", "model*.safetensors")
"""What is fetched: not PyTorch's pickles, and not Mistral's second copy `consolidated.safetensors`."""


def snapshot(repo: str) -> Path:
    """The local folder of a hub id, fetched if it is not in the hub's cache; offline, the cache is enough.

    Raises:
        FileNotFoundError: if there is no such repository, or it is private or gated to this user.
        ConnectionError: if the hub cannot be reached and the cache does not have it.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(PATTERNS)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"load: {repo!r} is neither a local path nor a repository of the Hugging Face hub that this user may read "
            f"(`hf auth login` gives access to gated ones): {error}"
        ) from error
    except OSError as error:  # the hub's own errors, the network's and httpx's all come as one
        raise ConnectionError(
            f"load: {repo!r} is no local path, and the Hugging Face hub could not be asked for it; connect to the "
            f"internet once to fetch it, or give the path of a folder that has it: {error}"
        ) from error
