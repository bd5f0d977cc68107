"""The documentation's pictures of a report, taken in Chromium: one of a desk, one of three phones.

`python -m benchmarks.pictures RESULT.json` takes them of the report of that result file.
"""

from __future__ import annotations

import argparse
import html
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.goals import goal_rows
from benchmarks.record import load_or_exit
from benchmarks.report import write_report

DOCS = Path(__file__).parent.parent / "docs"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_COLORS = 256
_GAP = 16


@dataclass(frozen=True)
class Picture:
    """Screens side by side, each `width` wide, each beginning at one section of the report."""

    name: str
    width: int
    height: int
    sections: tuple[str, ...]


PICTURES = (
    Picture("report-desktop.png", 1120, 1240, ("",)),
    Picture("report-phones.png", 360, 780, ("", "roofline", "modelled")),
)


def take(report: Path, folder: Path) -> list[Path]:
    """Write every picture of a report into a folder; RuntimeError if there is no browser."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise RuntimeError(f"no browser takes the pictures; looked for {', '.join(_BROWSERS)}")
    whole = report.resolve()
    return [_take(browser, whole, picture, folder / picture.name) for picture in PICTURES]


def frames(report: Path, picture: Picture) -> str:
    """A page of frames as wide as the screens: no browser's window is as narrow as a phone."""
    style = f"width:{picture.width}px;height:{picture.height}px;border:1px solid #c9d0d6"
    inner = "".join(
        f'<iframe scrolling="no" src="{html.escape(report.as_uri())}#{section}" style="{style}">'
        "</iframe>"
        for section in picture.sections
    )
    return f'<body style="margin:0;display:flex;gap:{_GAP}px;background:#fff">{inner}</body>'


def _take(browser: str, report: Path, picture: Picture, out: Path) -> Path:
    count = len(picture.sections)
    width = count * (picture.width + 2) + (count - 1) * _GAP
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder) / "frames.html", Path(folder) / "shot.png"
        page.write_text(frames(report, picture))
        subprocess.run(
            [
                browser, *_FLAGS, f"--user-data-dir={folder}/profile", f"--screenshot={shot}",
                f"--window-size={width},{picture.height + 2}", page.as_uri(),
            ],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        with Image.open(shot) as image:
            few = image.convert("RGB").quantize(
                _COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
            )
            few.save(out, optimize=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("result", type=Path, help="a file of benchmarks/results")
    results = load_or_exit(parser.parse_args().result, parser.prog)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        write_report(results, goal_rows(results), report)
        for picture in take(report, DOCS):
            print(picture)


if __name__ == "__main__":
    main()
