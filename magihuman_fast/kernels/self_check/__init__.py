"""Every kernel held to PyTorch on the user's own GPU, before its first use."""
