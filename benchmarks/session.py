"""One run of the suites: choose the cases, run those that have no outcome yet, save after each, report."""

import argparse
import collections
import datetime
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine, report, results, runner
from benchmarks.cases import Case, Choice
from benchmarks.crashes import Journal
from benchmarks.results import Results
from benchmarks.suites import SUITES
from benchmarks.timing import console


def run(options: argparse.Namespace) -> int:
    """Everything that ``python -m benchmarks`` does, once the threads are set."""
    screen, file = console(), options.output / results.NAME
    old = load(options.compare) if options.compare else None  # before it may be written over
    if options.only_report:
        found = load(file)
    else:
        choice = Choice(options.quick, options.dtype, options.device, tuple(options.models), options.threads)
        chosen = list(cases(choice, options.suite))
        if options.list:
            for _, case in chosen:
                screen.print(f"{case.id:56} {case.title}", soft_wrap=True)
            return 0
        found, journal = begin(file, choice, options.suite, fresh=options.fresh), Journal(options.output)
        if options.fresh:
            journal.forget()
        try:
            go(screen, found, chosen, choice, file, journal)
        except KeyboardInterrupt:
            found.save(file)
            screen.print(
                f"Stopped. {len(found.outcomes)} of {len(chosen)} cases are in {file}: the same command does the rest, "
                "and with --only-report it makes the report of what is there.", soft_wrap=True,
            )  # fmt: skip
            return 130  # as of any program that is stopped from the keyboard
    report.write(found, options.output, old, screen)
    wrong = [text for outcome in found.outcomes.values() for text in outcome.wrong()]
    for text in wrong:
        screen.print(f"WRONG  {text}", style="bold red", soft_wrap=True)
    return 1 if wrong else 0


def load(file: Path) -> Results:
    """The results in a file that the command line names; ``SystemExit`` if it is not there, or of another format."""
    try:
        return results.load(file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"no results are read: {error}") from error


def cases(choice: Choice, wanted: list[str] | None) -> Iterator[tuple[str, Case]]:
    """The chosen cases with their suites; ``SystemExit`` if a name is unknown, or two cases share an id."""
    unknown = [name for name in wanted or [] if name not in SUITES]
    if unknown:
        raise SystemExit(f"there is no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    suites = {name: suite for name, suite in SUITES.items() if not wanted or name in wanted}
    found = [(name, c) for name, suite in suites.items() for c in suite.cases(choice) if choice.wants(c.model)]
    twice = [id for id, count in collections.Counter(case.id for _, case in found).items() if count > 1]
    if twice:
        raise SystemExit(f"two cases have the id {twice[0]}")
    if not found:
        raise SystemExit(f"no case is of {', '.join(choice.models)}; --list shows the cases")
    yield from found


def begin(file: Path, choice: Choice, suites: list[str] | None, *, fresh: bool) -> Results:
    """A new run, or the one in the file, if that was cut off and is the same."""
    options = {
        "quick": choice.quick, "dtype": choice.dtype, "device": choice.device, "models": list(choice.models),
        "suites": list(suites or SUITES),
    }  # fmt: skip
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    new = Results(machine.environment(choice.threads), options, started=now)
    if file.exists() and not fresh:
        old = results.load(file)
        if not old.complete and old.same_run(new):
            return old
    return new


def go(
    screen: Console, found: Results, chosen: list[tuple[str, Case]], choice: Choice, file: Path, journal: Journal
) -> None:
    todo = [(suite, case) for suite, case in chosen if case.id not in found.outcomes]
    done = len(chosen) - len(todo)
    if done:
        screen.print(f"{done} of {len(chosen)} cases are done already; --fresh begins anew.")
    columns = (TextColumn("{task.fields[suite]:12}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("", total=len(chosen), completed=done, suite="")
        for suite, case in todo:

            def say(line: str, title: str = case.title) -> None:
                progress.update(task, description=f"{title}: {line}"[:100])

            progress.update(task, suite=suite)
            say("starting")
            dtype = getattr(SUITES[suite], "DTYPE", choice.dtype)
            with jax.enable_x64(dtype == "float64"):
                if dtype not in found.rates:
                    say("measuring the machine")
                    found.rates[dtype] = machine.rates(dtype, choice.device)
                found.outcomes[case.id] = outcome = runner.run(case, say, journal)
            found.save(file)
            progress.advance(task)
            for line in report.short_lines(case.id, outcome):
                progress.console.print(line, soft_wrap=True)
            jax.clear_caches()
    found.complete = True
    found.save(file)
    journal.forget()


def alone(cases: Iterable[Case]) -> int:
    """Run cases by themselves in double precision and print them, for ``python -m benchmarks.digits`` and others.

    Returns:
        1 if an answer of ours was wrong, 0 otherwise.
    """
    screen, wrong = console(), 0
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; float64.\n")
    with jax.enable_x64(True):
        for case in cases:
            with screen.status(case.title) as status:
                outcome = runner.run(case, lambda line, title=case.title: status.update(f"{title}: {line}"))
            for line in report.short_lines(case.id, outcome, brief=False):
                screen.print(line, soft_wrap=True)
            wrong += len(outcome.wrong())
    return int(wrong > 0)
