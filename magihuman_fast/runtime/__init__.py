"""The model on the kernels: captured graphs, the pool of sizes, and the memory that they need."""
