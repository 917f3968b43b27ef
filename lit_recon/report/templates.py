"""Pages from templates: everything is escaped, and a Content-Security-Policy lets a page request nothing.

Only the style and the script that are part of the package run, by their SHA-256: what a name, a path or a prompt might
smuggle into a page would not (W3C, Content Security Policy Level 3).
"""

import base64
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lit_recon import __version__
from lit_recon.report.format import as_count, as_error, as_factor, as_memory, as_nats, as_perplexity, as_share
from lit_recon.system.units import duration

HERE = Path(__file__).parent
MADE_BY = f"lit_recon {__version__}"


@cache
def environment() -> Environment:
    """The templates of this folder, with the numbers' formats as filters."""
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"ppl": as_perplexity, "share": as_share, "error": as_error, "factor": as_factor}
    made.filters |= {"duration": duration, "memory": as_memory, "count": as_count, "nats": as_nats}
    return made


def render(template: str, **values: Any) -> bytes:
    """A page.

    Args:
        template: Its file in this folder.
        values: What the template shows; text is escaped.

    Returns:
        The page in UTF-8; names that are not UTF-8 are shown as escapes.
    """
    style, code = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    policy = [
        "default-src 'none'",
        "img-src data:",
        f"style-src {_digest(style)}",
        f"script-src {_digest(code)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    # Markup: files of the package, nothing that a run has written
    head = {"style": Markup(style), "script": Markup(code), "policy": "; ".join(policy), "made_by": MADE_BY}
    return environment().get_template(template).render(**head, **values).encode(errors="backslashreplace")


def relative_link(path: Path, folder: Path) -> str:
    """A path as a page in a folder links to it; quoted, so that no name is read as a scheme such as `javascript:`."""
    relative = Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    return quote(relative.encode(errors="surrogateescape"))


def _digest(text: str) -> str:
    """Text as a source that a policy allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
