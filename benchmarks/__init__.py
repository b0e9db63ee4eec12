"""What is timed: `python -m benchmarks NAME ...`. What was found out stands in experiments/."""
