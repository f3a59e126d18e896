"""The generalised Gauss–Newton matrix of a network through its Gram matrix, which is small where the matrix is not."""
