"""Solvers of the paper's objective and of complete forgetting, and proofs of their answers."""
