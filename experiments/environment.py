"""What every result records about where it came from."""

import functools
import pathlib
import subprocess
from typing import Any

from moejax import doctor

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODE = ("moejax", "kernels", "checkpoints", ":(glob)experiments/*.py")  # what a measurement runs


def environment(model: str) -> dict[str, Any]:
    """Model, commit, changes since it, hardware and versions of a measurement."""
    commit, dirty = source()
    return {"model": model, "commit": commit, "dirty": dirty, **doctor.environment()}


@functools.cache
def source(root: pathlib.Path = ROOT) -> tuple[str | None, list[str] | None]:
    """The commit of a clone, and the tracked files of its code that differ from it.

    Asked once, when this module is imported: a process keeps the code that it began with. Both are
    None where there is no clone (a folder within another one is none), or no git.
    """
    try:
        if pathlib.Path(_git(root, "rev-parse", "--show-toplevel").strip()) != root:
            return None, None
        commit = _git(root, "rev-parse", "HEAD").strip()
        changed = _git(root, "diff", "--name-only", "-z", "HEAD", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, sorted(name for name in changed.split("\0") if name)


def _git(root: pathlib.Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


source()
