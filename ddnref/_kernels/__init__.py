"""One specification of each kernel, and each array library's own way to compute it."""
