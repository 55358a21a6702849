"""Estimators of held-out log p(x), one file each; `result.py` is what they all give back."""
