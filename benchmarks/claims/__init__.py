"""The claims of the LoRA paper (Hu et al., arXiv 2106.09685), each beside what this machine says.

One module per claim; each offers `claims() -> list[Claim]`. Parameter counts and file sizes are
exact and need no weights. Times are ratios within one run: the paper's are of GPUs.
"""
