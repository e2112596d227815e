"""Folders in the published layout: loaded, checked, and written with random weights."""
