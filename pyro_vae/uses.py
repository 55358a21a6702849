"""Words that the command line offers, and that must not cost an import of torch."""

SCORES = ("log_prob", "typicality", "ratio", "complexity", "elbo", "kl", "reconstruction")
SIDES = ("one", "two")  # of a p-value
HOW = ("resampling", "mcmc")  # draws of the latents come about, to restore an image
WAYS = ("spherical", "linear")  # from one code to another
