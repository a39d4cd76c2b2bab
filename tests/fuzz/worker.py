"""Tries inputs on one target in a process of its own, which a bad one may end; prints what broke the contract, as JSON.

``current`` in the folder is the input that is being read: after a crash or a kill, the one that did it, on the target
that stderr names last.
"""

import argparse
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from random import Random

SECONDS = 10
"""Of processor time that one input may take: by then, the signal that ends this process."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {
    "os.mkdir": ((0, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.truncate": ((0, None),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "shutil.rmtree": ((0, 1),),
}  # fmt: skip
"""Events of Python's audit, and where in their arguments paths stand and the descriptors of folders they count from."""
FORGED = ("/outside", "/outside.npy", "/nowhere", "/tmp/outside-of-fuzz")
"""Where absolute paths in damaged inputs lead; relative ones, of two steps up at most, end in the folder."""
STARTING = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}


class EscapeError(BaseException):
    """Something was written outside the folder, or a program or connection started."""


def guard(folder: Path) -> None:
    """See to it that an ``EscapeError`` is raised where Python changes anything outside ``folder``."""
    inside = str(folder.resolve())

    def look(event: str, arguments: tuple) -> None:
        if event in STARTING:
            raise EscapeError(f"{event}{arguments}")
        paths = [(arguments[at], from_ and arguments[from_]) for at, from_ in CHANGING.get(event, ())]
        if event == "open" and ((arguments[2] or 0) & WRITING or set(arguments[1] or "") & set("wax+")):
            paths = [(arguments[0], None)]
        for path, descriptor in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                base = os.readlink(f"/proc/self/fd/{descriptor}") if (descriptor or -1) >= 0 else os.getcwd()
                real = os.path.realpath(os.path.dirname(os.path.join(base, os.fsdecode(path))))
                if not f"{real}/".startswith(f"{inside}/") and os.fsdecode(path) != "/dev/null":
                    raise EscapeError(f"{event} {path!r}")

    sys.addaudithook(look)


def surroundings(folder: Path, room: Path) -> dict[str, tuple[int, ...]]:
    """Return what lies in ``folder`` but for the room, and at ``FORGED``: it shows what C++ and Rust changed, too."""
    files = [path for path in FORGED if os.path.lexists(path)]
    found: dict[str, tuple[int, ...]] = {}
    for place, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if os.path.join(place, name) != str(room)]
        found |= {os.path.join(place, name): () for name in inside}
        files += [os.path.join(place, name) for name in names]
    for path in files:
        told = os.lstat(path)
        found[path] = (told.st_ino, told.st_size, told.st_mtime_ns)
    return found


def limit(room: int) -> None:
    """Bound the memory that is taken from here on."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Try the corpora of some targets, and many inputs that are made of what is good in them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--folder", type=Path, required=True, help="empty; nothing else is written to")
    parser.add_argument("--times", type=float, default=1.0, help="of what `make test-long` tries")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable()
    from tests.fuzz.targets import CORPUS, target_of

    rng, folder = Random(options.seed), options.folder.resolve()
    room = folder / "around" / "beside" / "room"
    room.mkdir(parents=True)
    os.chdir(room.parent)
    for place in (folder, *room.parents[:2]):  # to be written over
        (place / "outside").write_text("nothing that is read")
    corpora = {
        name: {path: path.read_bytes() for path in sorted((CORPUS / name).iterdir())} for name in options.targets
    }
    good = {
        name: [data for path, data in corpus.items() if not path.name.startswith("found-")]
        for name, corpus in corpora.items()
    }
    guard(options.folder)
    for name, seeds in good.items():  # what is imported late is imported by now
        for data in seeds:
            assert reading(target_of(name), data, room, folder) == ("read", None), f"a good input of {name}"
    told = {}
    for name, corpus in corpora.items():
        target, ends, found = target_of(name), Counter(), {}
        limit(target.room)
        print(f"target {name}", file=sys.stderr, flush=True)
        for number in range(-len(corpus), int(target.count * options.times)):
            data = [*corpus.values()][number] if number < 0 else made(target, good[name], rng)
            (folder / "current").write_bytes(data)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            end, problem = reading(target, data, room, folder)
            signal.setitimer(signal.ITIMER_PROF, 0)
            ends[end] += 1
            if problem and problem.partition("\n")[0] not in found:
                kept = folder / f"{name}-{number}"
                kept.write_bytes(data)
                found[problem.partition("\n")[0]] = {"input": str(kept), "problem": problem}
        told[name] = {"ends": ends, "found": list(found.values())}
    json.dump(told, sys.stdout)


def made(target, good: list[bytes], rng: Random) -> bytes:
    """Return an input that is made of a good one."""
    return target.change(rng.choice(good), rng)


def reading(target, data: bytes, room: Path, folder: Path) -> tuple[str, str | None]:
    """Let a target read an input; return how that ended, and what is wrong with that, where it first went wrong."""
    before = surroundings(folder, room)
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    ended = ending(target, data, room)
    after = surroundings(folder, room)
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    return ("odd", f"EscapeError: {changed} changed") if changed and not ended[1] else ended


def ending(target, data: bytes, room: Path) -> tuple[str, str | None]:
    """Return how the reading of an input ended, and what is wrong with that."""
    try:
        target.read(data, room)
    except target.contract as error:
        text = str(error)
        if not text or "\n" in text or "\r" in text:
            return "odd", f"{type(error).__name__} of {text.count(chr(10)) + 1} lines\n{told_of(error)}"
        return type(error).__name__, None
    except (Exception, EscapeError) as error:  # noqa: BLE001 (that is what is looked for)
        where = traceback.extract_tb(error.__traceback__)
        ours = next((each for each in reversed(where) if "/site-packages/" not in each.filename), where[-1])
        place = f"{type(error).__name__} at {Path(ours.filename).name}:{ours.lineno}"
        return "odd", f"{place}\n{told_of(error)}"
    return "read", None


def told_of(error: BaseException) -> str:
    """Return the end of a traceback."""
    return "".join(traceback.format_exception(error))[-3000:]


if __name__ == "__main__":
    main()
