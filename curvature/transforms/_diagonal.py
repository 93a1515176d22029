"""The exact diagonal of a Hessian, without the matrix."""
