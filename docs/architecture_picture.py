"""Draws the house, and a batch's way through it: python docs/architecture_picture.py > docs/architecture.svg.

A test holds every name to a file that exists. Names without an ending are folders.
"""

from html import escape

HOUSE = {
    "launch": {
        "the command line": ("cli.py", "cli_plan.py", "cli_model.py", "cli_shards.py", "cli_checkpoint.py"),
        "plans, stage by stage": ("plan.py", "stages.py", "sweep.py", "run.py"),
        "ranks, here and on Slurm": ("local.py", "slurm.py", "job.py", "rank.py", "status.py"),
        "before anything starts": ("doctor.py", "estimate.py"),
    },
    "pipeline": {
        "settings": ("config.py", "recipes", "resume.py"),
        "training": ("train.py", "models", "objectives", "engines"),
        "what is kept": ("checkpoint.py", "saver.py", "mirror.py", "telemetry.py"),
        "afterwards": ("convert", "evaluate", "figures", "report"),
    },
    "shards": {
        "made": ("sources", "plan.py", "shard.py", "merge.py", "build.py"),
        "at rest": ("manifest.py", "dataset.py", "index.py", "verify.py", "dedupe.py"),
        "in motion": ("order.py", "store.py", "decode.py", "augment.py", "loader.py"),
        "what came": ("ledger.py", "audit.py", "quarantine.py"),
    },
}
"""By package, upper ones importing lower ones: what is done, and the files that do it."""

WAY = (
    ("shards/order.py", "which samples: positions p to p + G of the order, of which rank r of R takes every R-th"),
    ("shards/dataset.py", "where each lies: tar, first byte, size, label; from the manifest"),
    ("shards/store.py", "its bytes: a pread of a local tar, a range request of a bucket or web server"),
    ("shards/chunks.py", "of remote tars a chunk at a time, ahead of need, through shards/cache.py on a local disk"),
    ("shards/decode.py", "pixels, in threads: of a JPEG the part alone that the crop needs, by shards/jpegcrop.py"),
    ("shards/augment.py", "a square: crop and flip, drawn by (seed, epoch, position)"),
    ("shards/loader.py", "the batch: uint8 [n, size, size, 3]; what came is noted in shards/ledger.py"),
    ("pipeline/prefetch.py", "on the device, one batch ahead, on a stream of its own"),
    ("pipeline/objectives", "what the model gets: float32 [n, 3, size, size] in [-1, 1], labels or masks; mixup"),
    ("pipeline/microbatch.py", "in parts of as many images as the device holds at once"),
    ("pipeline/models", "logits, or what is told of patches; the objective makes a loss of it"),
    ("pipeline/engines", "gradients of all micro-batches and ranks, clipped; a step, or none (pipeline/guard.py)"),
    ("pipeline/saver.py", "a copy in host memory; training goes on, while a thread writes it"),
    ("pipeline/checkpoint.py", "a folder that appears whole: each rank's float32 pieces, and p"),
)
"""Where a batch goes, and what it is after each file or folder."""

COLOURS = {"launch": "#ff725c", "pipeline": "#4269d0", "shards": "#3ca951"}
WIDTH, LEFT, BAND, CELL, ROW = 960, 16, 116, 208, 34


def main() -> None:
    """Print the picture."""
    shapes = []

    def text(x: float, y: float, words: str, style: str = "") -> None:
        shapes.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>')

    def box(x: float, y: float, width: float, height: float, colour: str, style: str = "") -> None:
        size = f'width="{width:g}" height="{height:g}"'
        shapes.append(f'<rect x="{x:g}" y="{y:g}" {size} rx="4" stroke="{colour}" fill="{colour}" {style}/>')

    def arrow(x: float, y: float, length: float) -> None:
        shapes.append(f'<path d="M{x:g} {y:g}v{length - 5:g}" class="a"/>')
        shapes.append(f'<path d="M{x - 4:g} {y + length - 6:g}h8l-4 6z"/>')

    text(LEFT, 24, "The house: imports go down, never up", 'class="h"')
    y = 40
    for package, parts in HOUSE.items():
        box(LEFT, y, WIDTH - 2 * LEFT, BAND - 20, COLOURS[package], 'fill-opacity="0.08"')
        text(LEFT + 12, y + 24, package + "/", 'class="h"')
        for place, (what, names) in enumerate(parts.items()):
            x = LEFT + 100 + place * CELL
            text(x, y + 22, what, 'class="w"')
            for line, start in enumerate(range(0, len(names), 2)):
                words = "  ".join(_as_shown(name) for name in names[start : start + 2])
                text(x, y + 44 + line * 18, words, 'class="m"')
        y += BAND
        if package != "shards":
            arrow(LEFT + 40, y - 20, 20)

    y += 32
    text(LEFT, y - 16, "A batch's way: after each, what it is", 'class="h"')
    for place, (name, what) in enumerate(WAY):
        package = name.partition("/")[0]
        box(LEFT, y, 196, ROW - 10, COLOURS[package], 'fill-opacity="0.16"')
        text(LEFT + 10, y + 16, _as_shown(name), 'class="m"')
        text(LEFT + 212, y + 16, what)
        y += ROW
        if place + 1 < len(WAY):
            arrow(LEFT + 98, y - 10, 10)
    style = (
        "text{font:12.5px sans-serif;fill:#1b1f24;white-space:pre}.h{font-weight:600;font-size:14px}"
        ".w{fill:#57606a}.m{font-family:monospace;font-size:12px}.a{fill:none;stroke:#1b1f24}"
    )
    size = f'viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>')
    print(f'<style>{style}</style><rect width="{WIDTH}" height="{y}" fill="#fff"/>')
    print("\n".join(shapes))
    print("</svg>")


def _as_shown(name: str) -> str:
    return name if name.endswith(".py") else f"{name}/"


if __name__ == "__main__":
    main()
