"""``python -m benchmarks`` runs every benchmark."""

from benchmarks import hessian

if __name__ == "__main__":
    hessian.main()
