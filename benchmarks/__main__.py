"""``python -m benchmarks`` runs every benchmark."""

from benchmarks import (
    against_curvlinops,
    diagonal,
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
