"""What `reshard --version` says: the version, and which extras are there."""

from __future__ import annotations

import platform
from importlib import metadata

from reshard._version import __version__

#: The packages of each extra, by which it works; `pyproject.toml` has the whole lists.
EXTRAS: dict[str, tuple[str, ...]] = {
    "eval": ("torch", "transformers", "accelerate", "pillow", "jinja2"),
    "html": ("jinja2",),
    "ray": ("ray",),
    "remote": ("obstore",),
    "testing": ("pytest", "hypothesis"),
    "zstd": ("zstandard",),
}


def words() -> str:
    """The version, Python's, and each extra with the versions of its packages."""
    lines = [f"reshard {__version__}, Python {platform.python_version()}"]
    for extra, packages in EXTRAS.items():
        found = {package: _version(package) for package in packages}
        lacking = [package for package, version in found.items() if not version]
        there = ", ".join(f"{package} {version}" for package, version in found.items() if version)
        state = f"lacks {', '.join(lacking)}" if lacking else there
        lines.append(f"  {extra:<8} {state}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
