"""The report: one HTML file of what a run forgot and what not; it fetches nothing."""

from evaluation.report.page import write_report
from evaluation.report.runs import read_methods
from evaluation.results import REPORT

__all__ = ["REPORT", "read_methods", "write_report"]
