"""What is computed (MODEL.md), in plain PyTorch, and the published files that it is read from."""
