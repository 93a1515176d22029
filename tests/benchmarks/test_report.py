"""The report of a made-up run: everything is in it, in one file, and what differs from an earlier run is told."""

import base64
import copy
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from benchmarks import reading, report
from benchmarks.cases import Line, Outcome, Plot, Row
from benchmarks.report import facts, plots, tables
from benchmarks.report.compare import compare
from benchmarks.suites import SUITES
from benchmarks.timing import console
from tests.benchmarks import made_up

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, or an id given twice; collects the targets of links."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert attributes.get("src", "data:").startswith("data:"), tag
        assert "srcset" not in attributes, tag
        assert tag not in ("script", "link", "iframe")
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if "href" in attributes:
            self.links.append(attributes["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page and the summary of the made-up run."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "toy", made_up.SUITE)
        report.write(made_up.results(), folder, None, console())
    return (folder / "index.html").read_text(), (folder / "summary.md").read_text()


def test_the_page_stands_alone(written):
    page, _ = written
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert all(link.startswith("#") and link[1:] in parser.ids for link in parser.links)
    assert "#toy-trouble-mlp" in parser.links
    assert not re.search(r"https?://|@import|url\(", page)


def test_the_page_has_its_pictures_inside(written):
    page, _ = written
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 4  # three of the suite, and the roofline; the fourth of the suite has no point
    assert all(b"</svg>" in base64.b64decode(picture) for picture in pictures)
    assert "This run has no row to draw." in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_wide_tables_scroll_and_no_cell_is_cut(written):
    page, _ = written
    assert page.count("<table") == page.count('<div class="wide"><table')
    style = page[page.index("<style>") : page.index("</style>")]
    assert ".wide { overflow-x: auto; }" in style
    assert not re.search(r"overflow(-x|-y)?:\s*hidden|text-overflow|line-clamp|max-height", style)


def test_the_page_and_the_summary_begin_with_the_three_charts(tmp_path):
    run = made_up.results()
    hessians = {f"modes/hessian/mlp/n={n}/batch=256": made_up.race(n) for n in made_up.SIZES}
    for outcome in hessians.values():
        outcome.sizes["batch"] = 256
    norms = {f"per_example/norms/mlp/n=1/batch={n}": made_up.race(n) for n in made_up.SIZES}
    for outcome in norms.values():
        outcome.sizes = {"batch": outcome.sizes["n"]}
    solved = made_up.Outcome(rows=[made_up.row("curvature bfgs", "curvature", 1.0, 1.0, solved=True),
                                   made_up.row("SciPy BFGS", "scipy", 3.0, 3.0, solved=True)])  # fmt: skip
    run.outcomes = hessians | norms | {"optimizers/mgh/wood": solved}
    report.write(run, tmp_path, None, console())
    page, summary = (tmp_path / "index.html").read_text(), (tmp_path / "summary.md").read_text()
    charts = page[page.index('id="headlines"') : page.index('id="libraries"')]
    assert charts.count("data:image/svg+xml") == 3
    assert re.findall(r"\]\((\w+\.svg)\)", summary[: summary.index("## Against")]) == [
        "hessians.svg", "optimizers.svg", "per_example.svg",
    ]  # fmt: skip
    assert {file.name for file in tmp_path.glob("*.svg")} == {"hessians.svg", "optimizers.svg", "per_example.svg"}
    hessian = next(plot for plot in plots.headlines(run.outcomes) if plot.name == "hessians")
    torch = next(line for line in hessian.lines if line.label == "torch")
    assert torch.y == pytest.approx([3.1 * made_up.race(n).rows[0].metrics["seconds"] * 1e3 for n in made_up.SIZES])


def test_the_page_tells_everything(written):
    page, _ = written
    for text in ("A &lt;processor&gt;", "torch 2.13.0", "abc1234", "2026-01-02 03:04 UTC", "120 GFLOP/s, 15.0 GB/s"):
        assert text in page
    assert '<td class="text">Absent</td><td class="text note">folx</td>' in page
    assert "<strong>Is ours level with jax.hessian?</strong> jax.hessian takes 1.02 times as long." in page
    assert '<span class="badge">FAILS</span> half the memory of jax.hessian: 0.7' in page
    assert '<span class="badge">holds</span> costs under 3 gradients: 2.1' in page
    assert "agrees with the reference" not in page
    assert "<th>peak MiB</th>" in page


def test_rows_are_sorted_by_time_and_those_without_one_come_last(written):
    page, _ = written
    table = page[page.index("toy/trouble/mlp</p>") :]
    names = ["floor: the gradient", "jax, &lt;by hand&gt;", "autograd, within", "curvature.hessian", "torch, planted"]
    places = [table.index(name) for name in names]
    assert places == sorted(places)


def test_the_summary_is_markdown_with_ratios(written):
    _, summary = written
    assert "| Hessian, MLP, 1000 parameters | 5.01 | 1.02 | 3.10 | 9.50 | 40.0 |  |" in summary
    assert "| Hessian, in trouble | 2.00 | 0.500 | wrong | failed | 0.980 | absent |" in summary
    assert "- gives up a factor of two for symmetry: `toy/trouble/mlp` jax, &lt;by hand> 0.500." in summary
    assert "- `toy/trouble/mlp`: half the memory of jax.hessian: 0.7" in summary
    for table in re.findall(r"(?:^\|.*\n)+", summary, re.MULTILINE):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(bars)) == 1, table


def test_we_are_behind_only_beyond_noise():
    found = facts.behind(made_up.results().outcomes)
    assert [(entry.id, entry.peer.name) for entry in found] == [("toy/trouble/mlp", "jax, <by hand>")]
    assert found[0].note == "gives up a factor of two for symmetry"


def test_a_median_between_the_quartiles_of_the_other_is_level():
    ours, peer = made_up.troubled().rows[:2]
    peer.metrics["high"] = ours.metrics["low"]
    assert facts.standing(peer, ours) == "behind"  # quartiles may touch
    peer.metrics["high"] = ours.metrics["seconds"]
    assert facts.standing(peer, ours) == "level"


def test_one_call_has_no_quartiles():
    outcome = made_up.troubled()
    for row in outcome.rows[:2]:
        row.metrics["low"] = row.metrics["high"] = row.metrics["seconds"]
    outcome.rows[0].metrics["high"] *= 1.5
    table = tables.table(outcome)
    cells = {row.name: line[table.columns.index("quartiles, ms")] for row, line in table.lines}
    assert cells["jax, <by hand>"] == "one call"
    assert cells["curvature.hessian"] != "one call"


def test_a_suite_that_cannot_conclude_does_not_cost_the_report(only, tmp_path):
    only(made_up.SimpleNamespace(TITLE="Toy", QUESTION="", findings=lambda o: o["nothing"], plots=lambda o: 1 / 0))
    report.write(made_up.results(), tmp_path, None, console())
    page = (tmp_path / "index.html").read_text()
    assert "The findings of this suite could not be made: KeyError" in page
    assert "The plots of this suite could not be made: ZeroDivisionError" in page


def test_short_lines_name_what_is_wrong(capsys):
    for line in report.short_lines("toy/trouble/mlp", made_up.troubled()):
        console().print(line)
    said = capsys.readouterr().out
    assert "torch, planted  WRONG" in said
    assert "torch, planted: differs from the reference by 5.0e-01 of it" in said
    assert "FAILS  half the memory" in said


def slowed(results, factor, peer_factor, name="curvature.hessian"):
    """The run on a machine ``peer_factor`` times as slow, with one contestant slower by ``factor``."""
    new = copy.deepcopy(results)
    for outcome in new.outcomes.values():
        for row in outcome.rows:
            for key in {"seconds", "low", "high"} & set(row.metrics):
                row.metrics[key] *= factor if row.name == name else peer_factor
    return new


def test_a_slower_machine_is_no_change():
    old = made_up.results()
    found = compare(old, slowed(old, 1.7, 1.7))
    assert found.machine == pytest.approx(1.7)
    assert found.changes == []
    assert "Nothing changed by more than its quartiles." in found.lines()


def test_a_slower_contestant_is_found_on_a_slower_machine():
    old = made_up.results()
    new = slowed(old, 3.4, 1.7)
    found = compare(old, new)
    changes = [change for change in found.changes if change.name == "curvature.hessian"]
    assert {change.kind for change in changes} == {"slower"}
    assert [change.factor for change in changes] == pytest.approx([2.0] * 5)


def test_changes_within_the_quartiles_are_none():
    old = made_up.results()
    assert compare(old, slowed(old, 1.03, 1.0)).changes == []


def test_statuses_come_first_and_rows_come_and_go():
    old, new = made_up.results(), made_up.results()
    del old.outcomes["toy/cutest/all"], new.outcomes["toy/hessian/mlp/n=100"]
    old.outcomes["toy/trouble/mlp"].rows[3].status = "ok"
    new.outcomes["toy/trouble/mlp"].claims[1].holds = False
    del new.outcomes["toy/trouble/mlp"].rows[-1]
    found = compare(old, new)
    assert [(c.kind, c.id, c.name) for c in found.changes] == [
        ("status", "toy/trouble/mlp", "torch, planted"),
        ("claim", "toy/trouble/mlp", "costs under 3 gradients: 2.1"),
        ("gone", "toy/hessian/mlp/n=100", "the whole case"),
        ("gone", "toy/trouble/mlp", "floor: the gradient"),
        ("new", "toy/cutest/all", "the whole case"),
    ]


def test_machines_that_differ_are_named(only, tmp_path, capsys):
    only(made_up.SUITE)
    old = made_up.results()
    old.environment = old.environment | {"threads": 8, "packages": old.environment["packages"] | {"jax": "0.10.0"}}
    old.outcomes["toy/trouble/mlp"].rows[3].status = "ok"
    report.write(made_up.results(), tmp_path, old, console())
    for text in (capsys.readouterr().out, (tmp_path / "index.html").read_text(), (tmp_path / "summary.md").read_text()):
        assert "The machines differ: threads 8 \u2192 2." in text
        assert "Packages differ: jax 0.10.0 \u2192 0.10.2." in text
        assert "torch, planted" in text


def test_the_unchanged_peers_leave_out_those_of_another_version():
    old = made_up.results()
    old.environment["packages"] = old.environment["packages"] | {"jax": "0.10.0"}
    assert compare(old, made_up.results()).peers == 4 * 4 + 1


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.05, "0.05"), (3000, "3k"), (1e6, "1M"), (1e-7, "$10^{-7}$"), (2, "2")]
)
def test_ticks_are_readable(value, text):
    assert plots.tick(value) == text


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_picture_is_as_high_as_its_legend_needs():
    lines = [Line(f"jax, way {i} of a name too long for one line", [1.0, 2.0], [1.0, 1.0 + i]) for i in range(20)]
    figure = plots.draw(Plot("many", "Many", "n", "ms", lines))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert len(legend(figure)) == len(lines)
    assert (box.y0, box.x1) >= (0, 0)
    assert box.y1 <= figure.bbox.y1
    assert box.x1 <= figure.bbox.x1
    assert box.x0 >= figure.axes[0].get_window_extent().x1, "beside the lines, not over them"


def test_the_legend_is_in_the_order_of_the_ends():
    lines = [Line(f"jax, way {i}", [1.0, 2.0], [5.0, y]) for i, y in enumerate((2.0, 9.0, 4.0))]
    assert legend(plots.draw(Plot("ends", "Ends", "n", "ms", lines))) == ["jax, way 1", "jax, way 2", "jax, way 0"]


def test_lines_take_the_color_of_their_library_whatever_they_are_called():
    names = ("GradientTape, eager", "tape.jacobian, XLA")
    lines = [Line(name, [1.0, 2.0], [1.0, 2.0], library="tensorflow") for name in names]
    floor = Line("one gradient", [1.0, 2.0], [0.5, 1.0], "dashed", "jax")
    (axes,) = plots.draw(Plot("colors", "Colors", "n", "ms", [*lines, floor])).axes
    first, second, ideal = axes.get_lines()
    assert first.get_color() == second.get_color() != ideal.get_color()
    assert first.get_linestyle() != second.get_linestyle()


def test_few_sizes_are_the_ticks():
    (axes,) = plots.draw(
        Plot("devices", "Devices", "n", "ms", [Line("jax", [1, 2, 4, 4096], [1.0, 2.0, 3.0, 4.0])])
    ).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "4096"]


def test_a_line_with_gaps_is_drawn():
    line = Line("curvature.hvp", [1.0, 2.0, 3.0], [None, 1.0, float("nan")])
    assert plots.draw(Plot("gaps", "Gaps", "n", "ms", [line])) is not None


def test_the_same_picture_is_the_same_file():
    plot = made_up.plots(made_up.results().outcomes)[0]
    first, second = (plots.svg(plots.draw(plot), plot.name) for _ in range(2))
    assert first == second
    assert first.startswith(b"<?xml")


def test_a_suite_tells_why_it_is_behind_only_where_it_is(monkeypatch):
    reasons = [("toy/trouble", "jax", "a hand knows better"), ("toy/trouble", "autograd", "never told")]
    monkeypatch.setitem(reading.NOTES, "toy", {"reasons": reasons})
    monkeypatch.setitem(SUITES, "toy", made_up.SUITE)
    notes = [entry.note for entry in facts.behind(made_up.results().outcomes)]
    assert notes == ["a hand knows better; gives up a factor of two for symmetry"]


def test_the_terminal_shows_the_names_of_a_study_of_many_metrics():
    names = ("cold_seconds", "solved", "claims", "false", "steps", "evaluations", "excess")
    metrics = dict.fromkeys(names, 0.123456)
    rows = [Row("a solver of some length", "scipy", "ok", metrics={"seconds": 1.0, "low": 0.9, "high": 1.1} | metrics)]
    screen = Console(width=100, record=True, file=io.StringIO())
    for line in report.short_lines("optimizers/one", Outcome("One", "cutest", {}, rows)):
        screen.print(line)
    assert "a solver of some length" in screen.export_text()
