"""The ``python`` blocks of each tutorial run from top to bottom; ``py`` blocks need a model and are not run."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs/tutorials").glob("*.md"))
RUN = [page for page in PAGES if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_code_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
