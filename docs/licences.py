"""Writes licences.md: what constraints.txt pins, under which licence each says it is, and what asks for it.

Run as ``python docs/licences.py > docs/licences.md`` where all of it is installed, as ``make`` does.
"""

import re
import tomllib
from importlib.metadata import PackageMetadata, metadata, requires
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# Licences of what Patchmill needs

Patchmill is under Apache-2.0 ([LICENSE](../LICENSE)). This is everything that `constraints.txt` pins, with the licence
that the package's own metadata name; nothing of it is in Patchmill's wheel. *asked for by* is Patchmill itself
(`core`), one of its extras, or other packages. A build of torch for CUDA brings NVIDIA's libraries besides, which are
under NVIDIA's own terms and are not pinned. `make docs` makes this page anew, and a test compares the two.

| package | version | licence | asked for by |
|---|---|---|---|
"""
SPDX = {
    "Apache Software License": "Apache-2.0", "Apache 2.0": "Apache-2.0", "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0", "Apache Software License 2.0": "Apache-2.0", "Apache 2": "Apache-2.0",
    "Apache": "Apache-2.0", "Apache License 2.0 (Apache-2.0)": "Apache-2.0", "Apache 2.0 License": "Apache-2.0",
    "http://www.apache.org/licenses/LICENSE-2.0": "Apache-2.0", "Dual License": "Apache-2.0 OR BSD-3-Clause",
    "MIT License": "MIT", "The MIT License": "MIT", "MIT license": "MIT", "BSD License": "BSD",
    "BSD 3-Clause": "BSD-3-Clause", "BSD-3-Clause License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC", "ISC License": "ISC", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}  # fmt: skip
"""Other words for some licences; ``BSD`` where nothing tells which."""


def main() -> None:
    """Print the page."""
    print(HEAD + "\n".join(rows()))


def rows() -> list[str]:
    """Return the rows of the table."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    asked = asked_for_by(list(pins))
    return [
        f"| {name} | {version} | {licence(metadata(name))} | {', '.join(asked.get(plain(name), []))} |"
        for name, version in sorted(pins.items(), key=lambda each: plain(each[0]))
    ]


def licence(known: PackageMetadata) -> str:
    """Return the licence that a package's metadata name: in an expression, in words, or as a classifier."""
    words = known.get("License") or ""
    classes = [
        each.rpartition(" :: ")[2] for each in known.get_all("Classifier") or [] if each.startswith("License ::")
    ]
    short = words if words and len(words) < 60 and "\n" not in words else ""
    told = known.get("License-Expression") or short or " or ".join(each for each in classes if each != "OSI Approved")
    return SPDX.get(told.strip(), told.strip()) or "not told"


def asked_for_by(names: list[str]) -> dict[str, list[str]]:
    """Return of each package who asks for it: ``core``, extras of Patchmill, else the packages that need it."""
    found: dict[str, list[str]] = {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {"core": project["dependencies"]} | {f"`{k}`": v for k, v in project["optional-dependencies"].items()}
    for who, all_of_it in ours.items():
        for each in all_of_it:
            found.setdefault(plain(each), []).append(who)
    direct = set(found)
    for name in sorted(names, key=plain):
        for each in requires(name) or []:
            if plain(each) not in direct and (("extra ==" not in each) or plain(name) == "moto"):
                found.setdefault(plain(each), []).append(plain(name))
    return {name: list(dict.fromkeys(each)) for name, each in found.items()}


def plain(requirement: str) -> str:
    """Return the normal name of what a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


if __name__ == "__main__":
    main()
