"""Which mode: gradients, Jacobians, Hessian products and Hessians by every composition, in every library."""

from collections.abc import Iterator

from benchmarks import reading
from benchmarks.cases import OURS, Case, Choice, Finding, Plot
from benchmarks.suites.modes import derivatives, jacobians, networks, regret

TITLE = "Modes"
QUESTION = "Forward or reverse, and in which order; and by which library?"
REASONS = {
    ("modes/products/convolutional", "GradientTape"): (
        "jax.linearize takes as long: XLA as TensorFlow ships it makes faster code of these small convolutions"
    ),
    ("modes/hvp/while-loop", "jax, forward over forward"): (
        "the same tangents through the same loop, traced in another order, of which XLA makes a loop a tenth slower"
    ),
}


def cases(choice: Choice) -> Iterator[Case]:
    """Jacobians by shape, the models' derivatives by size, what forbids a mode, and what we promise."""
    for module in (jacobians, derivatives, regret, networks):
        yield from module.cases(choice)


def plots(outcomes: reading.Outcomes) -> list[Plot]:
    """The crossover first, then growth."""
    return [*jacobians.plots(outcomes), *derivatives.plots(outcomes)]


def findings(outcomes: reading.Outcomes) -> list[Finding]:
    """Modes, then libraries."""
    found = [finding for module in (jacobians, derivatives, regret, networks) for finding in module.findings(outcomes)]
    return [*found, *libraries(outcomes)]


def libraries(outcomes: reading.Outcomes) -> Iterator[Finding]:
    """The fastest way of each library against ours, derivative by derivative."""
    for derivative, word in derivatives.WORDS.items():
        races = reading.part(outcomes, f"modes/{derivative}/")
        sentences = []
        for peer in reading.peers(races):
            ratios = []
            for race in races.values():
                ours, theirs = reading.fastest(race, OURS), reading.fastest(race, peer)
                if ours is not None and theirs is not None:
                    ratios.append(theirs.metrics["seconds"] / ours.metrics["seconds"])
            sentences.append(f"{peer} {reading.spread(ratios)}")
        if sentences:
            answer = f"The fastest of each library against the fastest of ours takes: {'; '.join(sentences)}."
            yield Finding(f"{word}: which library?", answer, list(races))
