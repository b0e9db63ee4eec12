"""The paper's studies on feature bundles: what each choice does, by descent and exactly.

    python -m evaluation.study NAME --features DIR

One file a concern: `constants` (what the configs say), `world` (a data set and what may be
retained), `solvers`, `studies` (the table of what is varied), `spectrum`, `measure` (what a row
says), `table` (rows that are never made twice), `plots`.
"""
