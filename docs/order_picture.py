"""Draws the order: python docs/order_picture.py > docs/order.svg. A test holds the two together."""

import numpy as np

from shards.order import Order, Shuffle

SHARDS, SAMPLES = 4, 12  # samples a shard
CHUNK, LANES, BLOCK = 4, 4, 6
GLOBAL_BATCH, RANKS = 8, 2
CELL, LEFT, TOP = 22, 190, 46
COLOURS = ("#4269d0", "#efb118", "#3ca951", "#ff725c")


def main() -> None:
    """Print the picture."""
    order = Order([SAMPLES] * SHARDS, 0, Shuffle(LANES, CHUNK, BLOCK))
    epoch = SHARDS * SAMPLES
    _, shard, index = order.locate(np.arange(epoch))
    shapes = []

    def text(x: float, y: float, words: str, style: str = "") -> None:
        shapes.append(f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>')

    def sample(x: float, y: float, shard: int, index: int, edge: str = "#fff") -> None:
        shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" fill="{COLOURS[shard]}" stroke="{edge}"/>'
            f'<text x="{x + CELL / 2:g}" y="{y + 15:g}" class="n">{index}</text>'
        )

    def frame(x: float, y: float, width: float, height: float, style: str = "") -> None:
        shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="f" {style}/>')

    y = TOP
    text(12, y - 18, "1  Shards are cut into chunks of consecutive samples: one range read each", 'class="h"')
    for s in range(SHARDS):
        text(LEFT - 12, y + 15, f"shard {s}", 'class="r"')
        for i in range(SAMPLES):
            sample(LEFT + i * CELL + i // CHUNK * 6, y, s, i)
        for c in range(SAMPLES // CHUNK):
            frame(LEFT + c * (CHUNK * CELL + 6), y, CHUNK * CELL, CELL)
        y += CELL + 6

    y += 44
    text(12, y - 18, "2  A hash of (seed, epoch) permutes all chunks; the sequence is cut into lanes", 'class="h"')
    for lane in range(LANES):
        text(LEFT - 12, y + 15, f"lane {lane}", 'class="r"')
        mine = sorted({(int(shard[p]), int(index[p]) // CHUNK) for p in range(lane, epoch, LANES)}, key=_first(lane))
        x = LEFT
        for s, chunk in mine:
            held = sorted(
                int(index[p]) for p in range(lane, epoch, LANES) if (shard[p], index[p] // CHUNK) == (s, chunk)
            )
            frame(x, y, len(held) * CELL, CELL)
            for i in held:
                sample(x, y, s, i)
                x += CELL
            frame(x - len(held) * CELL, y, len(held) * CELL, CELL)
            x += 6
        y += CELL + 6

    y += 44
    text(
        12,
        y - 18,
        "3  In a lane, blocks of samples are shuffled (first ones shorter, so that edges are staggered)",
        'class="h"',
    )
    top = y
    for lane in range(LANES):
        text(LEFT - 12, y + 15, f"lane {lane}", 'class="r"')
        for offset in range(epoch // LANES):
            p = offset * LANES + lane
            sample(LEFT + offset * CELL, y, int(shard[p]), int(index[p]))
        first = max(1, BLOCK * (lane + 1) // LANES)
        for edge in range(first, epoch // LANES, BLOCK):
            shapes.append(f'<path d="M{LEFT + edge * CELL} {y - 2}v{CELL + 4}" stroke="#111" stroke-width="3"/>')
        y += CELL + 6
    columns = GLOBAL_BATCH // LANES
    for step in range(epoch // GLOBAL_BATCH):
        x = LEFT + step * columns * CELL
        frame(x, top - 4, columns * CELL, y - top + 2, 'stroke-dasharray="4 3"')
        text(x + columns * CELL / 2, y + 14, f"step {step}", 'class="m"')

    y += 64
    text(
        12,
        y - 18,
        "4  Position p lies in lane p mod 4 at offset p div 4; step 2 is p = 16 ... 23, whatever the ranks",
        'class="h"',
    )
    for rank in range(RANKS):
        text(LEFT - 12, y + 15, f"rank {rank} of {RANKS}", 'class="r"')
        for place, p in enumerate(range(2 * GLOBAL_BATCH + rank, 3 * GLOBAL_BATCH, RANKS)):
            x = LEFT + place * (CELL + 34)
            sample(x, y, int(shard[p]), int(index[p]))
            text(x + CELL + 4, y + 15, f"p={p}", 'class="p"')
        y += CELL + 6
    height = y + 10
    width = LEFT + SAMPLES * CELL + 240
    style = (
        "text{font:12px sans-serif;fill:#1b1f24}.h{font-weight:600;font-size:13px}"
        ".n{text-anchor:middle;fill:#fff;font-size:10px}"
        ".r{text-anchor:end}.m{text-anchor:middle;font-size:10px}.p{font-size:10px}.f{fill:none;stroke:#111}"
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>')
    print(f'<style>{style}</style><rect width="{width}" height="{height}" fill="#fff"/>')
    print("\n".join(shapes))
    print("</svg>")


def _first(lane: int):
    """Return a sort key for the chunks of a lane: where they stand before blocks are shuffled."""
    plain = Order([SAMPLES] * SHARDS, 0, Shuffle(LANES, CHUNK, 1))
    _, shard, index = plain.locate(np.arange(lane, SHARDS * SAMPLES, LANES))
    places = {}
    for place, chunk in enumerate(zip(shard.tolist(), (index // CHUNK).tolist(), strict=True)):
        places.setdefault(chunk, place)
    return places.__getitem__


if __name__ == "__main__":
    main()
