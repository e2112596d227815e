"""One clip from a caller's arguments to frames and sound."""
