"""What people name as ``package.module:NAME``: policies, reward models and verifiers of their own."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from typing import Any

from ttc.errors import InputError, named, shortened


def load(field: str, name: str) -> Any:
    """What ``name`` (``package.module:NAME``) stands for: found where Python finds its packages, else in the working directory.

    Raises InputError, in one line, for a module that is not there or breaks as it is imported, and for a NAME that it lacks.
    """
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file of the same name takes no package's place
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise InputError(
                f"{field}: {name!r} needs a module that is not there ({error}); install it"
            ) from None
        raise InputError(
            f"{field}: no module {error.name!r} for {name!r}, here or among the installed packages; write package.module:NAME"
        ) from None
    except Exception as error:  # it is somebody else's code
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f", {shortened(last.filename)}:{last.lineno}"
        raise InputError(f"{field}: importing {path!r} failed ({named(error)}{where}); mend it") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"did you mean {path}:{near[0]}? " if near else ""
        raise InputError(f"{field}: {path!r} has no {attribute!r}; {hint}write package.module:NAME") from None


def make(field: str, name: str, kind: Any, **options: Any) -> Any:
    """``kind(**options)``. Raises InputError, in one line, where that fails."""
    try:
        return kind(**options)
    except InputError:
        raise
    except Exception as error:  # it is somebody else's code
        raise InputError(
            f"{field}: {name} can't be made ({named(error)}); mend it, or give other options"
        ) from error
