"""What comes from outside, checked or kept apart: numbers, file names, downloads, work that may crash."""
