"""Plans for tests of what is done with plans: of shards, and of a model that trains on them."""

from pathlib import Path

from tests.images import make_image_folder

SHARDS = """
[[stage]]
name = "shards"
kind = "shards"
set = { source = "images" }
"""


def training(name: str, kind: str = "supervised", head: str = "", data: str = 'train = "{shards}"') -> str:
    """Return a training stage; ``head`` are lines of its own table: ranks, init, a sweep."""
    return f"""
[[stage]]
name = "{name}"
kind = "{kind}"
{head}
[stage.set]
duration = "1 epoch"
global_batch = 48
data = {{ {data} }}
model = {{ name = "vit_ti8" }}
"""


def converting(source: str, name: str = "convert") -> str:
    """Return a stage that converts what another made."""
    return f"""
[[stage]]
name = "{name}"
kind = "convert"
set = {{ source = "{{{source}}}" }}
"""


def write_plan(folder: Path, text: str, name: str = "plan.toml") -> Path:
    """Write a plan, and the images of its shards beside it."""
    make_image_folder(folder / "images", per_class=2)
    (folder / name).write_text(text)
    return folder / name
