"""Models on the Hugging Face hub, through the library's own cache, progress bars and variables."""

import threading
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from duetjax.checkpoint.folder import reason
from duetjax.config import ModelFolderError

_PATIENCE_S = 3.0
_TEXT = ["config.json", "generation_config.json", "tokenizer*", "chat_template*"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
# Subfolders hold other formats; Mistral's consolidated file holds the same weights once more.
_DUPLICATES = ["*/*", "consolidated*"]


def download(repo_id: str, *, weights: bool) -> Path:
    """Returns the local snapshot of a repository, downloading what the cache lacks.

    Where the hub cannot be asked (HF_HUB_OFFLINE, no network) or refuses, what is cached serves;
    without that `ModelFolderError` says why, within seconds.
    """
    refusal = _ask(repo_id)
    try:
        snapshot = snapshot_download(
            repo_id,
            allow_patterns=_TEXT + _WEIGHTS if weights else _TEXT,
            ignore_patterns=_DUPLICATES,
            local_files_only=refusal is not None,
        )
    except Exception as error:  # the library's errors and its HTTP client's share no base
        raise ModelFolderError(_explained(refusal or error)) from error
    return Path(snapshot)


def _ask(repo_id: str) -> Exception | None:
    """Asks the hub whether the repository is there; None if so, else what came in the way.

    In a thread of its own, because a name server that never answers cannot be given a timeout,
    and `snapshot_download` waits for the hub without one.
    """
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(repo_id, timeout=_PATIENCE_S)
            answers.append(None)
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return answers[0] if answers else TimeoutError(f"no answer within {_PATIENCE_S:.0f} s")


def _explained(error: Exception) -> str:
    match error:
        case GatedRepoError():
            return "gated: accept its licence on its hub page, then set HF_TOKEN"
        case RepositoryNotFoundError():
            return "not found: check the spelling, or set HF_TOKEN if it is private"
        case OfflineModeIsEnabled():
            return "not in the local cache, and HF_HUB_OFFLINE forbids asking; unset it once"
        case HfHubHTTPError():
            return f"refused with status {error.response.status_code}; check HF_TOKEN or try later"
        case _:
            return f"not available ({reason(error)}); check the network, or download it elsewhere"
