"""Text files that are written whole or not at all."""

import os
import pathlib
import tempfile

from moejax.errors import InputError


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a text file as a whole or not at all; one that it replaces keeps its mode.

    Raises:
        InputError: it cannot be written; what was there stays, and nothing is left beside it.
    """
    try:
        # A folder, not a file of tempfile's, whose mode is not what the umask makes of a new one.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".tmp") as folder:
            unfinished = pathlib.Path(folder, path.name)
            unfinished.write_text(text, encoding="utf-8")
            if path.exists():
                unfinished.chmod(path.stat().st_mode & 0o777)
            os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
