"""The Hessian of a network's loss as a linear-quadratic control problem over its layers: solve, count, factor."""
