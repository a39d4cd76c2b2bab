"""Images a second of our loader, of stock webdataset with Pillow and torchvision, and of NVIDIA DALI on the CPU.

All read the same tars, decode JPEGs of 500 × 375, crop, resize to 224, mirror and batch 64, in turns, each in a
process of its own that is held to one core, or to all of them. See feed.py for what each of them is. The images are
2,048 crops of photographs, once of 55 kB and once of 100 kB in the mean. The law of the crops is the same for all but
"own crops", which is the paper's code's. Ours and DALI's resize is bilinear without antialiasing; torchvision's of
Pillow images is bilinear with it, and cannot be otherwise.
"""

import sys
import tempfile
from pathlib import Path

from common import arguments, cores, report, row
from feed import BATCH, CONTESTANTS, SIZE
from peers import PYTHON, is_installed, run_script
from photographs import little_noise, photographs

NEEDED = {"webdataset": ("webdataset", "torchvision"), "dali": ("nvidia.dali",)}  # in the peers' environment


def main():
    args = arguments(__doc__)
    rounds, seconds, counts = (1, 0.2, [cores()]) if args.quick else (3, 6, sorted({1, cores()}))
    present = [name for name in CONTESTANTS if name not in NEEDED or is_installed(*NEEDED[name])]
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            sets = {"noise": little_noise(Path(folder))}
        else:
            sets = {f"{size} kB": photographs(size) for size in (55, 100)}
        speeds = {(name, size, many): [] for size in sets for name in present for many in counts}
        for _ in range(rounds):
            for (name, size, many), values in speeds.items():
                values.append(speed(name, sets[size], many, seconds))
    rows = {key: row(label(*key), "images/s", values) for key, values in speeds.items()}
    every = [*rows.values()]
    for size in sets if len(counts) > 1 else []:
        one, all_of_them = (speeds["patchmill", size, many] for many in (1, cores()))
        shares = [100 * b / (cores() * a) for a, b in zip(one, all_of_them, strict=True)]
        every.append(row(f"efficiency of patchmill from 1 to {cores()} cores, {size}", "%", shares))
    ratios = {
        label(peer, size, many): rows["patchmill", size, many].value / rows[peer, size, many].value
        if peer in present
        else None
        for size in sets
        for peer in NEEDED
        for many in counts
    }
    report("loader", every, ratios, args.json)


def label(name: str, size: str, many: int) -> str:
    return f"{name}, {size}, {many} {'core' if many == 1 else 'cores'}"


def speed(name: str, folder: Path, many: int, seconds: float) -> float:
    """Return the images/s of a contestant on so many cores."""
    python = PYTHON if name in NEEDED else sys.executable
    found = run_script(python, "feed.py", name, folder, "--cores", many, "--seconds", seconds)
    if (found["shape"], found["dtype"]) != ([BATCH, SIZE, SIZE, 3], "uint8"):
        sys.exit(f"{name} gives {found['dtype']} {found['shape']}")
    return found["images/s"]


if __name__ == "__main__":
    main()
