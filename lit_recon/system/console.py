"""The console: where commands print tables, lines of the log and bars, with control characters of texts as escapes."""

from typing import Any

import rich.console
from rich.text import Text

from lit_recon.system.terminal import printable


class Console(rich.console.Console):
    """A console of rich that writes no control character but its own.

    Texts are replaced before they are measured and wrapped, so that nothing of them is cut off.
    """

    def render_str(self, text: str, **settings: Any) -> Text:
        """A text with its markup."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: Any, options: rich.console.ConsoleOptions | None = None) -> Any:
        """The segments of anything that can be shown."""
        if isinstance(renderable, Text) and (shown := printable(renderable.plain)) != renderable.plain:
            ways: Any = {name: getattr(renderable, name) for name in ("justify", "overflow", "no_wrap", "end")}
            renderable = Text(shown, renderable.style, **ways)
        return super().render(renderable, options)
