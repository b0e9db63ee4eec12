"""The report: one HTML file, with nothing fetched from anywhere, of what a run forgot and what not.

runs.py reads results folders, summary.py puts them into words, scatter.py places the points of the
one chart that needs no script, page.py writes the file. What a browser does with it (sorting, one
class's details on demand) stands in the three .js files.
"""

from evaluation.report.page import REPORT, render, write_report
from evaluation.report.runs import read_runs

__all__ = ["REPORT", "read_runs", "render", "write_report"]
