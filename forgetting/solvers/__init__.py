"""Solvers of the paper's objective and of complete forgetting, and proofs of their answers.

spectrum      the retained texts factorised once; roots of scalar functions
exact         the optimum of the paper's objective, of one request or of many at once
lora          the paper's own descent on LoRA factors, and its retry
constrained   complete forgetting: exactly onto the target, at the least disturbance
certificate   lower bounds of both objectives, which share nothing with the solvers
"""
