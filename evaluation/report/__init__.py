"""The report: one HTML file of what a run forgot and what not; it fetches nothing.

runs.py reads results folders, summary.py says what they mean, pictures.py brings test images,
charts.py draws, page.py writes the file. macros.html shows one class in full.
"""

from evaluation.report.page import write_report
from evaluation.report.runs import read_runs
from evaluation.results import REPORT

__all__ = ["REPORT", "read_runs", "write_report"]
