"""The example of online DPO: both runs in short, and the table and the picture at their end."""

import re
import subprocess
import sys
from pathlib import Path

import online
import pytest
from support import show


def test_the_table_has_a_row_for_each_run():
    looks = {"kl": 1.0, "kl_error": 0.5, "gold": -2.0, "gold_error": 0.25}
    lines = show.beside({"online": looks, "offline": looks}).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["online", "offline"]
    assert re.split(" {2,}", lines[2])[1:] == ["1.00 ± 0.98", "-2.00 ± 0.49"]


@pytest.mark.parametrize("flag", ["--rounds=0", "--output=none/x.png"])
def test_a_wrong_option_is_told_before_the_work(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        online.main([flag])
    assert "must be" in capsys.readouterr().err


@pytest.mark.slow  # compiling takes most of the time
def test_a_short_run_goes_further_online(tmp_path):
    picture = tmp_path / "picture.png"
    flags = ["--rounds", "80", "--fit-steps", "60", "--output", str(picture)]
    command = [sys.executable, str(Path(online.__file__)), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"line  1/80  loss 0\.693", done.stdout)) == 2
    rows = re.findall(r"^(\w+) +(\S+) ± \S+ +(\S+) ± (\S+)$", done.stdout, re.M)
    (kl, gold, _), *runs = [tuple(map(float, row[1:])) for row in rows]
    assert [row[0] for row in rows] == ["reference", "offline", "online"]
    assert kl == 0
    offline, online_run = runs
    assert online_run[1] - online_run[2] > gold
    assert online_run[1] > offline[1]
    assert picture.read_bytes().startswith(b"\x89PNG")
