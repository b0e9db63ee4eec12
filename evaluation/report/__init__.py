"""The report: one HTML file, with nothing fetched from anywhere, of what a run forgot and what not.

runs.py reads results folders, summary.py puts them into words, classes.py finds the test images,
charts.py draws, page.py writes the file. One class in full stands in macros.html.
"""

from evaluation.report.page import check_report, write_report
from evaluation.report.runs import read_runs
from evaluation.results import REPORT

__all__ = ["REPORT", "check_report", "read_runs", "write_report"]
