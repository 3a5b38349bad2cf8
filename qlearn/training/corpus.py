"""The corpus of the bundled model: Python source that is already on the machine.

Every Python installation carries a corpus of good code: its standard library and the packages installed beside it.
This module walks both, keeps the files a language model can learn from, and remembers where each came from, so that
the model card can name every package with its version and licence.

A file is kept when

* its package has a permissive licence (MIT, BSD, Apache, PSF, ISC ...; nothing under a copyleft or a proprietary
licence),
* it has between 200 and 200,000 characters and its lines are shorter than 80 characters on average (longer ones are
  tables and generated code), and
* no other file has the same bytes.

Twenty modules of the standard library are held out: the model never sees them, and its perplexity is measured on them.
"""

import hashlib
import importlib.metadata
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_MODULES = frozenset(
    """argparse bisect calendar colorsys configparser contextlib csv dataclasses difflib fractions functools
    graphlib heapq queue random sched shlex statistics string textwrap""".split()  # noqa: SIM905
)
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|HPND|0BSD|Zlib|Unlicense|CC0)", re.I)
RESTRICTED = re.compile(r"GPL|GNU|MPL|Mozilla|Proprietary|NVIDIA|EULA|Commercial", re.I)
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "idlelib"}


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: its text, the package it came from, and whether it is held out of training."""

    text: str
    package: str
    held_out: bool = False


def licence_of(distribution):
    """The licence a distribution declares, as one short string ('' when it declares none).

    Looks at the SPDX expression first, then at the trove classifiers, then at the first line of the free-text field.
    """
    metadata = distribution.metadata
    expression = metadata.get("License-Expression")
    if expression:
        return expression
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    free_text = (metadata.get("License") or "").strip().splitlines()
    return ", ".join(classifiers) or (free_text[0][:60] if free_text else "")


def is_permissive(licence):
    """Whether a licence string allows what we do with the code.

    >>> is_permissive("BSD-3-Clause"), is_permissive("MIT AND LGPL-2.1"), is_permissive("")
    (True, False, False)
    """
    return bool(PERMISSIVE.search(licence)) and not RESTRICTED.search(licence)


def is_learnable(text):
    """Whether a file is worth a model's time: neither a stub nor a table.

    >>> is_learnable("x = 1"), is_learnable("def f(x):\\n    return x\\n" * 20)
    (False, True)
    """
    if not 200 < len(text) < 200_000:
        return False
    return sum(map(len, text.splitlines())) / max(1, text.count("\n")) <= 80


def standard_library():
    """Yield (path, package, held_out) for each module of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    package = f"cpython {sysconfig.get_python_version()}"
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts):
            yield path, package, len(relative.parts) == 1 and path.stem in HELD_OUT_MODULES


def installed_packages():
    """Yield (distribution, label, licence) for each permissively licensed package beside the interpreter."""
    found = importlib.metadata.distributions(path=[sysconfig.get_paths()["purelib"]])
    for distribution in sorted(found, key=lambda d: (d.metadata["Name"] or "").lower()):
        licence = licence_of(distribution)
        if is_permissive(licence):
            yield distribution, f"{distribution.metadata['Name']} {distribution.version}", licence


def read(path):
    """The text of a file, or '' when it is not UTF-8 or not there."""
    try:
        return path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError):
        return ""


def collect():
    """The whole corpus of this machine.

    Returns (files, sources): a list of SourceFile, and a list of {"package", "licence", "files", "characters"} for
    the model card.
    """
    candidates = [(path, package, held_out) for path, package, held_out in standard_library()]
    licences = {candidates[0][1]: "PSF-2.0"} if candidates else {}
    for distribution, label, licence in installed_packages():
        licences[label] = licence
        paths = [Path(distribution.locate_file(f)) for f in distribution.files or [] if f.suffix == ".py"]
        candidates += [(path, label, False) for path in paths]
    files, seen = [], set()
    for path, package, held_out in candidates:
        text = read(path)
        digest = hashlib.sha256(text.encode()).digest()
        if is_learnable(text) and digest not in seen:
            seen.add(digest)
            files.append(SourceFile(text, package, held_out))
    return files, summarize(files, licences)


def summarize(files, licences):
    """Files and characters per package, in the order the packages were met."""
    rows = {}
    for file in files:
        row = rows.setdefault(
            file.package, {"package": file.package, "licence": licences[file.package], "files": 0, "characters": 0}
        )
        row["files"] += 1
        row["characters"] += len(file.text)
    return list(rows.values())
