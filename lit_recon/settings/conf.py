"""conf/: the folder of the configuration, and the members of its groups."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ stands in the package; in a checkout next to it.
CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())


def members(group: str) -> list[str]:
    """Names of the members of a group, such as "data", in order."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
