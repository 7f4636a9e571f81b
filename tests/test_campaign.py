"""The fast part of tests/campaign.py: a few trials of every kind, and whether it notices what is lost."""

import re
import sys

import pytest
from conftest import run

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads /proc")
pytestmark = [pytest.mark.slow, ON_LINUX]

SABOTAGE = """
import contextlib, runpy, sys
sys.path[:0] = [".", "tests"]
import danube3, campaign

@contextlib.contextmanager
def in_place(folder):  # as atomic_folder, but under its last name from the beginning
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    danube3.write_checksums(folder)

world = campaign.World.__init__
def broken(self, *args):
    world(self, *args)
    danube3.atomic_folder = in_place
campaign.World.__init__ = broken
campaign.ALL["kills"] = (lambda world, count: campaign.kills(world, 4, ["quantize"]), 1, 1)
sys.argv = ["campaign.py", "kills"]
sys.exit(campaign.main())
"""


def rows_of(stdout):
    """The table: {what was tried: (times, lost)}"""
    found = re.findall(r"^\| \w+ \| (.+) \| ([\d,]+) \| [\d,]+ \| (\w+) \|$", stdout, re.MULTILINE)
    return {what: (int(times.replace(",", "")), lost) for what, times, lost in found}


def test_nothing_is_lost(tmp_path):
    """One subprocess for all sections: it loads torch once and forks a child for every trial."""
    result = run("tests/campaign.py", "--quick", "--out", tmp_path / "table.md", env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr[-2_000:]
    rows = rows_of(result.stdout)
    assert len(rows) > 20 and all(lost == "nothing" for _, lost in rows.values())
    tried = [what for what, (times, _) in rows.items() if times]
    for words in ("toy training", "prepare.py", "quantize.py", "hostile pickle", "the disk full|a file too large",
                  "two at once", "out of memory", "nan among the weights", "any header", "memory"):
        assert any(re.search(words, what) for what in tried), words
    assert (tmp_path / "table.md").read_text().strip() in result.stdout


def test_it_notices(tmp_path):
    """With checkpoints written in place the kills find folders that look whole and are not."""
    result = run("-c", SABOTAGE, env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 1 and "LOST  kills, quantize.py" in result.stdout, result.stdout + result.stderr
