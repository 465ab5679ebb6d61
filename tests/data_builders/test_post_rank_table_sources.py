"""Sources of post-ranking lists that need no model: passages and saved tables; the rest is tested with the recipe."""

from post_rank_sources import rating_rows, recbole

from sidtune.data_builders.post_ranking.sources import load_source
from sidtune.data_builders.post_ranking.store import save_post_rank
from sidtune.data_builders.post_ranking.text import request_of


def test_passages_and_saved_tables_are_sources(tmp_path):
    (tmp_path / "q.tsv").write_text("q1\tred pen\nq2\tblue lamp\n")
    (tmp_path / "p.tsv").write_text("p1\ta red pen\np2\ta lamp\np3\ta chair\n")
    (tmp_path / "run.tsv").write_text("q1 p2 3\nq1 p1 2\nq1 p3 1\nq2 p2 2\nq2 p1 1\n")
    (tmp_path / "rel.tsv").write_text("q1\tp1\t1\nq2\tp2\t1\n")
    files = {n: str(tmp_path / f) for n, f in (("queries", "q.tsv"), ("passages", "p.tsv"), ("run", "run.tsv"))}
    part = {**files, "qrels": str(tmp_path / "rel.tsv"), "width": 8}
    table = load_source({"kind": "passages", "train": part, "test": part}).table
    assert table.requests["split"].to_pylist() == ["train", "train", "test", "test"]
    assert table.relevance.tolist() == [0, 1, 0, 1, 0] * 2
    assert dict(request_of(table, 0, 0).item_texts[1])["text"] == "a red pen"
    ratings = recbole(tmp_path / "r", rating_rows())
    segments = {"upstream_share": 0.3, "width": 4, "d_q": 6}
    known = load_source({"kind": "movielens", "path": str(ratings), "segments": segments}).table
    (tmp_path / "t").mkdir()
    save_post_rank(known, tmp_path / "t")
    assert load_source({"kind": "table", "path": str(tmp_path / "t")}).table.requests.equals(known.requests)
