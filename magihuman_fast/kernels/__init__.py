"""The compiled operations as Python functions: `ops` is the front, everything behind it checks or launches."""
