"""What was found out with this repository: every table and figure of docs/, by one command.

    python -m experiments NAME ...

Each name of `experiments.__main__` is a module with a `main`. What is timed stands in benchmarks/.
"""
