"""The sentences that the page, the markdown and the terminal share."""

from benchmarks import suites
from benchmarks.cases import OURS
from benchmarks.report import facts
from benchmarks.results import Results
from benchmarks.timing import digits

STATUS = {"wrong": "WRONG", "failed": "failed", "absent": "absent", "floor": "a part"}

HOW_TO_READ = (
    "**\u00d7 ours** is the median time divided by that of the first row of ours, among minimizers by "
    "that of the fastest of ours: above 1, ours is faster.",
    "**quartiles** are those of the same calls, taken in turns with the other rows. Rows are level if their medians "
    "lie within 5%, or one of these between the quartiles of the other. Who takes seconds may have had one call only.",
    "**temporary MiB** is what XLA sets aside beyond arguments and results; other libraries do not tell.",
    "**compile s** is tracing and compiling, or the first call of a library that compiles then; it is no part of the "
    "time.",
    "**of matmul rate** and **of bandwidth** are XLA's counts of FLOPs and of bytes accessed, per second, as a share "
    "of what this machine reached in a large matrix product and in `x + 1`. Bytes that come from cache count too, so a "
    "share may exceed 100%. Programs with loops have none: XLA counts the body of a loop once.",
    "**error** is the largest difference from the reference, relative to its largest entry.",
    "**WRONG**: the answer differs from the reference, and was not timed. **failed**: it raised. **absent**: not "
    "installed, or not for this device. **a part**: it does some of the work only, to show what that costs.",
)
BY_FASTEST = "By the fastest right answer of each library in each case; ours is the row that ratios are to."


def title(suite: str) -> str:
    """What a suite is called."""
    return getattr(suites.SUITES.get(suite), "TITLE", suite)


def question(suite: str) -> str:
    """What a suite asks."""
    return getattr(suites.SUITES.get(suite), "QUESTION", "")


def scope(results: Results) -> str:
    """Which run this is."""
    options = results.options
    dtype = options["dtype"]
    own = {suite: getattr(suites.SUITES.get(suite), "DTYPE", dtype) for suite in results.suites()}
    others = [f"{other} in {suite}" for suite, other in own.items() if other != dtype]
    dtype = f"{dtype} ({', '.join(others)})" if others else dtype
    parts = ["Quick run" if options["quick"] else "Full run", dtype, options["device"].upper()]
    if options["models"]:
        parts.append(f"models {', '.join(options['models'])}")
    cases = f"{len(results.outcomes)} cases"
    return ", ".join([*parts, cases if results.complete else f"{cases}, cut off before its end"])


def environment(results: Results) -> list[tuple[str, str]]:
    """The machine and the packages, as names and values."""
    here = results.environment
    packages = here["packages"]
    absent = [name for name, version in packages.items() if version is None]
    rates = [
        f"{digits(rate['flops_per_second'] / 1e9)} GFLOP/s, {digits(rate['bytes_per_second'] / 1e9)} GB/s ({dtype})"
        for dtype, rate in results.rates.items()
    ]
    rows = [
        ("Machine", f"{here['processor']}, {here['memory_gib']} GiB, {here['system']}"),
        ("Device", f"{here['device']} ({here['platform']})"),
        ("Threads", f"{here['threads']} for every library"),
        ("Measured rates", "; ".join(rates)),
        ("Commit", here["commit"]),
        ("Begun", results.started),
        ("Python", here["python"]),
        ("Packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version is not None)),
        ("Absent", ", ".join(absent)),
    ]
    return [(name, value) for name, value in rows if value]


def summary(results: Results) -> str:
    """The run in one sentence."""
    found = [outcome for outcome in results.outcomes.values() if facts.ours(outcome)]
    late = {entry.id for entry in facts.behind(results.outcomes)}
    wrong = sum(row.status == "wrong" for outcome in results.outcomes.values() for row in outcome.rows)
    if not found:
        return "No race of this run has a right answer of ours."
    twins = facts.twins(results.outcomes)
    lost = facts.lost(results.outcomes)
    without = f" Others have a right answer where ours has none: {', '.join(lost)}." if lost else ""
    noise = ""
    if twins:
        noise = (
            " Rows that are one and the same compiled program as ours differ from it by factors from "
            f"{digits(twins[0])} to {digits(twins[-1])}: finer than that the clock was not."
        )
    return (
        f"Ours is ahead of or level with every row of every other library in {len(found) - len(late)} of {len(found)} "
        f"races, and behind one in {len(late)}. {wrong or 'No'} answer{'s' * (wrong != 1)} "
        f"{'was' if wrong == 1 else 'were'} wrong.{without}{noise}"
    )


STANDINGS = [
    "cases", "mean, \u00d7 ours", "least", "most", "ours ahead", "level", "ours behind", "wrong", "failed", "absent",
]  # fmt: skip


def standings(results: Results) -> list[tuple[str, list[str]]]:
    """The cells of the table that ``STANDINGS`` heads, by library."""
    rows = []
    for one in facts.standings(results.outcomes):
        if one.peer == OURS:
            continue
        figures = (one.mean or 0.0, min(one.ratios), max(one.ratios)) if one.ratios else ()
        spread = [*map(digits, figures), "", "", ""][:3]
        counts = [one.ahead, one.level, one.behind, one.wrong, one.failed, one.absent]
        rows.append((one.peer, [str(len(one.ratios)), *spread, *(str(count or "") for count in counts)]))
    return rows


BEHIND = ["case", "who", "\u00d7 ours", "ms", "ours, ms", "note"]


def behind(results: Results) -> list[list[str]]:
    """The cells of the table that ``BEHIND`` heads."""
    return [
        [entry.id, entry.peer.name, digits(entry.peer.metrics["ratio"]), digits(1e3 * entry.peer.metrics["seconds"], 5),
         digits(1e3 * entry.ours.metrics["seconds"], 5), entry.note]
        for entry in facts.behind(results.outcomes)
    ]  # fmt: skip


NOT_BEHIND = "In no row: no right answer of another library came over 5% sooner, beyond the quartiles of ours."
