"""A run that never ran, with rows of every kind: what the report has to cope with."""

from types import SimpleNamespace

from benchmarks.cases import Claim, Finding, Line, Outcome, Plot, Row
from benchmarks.results import Results

SIZES = (100, 300, 1000, 3000)
WAYS = (
    ("curvature.hessian", "curvature", 1.0), ("jax.hessian", "jax", 1.02), ("jax, reverse over reverse", "jax", 1.6),
    ("torch.func.hessian", "torch", 3.1), ("torch.autograd.functional.hessian, vectorized", "torch", 4.4),
    ("tensorflow, GradientTape twice", "tensorflow", 9.5), ("autograd.hessian", "autograd", 40.0),
)  # fmt: skip


def row(name: str, peer: str, ms: float, ratio: float, **more) -> Row:
    """A right row; the quartiles lie 2% around the median."""
    seconds = 1e-3 * ms
    metrics = {"ratio": ratio, "seconds": seconds, "low": 0.98 * seconds, "high": 1.02 * seconds}
    return Row(name, peer, metrics=metrics | more)


def race(n: int) -> Outcome:
    """A race at one size, with right rows of everyone."""
    ms = 0.1 * (n / 100) ** 1.7
    xla = {"compile_seconds": 0.4, "temporary_bytes": 8 * n**2, "flops": 4.0 * n**2, "bytes": 900.0 * n, "error": 3e-8}
    rows = [row(name, peer, ms * x, x, **(xla if peer in ("curvature", "jax") else {})) for name, peer, x in WAYS]
    return Outcome(f"Hessian, MLP, {n} parameters", "mlp", {"n": n}, rows)


def troubled() -> Outcome:
    """One of every trouble, and a peer that is ahead."""
    rows = [
        row("curvature.hessian", "curvature", 2.0, 1.0),
        row("jax, <by hand>", "jax", 1.0, 0.5, program="abc"),
        row("autograd, within the noise", "autograd", 1.96, 0.98),
        Row("torch, planted", "torch", "wrong", {"error": 0.5}, "differs from the reference by 5.0e-01 of it"),
        Row("tensorflow | tape", "tensorflow", "failed", {}, "ValueError: no gradient"),
        Row("folx", "folx", "absent", {}, "folx is not installed"),
        Row("floor: the gradient", "curvature", "floor", {"ratio": 0.2, "seconds": 4e-4, "low": 3e-4, "high": 5e-4}),
    ]
    rows[0].note = "gives up a factor of two for symmetry"
    claims = [
        Claim("curvature.hessian agrees with the reference", True, correctness=True),
        Claim("costs under 3 gradients: 2.1", True),
        Claim("half the memory of jax.hessian: 0.7", False),
    ]
    return Outcome("Hessian, in trouble", "mlp", {"n": 7}, rows, claims, caption="Nothing goes right.")


def study() -> Outcome:
    """Rows with metrics of their own."""
    rows = [
        Row("curvature.bfgs", "curvature", metrics={"solved": 96, "median_seconds": 0.012, "peak_bytes": 2**20}),
        Row("optimistix.BFGS", "optimistix", metrics={"solved": 81, "median_seconds": None, "gap": 1.5e-7, "ok": True}),
    ]
    return Outcome("CUTEst, 107 problems", "cutest", {}, rows)


def results() -> Results:
    """The run."""
    versions = {"curvature": "0.1.0", "jax": "0.10.2", "torch": "2.13.0", "tensorflow": "2.21.0", "autograd": "1.8"}
    environment = {
        "processor": "A <processor>", "device": "cpu", "platform": "cpu", "threads": 2, "memory_gib": 8,
        "system": "Linux 6", "python": "3.11.9", "packages": versions | {"folx": None}, "commit": "abc1234",
    }  # fmt: skip
    options = {"quick": True, "dtype": "float32", "device": "cpu", "models": [], "suites": ["toy"]}
    outcomes = {f"toy/hessian/mlp/n={n}": race(n) for n in SIZES}
    outcomes |= {"toy/trouble/mlp": troubled(), "toy/cutest/all": study()}
    rates = {"float32": {"flops_per_second": 1.2e11, "bytes_per_second": 1.5e10}}
    return Results(environment, options, rates, outcomes, True, "2026-01-02 03:04 UTC")


def plots(outcomes) -> list[Plot]:
    """A picture of every style, and one without a point."""
    races = {id: outcome for id, outcome in outcomes.items() if "/hessian/" in id}
    times = [
        Line(
            name,
            [o.sizes["n"] for o in races.values()],
            [1e3 * r.metrics["seconds"] for o in races.values() if (r := o.row(name))],
        )
        for name, _, _ in WAYS
    ]
    tau = [1.0, 1.4, 2.0, 4.0, 8.0, 16.0, 32.0]
    profiles = [
        Line("curvature trust-exact", tau, [0.62, 0.8, 0.9, 0.95, 0.97, 0.98, 0.98], "steps"),
        Line("curvature bfgs", tau, [0.35, 0.5, 0.66, 0.8, 0.88, 0.9, 0.9], "steps"),
        Line("optimistix BFGS", tau, [0.1, 0.2, 0.33, 0.5, 0.66, 0.7, 0.76], "steps"),
        Line("scipy trust-exact", tau, [0.2, 0.33, 0.5, 0.7, 0.86, 0.89, 0.91], "steps"),
        Line("jaxopt LBFGS", tau, [0.02, 0.1, 0.15, 0.3, 0.46, 0.55, 0.6], "steps"),
    ]
    steps = [float(i) for i in range(60)]
    curves = [
        Line("curvature, trust region", steps, [10 ** (-0.2 * i) for i in steps]),
        Line("optax.adam", steps, [10 ** (-0.04 * i) for i in steps]),
        Line("optax.lbfgs", steps, [10 ** (-0.09 * i) for i in steps]),
    ]
    return [
        Plot("time", "The Hessian grows as n to the 1.7", "parameters n", "time, ms", times, caption="Medians."),
        Plot("profile", "Dolan-Moré: who solves how many", "work, \u00d7 the best (log scale)",
             "share of problems solved", profiles, y_log=False),
        Plot("curves", "Training", "step", "excess loss", curves, x_log=False),
        Plot("empty", "Nothing ran", "x", "y", [Line("jax", [1.0], [0.0])]),
    ]  # fmt: skip


def findings(outcomes) -> list[Finding]:
    """A sentence made from a row."""
    outcome = outcomes.get("toy/hessian/mlp/n=1000")
    found = outcome and outcome.row("jax.hessian")
    answer = f"jax.hessian takes {found.metrics['ratio']:.2f} times as long." if found else "Not in this run."
    return [Finding("Is ours level with jax.hessian?", answer)]


SUITE = SimpleNamespace(TITLE="Toy & co", QUESTION="What if?", cases=lambda choice: [], plots=plots, findings=findings)
