"""`python -m pyro_vae` is the command line."""

from pyro_vae.cli import main

main()
