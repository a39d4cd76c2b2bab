"""The picture of the benchmarks shows what their table says."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import charts


def test_the_picture_is_of_the_table_as_it_is():
    rows = charts.table(charts.README.read_text(encoding="utf-8"))
    with Image.open(charts.PICTURE) as picture:
        assert picture.text[charts.SOURCE] == charts.digest(rows), "the table changed: python bench/charts.py"


def test_each_panel_has_a_peer_beside_ours():
    rows = charts.table(charts.README.read_text(encoding="utf-8"))
    for title, bars in charts.PANELS.items():
        for row in bars.values():
            assert len(charts.values(rows, *row)) >= 2, (title, row)


def test_numbers_are_read_as_they_stand():
    rows = charts.table(
        "| command | what | ours | peer | |\n|---|---|---|---|---|\n"
        "| `bench/a.py` | steps of b, s | 1,646.5 (1–2); 6 % | timm 5.20 (1.2–5.8), 8 MB; DALI 2.4: 730 | 2 × |\n"
        "| | | | `dd` and fsync: 3.6 (2–5) | |\n| | other | 7 | | |\n"
    )
    assert charts.values(rows, "a.py", "steps") == {
        "Patchmill": (1646.5, 1.0, 2.0), "timm": (5.2, 1.2, 5.8), "DALI": (730.0, 730.0, 730.0), "dd": (3.6, 2.0, 5.0)
    }  # fmt: skip
    with pytest.raises(ValueError, match="unpack"):
        charts.values(rows, "b.py", "steps")


def test_drawing_takes_no_display(tmp_path):
    (tmp_path / "bench").mkdir()
    for name in ("charts.py", "README.md"):
        (tmp_path / "bench" / name).write_bytes((charts.HERE / name).read_bytes())
    subprocess.run([sys.executable, tmp_path / "bench/charts.py"], check=True, timeout=120, env={"MPLBACKEND": ""})
    with Image.open(tmp_path / "bench/charts.png") as picture:
        assert picture.size[0] > 1000
