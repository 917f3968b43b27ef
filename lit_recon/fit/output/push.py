"""Upload of a finished run to the Hugging Face Hub: checkpoint, model card and masks, in one commit.

Only where it was asked for (push=<owner>/<name>). A repository that is new is private. Weights that lie there already
and are not replaced would be loaded instead of the new ones, or with them: the same commit deletes them.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from lit_recon.fit.output.card import PLACE
from lit_recon.system.command_line import as_argument, in_words
from lit_recon.system.console import Console

MASKS = "lit_recon/masks.safetensors"  # not next to the weights: some programs load every file of tensors there
_WEIGHTS = re.compile(r"[^/]+\.(safetensors|bin|pt|pth|gguf)|[^/]+\.index\.json")


class NotPushed(Exception):
    """A finished run could not be uploaded."""


def check_push(push: str) -> None:
    """Find what would keep a run from being uploaded, before it starts.

    Args:
        push: The Hub id, <owner>/<name>.

    Raises:
        ValueError: It is no id, the Hub is switched off or does not answer, or nobody is logged in who may write.
    """
    try:
        validate_repo_id(push)
    except HFValidationError as error:
        raise ValueError(f"push={push!r} is no id of the Hub ({error}); give push=<owner>/<name>.") from error
    if "/" not in push:
        raise ValueError(f"push={push!r}: expected <owner>/<name>, where owner is your name on the Hub, or a group's.")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push={push}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it, or leave push out.")
    try:
        about: Any = HfApi().whoami()
    except (OSError, ValueError, HTTPError) as error:
        raise ValueError(
            f"push={push}: the Hub does not say who is logged in ({_short(error)}); log in with hf auth login, or set "
            "HF_TOKEN, or leave push out and upload later."
        ) from error
    if ((about.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise ValueError(f"push={push}: the token of {about.get('name')} may only read; log in with another.")


def upload(run: Path, push: str, console: Console) -> None:
    """Upload a finished run and say where it is.

    Raises:
        NotPushed: It could not be uploaded; the message says how to try again.
        KeyboardInterrupt: Ctrl-C; so does that of this.
    """
    again = f"upload it with: python -m lit_recon.fit {as_argument('resume', run)} {as_argument('push', push)}"
    try:
        address = push_run(run, push)
    except NotPushed as error:
        raise NotPushed(f"{run} is finished, but it could not be uploaded to {push} ({error}); {again}") from error
    except KeyboardInterrupt as stop:
        raise type(stop)(f"{run} is finished, and not uploaded to {push}; {again}") from stop
    said = f"uploaded to {address} (a new repository is private: what it says under Settings there decides who sees it)"
    console.print(said, highlight=False, soft_wrap=True, markup=False)


def push_run(run: Path, push: str) -> str:
    """Upload a finished run.

    Args:
        run: Its folder.
        push: The Hub id.

    Returns:
        The address of the model.

    Raises:
        NotPushed: It could not be uploaded; no file there has changed, but a repository may have been made.
    """
    api = HfApi()
    try:
        address = api.create_repo(push, private=True, exist_ok=True)
        files = files_to_push(run, push)
        stale = [path for path in api.list_repo_files(push) if _WEIGHTS.fullmatch(path) and path not in files]
        api.create_commit(
            push,
            operations=[
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path, is_folder=False) for path in stale),
            ],
            commit_message="Model pruned and reconstructed by lit_recon",
        )
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise NotPushed(_short(error)) from error
    return str(address)


def files_to_push(run: Path, push: str) -> dict[str, Path | bytes]:
    """What is uploaded of a run, by its path there: a file, or its content where that differs.

    Args:
        run: The run's folder.
        push: The Hub id, under which the code of the model card finds the model.
    """
    checkpoint = run / PLACE
    files: dict[str, Path | bytes] = {
        path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()
    }
    card = (checkpoint / "README.md").read_text(encoding="utf-8").replace(f'("{PLACE}")', f'("{push}")')
    masks = f"\nMasks of all pruned matrices: `{MASKS}` (`lit_recon.Masks.load`).\n"
    return files | {"README.md": (card + masks).encode(), MASKS: run / "masks.safetensors"}


def _short(error: BaseException) -> str:
    """What the Hub's client says, on one line and without its advice over several."""
    return in_words(error).partition(" (Request ID")[0][:300].rstrip(". ")
