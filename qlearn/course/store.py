"""The learner's own notes between lessons (guesses, points of the board): small JSON objects in the data folder.

A file is replaced whole or not at all. One that cannot be read is moved aside with a warning: never deleted, and
never fatal.
"""

import json
import os
import warnings

from qlearn.course import places


def read(name):
    """The dict kept in the file `name` of the data folder, or {} where there is none.

    A file that is not a JSON object is renamed to `name`.broken, with a warning that says so.
    """
    path = places.data_folder() / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except FileNotFoundError:
        return {}
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        os.replace(path, path.with_name(f"{name}.broken"))
        warnings.warn(f"{path} could not be read ({error}); it was moved to {name}.broken", stacklevel=2)
        return {}


def write(name, content):
    """Replace the file `name` of the data folder by the dict `content`, atomically."""
    places.write_atomically(
        places.data_folder() / name, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
