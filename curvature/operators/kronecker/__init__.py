"""The Kronecker-factored curvature operator (KFAC, EKFAC)."""
