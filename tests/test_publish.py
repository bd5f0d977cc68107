"""The README's numbers are those of a committed result file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from PIL import Image

from benchmarks.pictures import PICTURES, take
from benchmarks.publish import BEGIN, END, FIGURE, README, ROOT, section
from benchmarks.record import Results


def test_the_readme_says_what_the_result_file_says() -> None:
    text = README.read_text()
    shown = re.search(f"{BEGIN}\n(.*)\n{END}", text, re.S)
    assert shown is not None
    name = re.search(r"\(benchmarks/results/([^)]+\.json)\)", shown[1])
    assert name is not None
    results = Results.load(ROOT / "benchmarks" / "results" / name[1])
    assert shown[1] == section(results, name[1])


def test_the_readmes_picture_is_there() -> None:
    assert "docs/tax.svg" in README.read_text() and FIGURE.read_text().startswith("<?xml")


def test_the_pictures_of_the_report_are_small_and_shown() -> None:
    shown = "".join(
        path.read_text() for path in (README, FIGURE.parent / "benchmarks.md") if path.exists()
    )
    for picture in PICTURES:
        assert picture.name in shown
        assert (FIGURE.parent / picture.name).stat().st_size < 150_000


def test_pictures_are_taken_in_a_browser_as_wide_as_their_screens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = tmp_path / "chromium"
    browser.write_text(
        f"#!{sys.executable}\n"
        "import re, sys\n"
        "from PIL import Image\n"
        "said = dict(a.split('=', 1) for a in sys.argv[1:] if '=' in a)\n"
        "page = open(sys.argv[-1].removeprefix('file://')).read()\n"
        f"open({str(tmp_path / 'log')!r}, 'a').write(said['--window-size'] + ' ' + page + '\\n')\n"
        "Image.new('RGB', (40, 30), (10, 200, 30)).save(said['--screenshot'])\n"
    )
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    report = tmp_path / "a & b.html"
    report.write_text("<p>")
    made = take(report, tmp_path)
    assert [path.name for path in made] == [picture.name for picture in PICTURES]
    with Image.open(made[0]) as image:
        assert image.size == (40, 30) and image.convert("RGB").getpixel((3, 3)) == (10, 200, 30)
    for line, picture in zip((tmp_path / "log").read_text().splitlines(), PICTURES, strict=True):
        count = len(picture.sections)
        width = count * (picture.width + 2) + 16 * (count - 1)
        assert line.startswith(f"{width},{picture.height + 2} ")
        assert line.count("<iframe") == count and f"width:{picture.width}px" in line
        assert all(f"a%20%26%20b.html#{section}" in line for section in picture.sections)

    browser.unlink()
    with pytest.raises(RuntimeError, match="no browser takes the pictures; looked for chromium"):
        take(report, tmp_path)
