"""What the documentation shows is what the code does."""

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_picture_of_the_order_is_of_this_order():
    drawn = subprocess.run(
        [sys.executable, DOCS / "order_picture.py"], capture_output=True, text=True, timeout=60, check=True
    )
    assert drawn.stdout == (DOCS / "order.svg").read_text()
