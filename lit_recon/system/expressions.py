"""Regular expressions by which settings choose names of matrices, windows or parameters (re.search)."""

import re


def check_expression(setting: str, value: object, names: str) -> None:
    """Raise a ValueError for a value that is no regular expression.

    Args:
        setting: The setting.
        value: Its value.
        names: What it is for, with an example, in the words of the message.
    """
    expected = f"{setting}={value!r}: expected a regular expression for {names}"
    if not isinstance(value, str) or not value:
        raise ValueError(f"{expected}.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{expected}, which this is not ({error}); write \\ before special characters.") from error
