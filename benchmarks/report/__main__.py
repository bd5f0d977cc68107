"""`python -m benchmarks.report RESULT.json [OUT.html]`: the report of a result file."""

import argparse
from pathlib import Path

from benchmarks.goals import goal_rows
from benchmarks.record import load_or_exit
from benchmarks.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("html", type=Path, nargs="?", help="default: beside the result file")
    args = parser.parse_args()
    results = load_or_exit(args.result, parser.prog)
    path = args.html or args.result.with_suffix(".html")
    write_report(results, goal_rows(results), path)
    print(path)


if __name__ == "__main__":
    main()
