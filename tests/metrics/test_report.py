"""Comparison of systems, the HTML report and the metric table in Markdown and on the console."""

import json
import re
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
import rich.console

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import write_json
from sidtune.metrics.ranking import Relevance, evaluate_ranking
from sidtune.metrics.report.curves import stage_curves
from sidtune.metrics.report.data import PanelCurves, ReportData, SampleItem, SampleRequest
from sidtune.metrics.report.html import console_table, format_value, markdown_table, write_report
from sidtune.metrics.report.plots import MAX_POINTS, metric_plot, short, thinned
from sidtune.metrics.statistics.bootstrap import bootstrap_interval, holm, paired_bootstrap
from sidtune.metrics.statistics.compare import Estimate, SystemRow, compare_systems
from sidtune.metrics.statistics.slices import SliceRow

EVIL = "<script>alert('x')</script> & \"q\" $\\frac{a}$ {{ 7 * 7 }} \ud800"
USERS = [f"u{n % 60}" for n in range(300)]


def systems(names_and_skill: dict[str, float], seed: int = 0) -> dict:
    """Rankings of 300 requests that place the target on rank 2 with the given probability."""
    rng = np.random.default_rng(seed)
    relevance = Relevance.from_lists([[0]] * 300)
    found = {}
    for name, skill in names_and_skill.items():
        rows = np.tile([1, 2, 3], (300, 1))
        rows[rng.random(300) < skill, 1] = 0
        found[name] = evaluate_ranking(rows, relevance, ks=[1, 3], metrics=["hr", "mrr"])
    return found


def test_compare_systems_equals_the_single_tests():
    results = systems({"ours": 0.6, "same": 0.42, "bad": 0.1, "popularity": 0.2, "bm25": 0.4, "oracle": 0.9})
    rows = compare_systems(results, baselines=["popularity", "bm25"], bounds=["oracle"], clusters=USERS, seed=3)
    assert [(row.name, row.kind) for row in rows] == [
        ("ours", "model"),
        ("same", "model"),
        ("bad", "model"),
        ("popularity", "baseline"),
        ("bm25", "baseline"),
        ("oracle", "bound"),
    ]
    table = {row.name: row.metrics for row in rows}
    raw = []
    for name in ("ours", "same", "bad"):
        for metric in ("hr@1", "hr@3", "mrr@1", "mrr@3"):
            best = max(("popularity", "bm25"), key=lambda one: results[one].means()[metric])
            pair = paired_bootstrap(results[name].values(metric), results[best].values(metric), seed=3, clusters=USERS)
            raw.append(pair.p_value)
            assert table[name][metric].versus == best
            assert table[name][metric].difference_low == pair.low
    got = [table[n][m].p_value for n in ("ours", "same", "bad") for m in ("hr@1", "hr@3", "mrr@1", "mrr@3")]
    assert got == holm(raw)
    interval = bootstrap_interval(results["bm25"].values("hr@3"), seed=3, clusters=USERS)
    assert (table["bm25"]["hr@3"].low, table["bm25"]["hr@3"].value) == (interval.low, interval.mean)
    assert [table[name]["hr@3"].mark for name in table] == ["better", "", "worse", "", "", ""]
    assert table["oracle"]["hr@3"].p_value is None and table["bm25"]["hr@3"].p_value is None


def test_compare_systems_leaves_out_excluded_requests_and_refuses_different_ones():
    relevance = Relevance.from_lists([[0], [], [0], [0]])
    rows = np.array([[0], [0], [1], [0]])
    one = evaluate_ranking(rows, relevance, ks=[1], metrics=["hr"], empty="exclude")
    table = compare_systems({"a": one}, clusters=["u", "v", "w", "x"])
    assert table[0].metrics["hr@1"].value == pytest.approx(2 / 3)
    other = evaluate_ranking(rows, Relevance.from_lists([[0], [0], [0], [0]]), ks=[1], metrics=["hr"])
    with pytest.raises(DataError, match="'b' was scored on other requests"):
        compare_systems({"a": one, "b": other})
    with pytest.raises(ConfigError, match="did you mean 'bm25'"):
        compare_systems({"bm25": one}, baselines=["bm52"])
    with pytest.raises(DataError, match="no system"):
        compare_systems({})
    with pytest.raises(DataError, match="4 requests but 1 cluster labels"):
        compare_systems({"a": one}, clusters=["u"])


def test_rows_survive_json(tmp_path):
    rows = compare_systems(systems({"ours": 0.6, "bm25": 0.4}), baselines=["bm25"])
    write_json(tmp_path / "metrics.json", [row.to_dict() for row in rows])
    assert [SystemRow.from_dict(one) for one in json.loads((tmp_path / "metrics.json").read_text())] == rows


class Page(HTMLParser):
    """Collects tags, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.open, self.unclosed = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unclosed.append(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def full_report() -> ReportData:
    rows = compare_systems(systems({EVIL: 0.6, "bm25": 0.4, "oracle": 0.9}), baselines=["bm25"], bounds=["oracle"])
    slices = [SliceRow("all", 300, 1.0, 0.5, 0.4, 0.6), SliceRow(f"query/{EVIL}", 1, 0.1, 0.2, None, None)]
    slices.append(SliceRow("empty", 0, 0.0, None, None, None))
    level = {"name": "a", "size": 4, "used": 3, "utilisation": 0.75, "entropy_bits": 1.5, "normalized_entropy": 0.75}
    return ReportData(
        title=EVIL,
        summary=EVIL,
        command=f"run {EVIL}",
        created="2025-01-01",
        facts={"items": 12345, EVIL: EVIL},
        versions={"torch": EVIL},
        warnings=[EVIL],
        systems=rows,
        primary="mrr@3",
        evaluation_notes=[EVIL],
        slices={EVIL: slices, "bm25": slices},
        slice_metric="mrr@3",
        sid_quality={"items": 9, "icr": 0.5, "mse": None, "levels": [level], "warnings": [EVIL]},
        curves=[
            PanelCurves(
                EVIL,
                {EVIL: {EVIL: [(n, 1 / (n + 1)) for n in range(5000)], "b": [(0, 1.0)]}, "rate": {"c": [(9, 0.0)]}},
            )
        ],
        samples=[
            SampleRequest(
                EVIL,
                [SampleItem(EVIL, "<a_1><b_2>", True, -1.5), SampleItem("", "", False, None, EVIL)],
                [(EVIL, EVIL)],
                [EVIL],
                [EVIL],
                EVIL,
            ),
            SampleRequest(None, []),
        ],
        stages=[{"name": EVIL, "tasks": ["a", EVIL], "steps": 10}, {"name": "two", "loss": 0.5}],
        config={EVIL: {"key": EVIL, "list": [1, None]}},
    )


def test_report_escapes_everything_and_asks_for_nothing(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", full_report())
    text = path.read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and not page.unclosed and not page.open
    assert page.text.count("<script>alert('x')</script> & \"q\" $\\frac{a}$ {{ 7 * 7 }}") >= 25
    assert "<script>alert" not in text and "{{ 49 }}" not in text
    loading = [
        (n, v)
        for n, v in page.attributes
        if n in ("src", "href", "action", "data", "srcset", "xlink:href") and not v.startswith("#")
    ]
    assert not loading and not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert page.tags.count("svg") == 4 and len(text) < 400_000
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_report_shows_what_it_was_given(tmp_path):
    text = write_report(tmp_path / "r.html", full_report()).read_text("utf-8")
    page = Page(text)
    words = " ".join(page.text.split())
    for part in (
        "12,345",
        "▲",
        "(bound)",
        "50.0%",
        "75.0%",
        "<a_1><b_2>",
        "log p -1.50",
        "relevant",
        "recommendation, no query",
        "mrr@3",
    ):
        assert part in words, part
    assert "adjusted p = 0.004" in text
    # matplotlib's markers were replaced, so the plots follow light and dark mode.
    assert "#1a1b" not in text and "var(--series-1)" in text and "prefers-color-scheme: dark" in text


def test_report_is_the_same_twice(tmp_path):
    one, two = (write_report(tmp_path / f"{n}.html", full_report()).read_bytes() for n in (1, 2))
    assert one == two


def test_empty_report_says_what_is_missing(tmp_path):
    page = Page(write_report(tmp_path / "r.html", ReportData("Nothing")).read_text("utf-8"))
    assert "svg" not in page.tags and "table" not in page.tags and not page.unclosed
    for sentence in (
        "no counts of the data",
        "No evaluation belongs",
        "No slices belong",
        "No quality report",
        "No training stage belongs",
        "No sample requests belong",
        "No configuration belongs",
    ):
        assert sentence in page.text
    stages_only = Page(write_report(tmp_path / "s.html", ReportData("x", stages=[{"name": "a"}])).read_text("utf-8"))
    assert "No training curve was logged" in stages_only.text


def test_plots_take_any_name():
    name = "a\ud800\x00\n$x_1$ <b>手机"
    svg = metric_plot([SystemRow(name, "model", {"m": Estimate(0.5, 0.4, 0.6)})], "m", 0.95)
    assert "$x_1$ &lt;b&gt;手机" in svg and not Page(svg).unclosed
    assert short("x" * 50) == "x" * 41 + "…"


def test_slices_must_agree(tmp_path):
    one, two = [SliceRow("a", 1, 1.0, 0.5, None, None)], [SliceRow("b", 1, 1.0, 0.5, None, None)]
    with pytest.raises(DataError, match="different slices"):
        write_report(tmp_path / "r.html", ReportData("x", slices={"s": one, "t": two}))
    assert not list(tmp_path.iterdir())


def test_curves_from_a_trainer_log_and_thinning(tmp_path):
    (tmp_path / "one").mkdir()
    log = [
        {"loss": 2.0, "learning_rate": 0.1, "step": 10},
        {"eval_loss": 1.5, "step": 10},
        {"loss": None, "step": 20},
        {"train_runtime": 3.0, "step": 20},
    ]
    write_json(tmp_path / "one" / "log_history.json", log)
    (curve,) = stage_curves(tmp_path, [{"name": "one"}, {"name": "never logged"}])
    losses, rates = curve.panels["loss"], curve.panels["learning rate"]
    assert losses["training"][0] == (10.0, 2.0) and losses["held-out"] == [(10.0, 1.5)]
    assert rates == {"rate": [(10.0, 0.1)]} and curve.name == "one"
    points = [(float(n), float(n % 7)) for n in range(3001)]
    few = thinned(points)
    assert len(few) == MAX_POINTS and thinned(few) == few
    assert few[0] == (3.0, 3.0) and [x for x, _ in few] == sorted(x for x, _ in few)
    assert np.mean([y for _, y in few]) == pytest.approx(3.0, abs=0.05)


ROWS = [
    SystemRow("a|b\n[x]", "model", {"hr@5": Estimate(0.5, 0.4, 0.6, "c", 0.1, 0.0, 0.2, 0.01, "better")}),
    SystemRow("c", "bound", {"mrr@5": Estimate(0.25)}),
]


def test_markdown_table():
    assert markdown_table(ROWS).splitlines() == [
        "| system | hr@5 | mrr@5 |",
        "|---|---:|---:|",
        "| a\\|b [x] | 0.5000 [0.4000, 0.6000] ▲ | – |",
        "| c (bound) | – | 0.2500 |",
    ]
    assert markdown_table(ROWS, ["mrr@5"]).splitlines()[0] == "| system | mrr@5 |"
    with pytest.raises(ConfigError, match="did you mean 'mrr@5'"):
        markdown_table(ROWS, ["mrr@6"])


def test_console_table():
    stream = StringIO()
    rich.console.Console(file=stream, width=80).print(console_table(ROWS))
    text = stream.getvalue()
    assert "[x]" in text and "0.5000▲" in text and "±0.1000" in text and "0.2500" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.5, "0.5"),
        (0.0, "0"),
        (1e-5, "1e-05"),
        (1234.56789, "1,234.5679"),
        ([1, "a"], "1, a"),
        ({"k": 2}, "k 2"),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text


def test_a_quantizer_that_is_a_network_shows_its_curves(tmp_path):
    from sidtune.metrics.report.curves import quantizer_curves
    from sidtune.tokenizers.quantizers.base import make_quantizer

    vectors = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    options = {"level_sizes": [64, 8], "hidden": [8], "latent_dims": 4, "epochs": 7, "batch_size": 20, "revive": False}
    options |= {"kmeans_start": False, "diversity_weight": 0.1, "diversity_clusters": 2}
    quantizer = make_quantizer("rq_vae", options).fit(vectors)
    quantizer.save_pretrained(tmp_path / "rq_vae")
    (curves,) = quantizer_curves(tmp_path / "rq_vae")
    assert curves.name == "semantic IDs, rq_vae" and curves.unit == "epoch"
    steps = [float(n) for n in range(1, 8)]
    errors = [epoch["reconstruction"] for epoch in quantizer.curves]
    assert curves.panels["reconstruction error"] == {"error": list(zip(steps, errors, strict=True))}
    shares = [[epoch["used"][level] for epoch in quantizer.curves] for level in range(2)]
    assert shares[0] != shares[1]
    wanted = {f"level {name}": list(zip(steps, shares[n], strict=True)) for n, name in enumerate("ab")}
    assert curves.panels["codes in use"] == wanted
    assert set(curves.panels["other losses"]) == {"codebook", "commitment", "diversity"}
    page = write_report(tmp_path / "r.html", ReportData("x", curves=[curves])).read_text("utf-8")
    assert all(text in page for text in ("semantic IDs, rq_vae", ">epoch<", "reconstruction error", "commitment"))
    assert ">step<" not in page
    make_quantizer("residual_kmeans", {"level_sizes": [4, 4]}).fit(vectors).save_pretrained(tmp_path / "kmeans")
    assert quantizer_curves(tmp_path / "kmeans") == []
