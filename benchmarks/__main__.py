"""``python -m benchmarks`` runs every benchmark."""

from benchmarks import (
    against_curvlinops,
    batched,
    diagonal,
    digits,
    hessian,
    laplacian,
    mean_hessian,
    modes,
    operators,
    per_example,
    sparse,
)

if __name__ == "__main__":
    hessian.main()
    modes.main()
    laplacian.main()
    diagonal.main()
    sparse.main()
    mean_hessian.main()
    per_example.main()
    operators.main()
    against_curvlinops.main()
    batched.main()
    digits.main()
