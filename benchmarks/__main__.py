"""``python -m benchmarks`` runs every benchmark."""

from benchmarks import diagonal, hessian, laplacian, sparse

if __name__ == "__main__":
    hessian.main()
    laplacian.main()
    diagonal.main()
    sparse.main()
