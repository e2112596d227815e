"""The shell command `magihuman-fast`."""
