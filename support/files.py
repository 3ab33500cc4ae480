"""Files that are either old or whole."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; if nothing fails, that file then takes the name `path`.

    A process that is killed, or a disk that is full, leaves what was there before.
    """
    path = Path(path)
    # Always the same name: what a killed process leaves behind is overwritten by the next one.
    temporary = path.with_name(f".{path.name[:60]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path}: not written ({reason}); what was there is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Replaces a file by one that holds a value as JSON."""
    with replacing(path) as temporary:
        # In ASCII: a file name that is not UTF-8 cannot be written in any other way.
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


def make_folder(path: str | Path) -> None:
    """Creates a folder for results, and makes sure that files can be written there.

    Raises:
        OSError: they cannot; better now than after an hour of work.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
