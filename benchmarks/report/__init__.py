"""The HTML report: one self-contained file, made from the results alone.

`python -m benchmarks.report RESULT.json [OUT.html]` makes it again from a result file.
"""

from benchmarks.report.page import write_report

__all__ = ["write_report"]
