"""The report: one HTML file of what a run forgot and what not; it fetches nothing."""
