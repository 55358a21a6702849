"""Missing and noisy pixels restored by the posterior: `restore.py`, on one file for each way to it."""
