"""Which mode: gradients, Jacobians, Hessian products and Hessians by every composition, in every library."""

from collections.abc import Iterator

from benchmarks import reading
from benchmarks.cases import OURS, Case, Choice, Finding, Plot, Row
from benchmarks.suites.modes import derivatives, jacobians, networks, regret
from benchmarks.timing import digits

TITLE = "Modes"
QUESTION = "Forward or reverse, and in which order; and by which library?"
REASONS = {
    ("modes/products/convolutional", "GradientTape"): (
        "jax.linearize takes as long: XLA as TensorFlow ships it makes faster code of these small convolutions"
    ),
}
LEVEL = 0.95  # of our time: a peer below that is ahead of us


def cases(choice: Choice) -> Iterator[Case]:
    """Jacobians by shape, the models' derivatives by size, what forbids a mode, and what we promise."""
    for module in (jacobians, derivatives, regret, networks):
        yield from module.cases(choice)


def plots(outcomes: reading.Outcomes) -> list[Plot]:
    """The crossover first, then growth."""
    return [*jacobians.plots(outcomes), *derivatives.plots(outcomes)]


def findings(outcomes: reading.Outcomes) -> list[Finding]:
    """Modes, then libraries, then where we are behind."""
    found = [finding for module in (jacobians, derivatives, regret, networks) for finding in module.findings(outcomes)]
    return [*found, *libraries(outcomes), behind(outcomes)]


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


def behind(outcomes: reading.Outcomes) -> Finding:
    """The races in which a peer's program, that is not ours as well, beats ours as it comes."""
    lines = []
    for id, race in outcomes.items():
        ours = next((row for row in race.rows if row.peer == OURS and row.status == "ok"), None)
        for peer in reading.peers({id: race}):
            best = reading.fastest(race, peer)
            ratio = None if ours is None or best is None else _ratio_of_low(best, ours)
            if best is not None and ratio is not None and ratio < LEVEL:
                lines.append((id, f"{best.name} takes {digits(ratio)} of our time in {id}"))
    answer = f"{'; '.join(line for _, line in lines)}." if lines else "Nowhere in this run."
    return Finding("Where is a peer ahead of curvature as it comes?", answer, [id for id, _ in lines])


def _ratio_of_low(theirs: Row, ours: Row) -> float | None:
    """Of lower quartiles, since other work on the machine only ever adds; None for one and the same program."""
    low, our_low = (reading.number(row, "low") for row in (theirs, ours))
    return None if ours.shares_program_with(theirs) or low is None or not our_low else low / our_low
