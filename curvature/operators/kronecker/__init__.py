"""``KroneckerOperator``: Kronecker-factored curvature (KFAC, EKFAC)."""
