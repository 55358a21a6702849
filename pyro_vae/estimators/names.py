"""The words by which the command line and a run directory name estimators and proposals; costs no import."""

ESTIMATORS = ("exact", "is", "is-jackknife", "multilevel", "ais", "smc", "router", "raise")
PROPOSALS = ("guide", "overdispersed", "defensive", "refined")
PRECISIONS = ("float32", "tf32", "float16", "float64")
