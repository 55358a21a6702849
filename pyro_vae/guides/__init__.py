"""Amortised posteriors, one family per file."""
