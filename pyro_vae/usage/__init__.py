"""What a fitted pair does with its latents, one concept per file."""
