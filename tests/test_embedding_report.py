"""The report on task embeddings: nearest tasks, the projection, the files."""

import csv
import sys

import pytest
import torch

from m3po.runners.embedding_report import nearest_table, nearest_tasks, project, write_embedding_report

NAMES = ("walk", "run", "jump", "swim")


def directions(*degrees, norms=None):
    """Unit vectors at these angles in a plane of three dimensions, or vectors of these norms."""
    angles = torch.deg2rad(torch.tensor([float(d) for d in degrees]))
    vectors = torch.stack([angles.cos(), angles.sin(), torch.zeros_like(angles)], dim=1)
    return vectors if norms is None else vectors * torch.tensor(norms)[:, None]


def test_nearest_tasks_are_those_at_the_smallest_angles_whatever_the_norms():
    embedding = directions(0, 30, 90, 180, norms=[1.0, 0.01, 0.5, 1.0])
    nearest = nearest_tasks(NAMES, embedding, count=2)
    assert [[name for name, _ in near] for near in nearest] == [
        ["run", "jump"],
        ["walk", "jump"],
        ["run", "swim"],
        ["jump", "run"],
    ]
    # cos 30, cos 90; cos 30, cos 60; cos 60, cos 90; cos 90, cos 150
    expected = torch.tensor([[0.866025, 0.0], [0.866025, 0.5], [0.5, 0.0], [0.0, -0.866025]])
    found = torch.tensor([[value for _, value in near] for near in nearest])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0.0)
    assert all(len(near) == 3 for near in nearest_tasks(NAMES, embedding, count=9))


def test_a_task_without_a_direction_is_similar_to_none():
    nearest = nearest_tasks(NAMES[:3], torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    assert [value for _, value in nearest[0]] == [0.0, 0.0]


def test_the_projection_keeps_the_distances_of_a_plane():
    torch.manual_seed(0)
    plane = torch.randn(6, 2) * torch.tensor([5.0, 1.0])
    axes = torch.linalg.qr(torch.randn(8, 2))[0]
    embedding = plane @ axes.T + torch.randn(8)
    places = project(embedding)
    torch.testing.assert_close(torch.cdist(places, places), torch.cdist(plane, plane), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(places.mean(0), torch.zeros(2), atol=1e-5, rtol=0.0)
    assert places[:, 0].var() > places[:, 1].var()
    covariance = (places - places.mean(0)).T @ places
    assert covariance[0, 1].abs() < 1e-3 * covariance[0, 0]


def test_the_projection_has_one_sign():
    """The decomposition of X and of -X differ by signs only, the tasks' places must mirror each other."""
    torch.manual_seed(0)
    embedding = torch.randn(7, 5)
    assert torch.equal(project(embedding), project(embedding.clone()))
    torch.testing.assert_close(project(-embedding), -project(embedding))
    order = torch.randperm(7)
    torch.testing.assert_close(project(embedding[order]), project(embedding)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_files(tmp_path, count):
    names = NAMES[:count]
    torch.manual_seed(0)
    embedding = torch.nn.Parameter(torch.randn(count, 5))
    table, picture = write_embedding_report(tmp_path, names, embedding)
    assert (table.name, picture.name) == ("embeddings.csv", "embeddings.png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == list(names)
    for row, vector, place in zip(rows, embedding, project(embedding), strict=True):
        assert float(row["norm"]) == pytest.approx(vector.norm().item(), rel=1e-5)
        assert [float(row["x"]), float(row["y"])] == pytest.approx(place.tolist(), rel=1e-5, abs=1e-6)
    (other, value), *_ = nearest_tasks(names, embedding)[0]
    assert rows[0]["nearest_1"] == other and float(rows[0]["similarity_1"]) == pytest.approx(value, rel=1e-5)
    assert ("nearest_3" in rows[0]) == (count == 4) and "nearest_4" not in rows[0]
    written = table.read_bytes()
    write_embedding_report(tmp_path, names, embedding)
    assert table.read_bytes() == written


def test_two_tasks_lie_on_a_line():
    places = project(directions(0, 90))
    assert places[0, 0] == pytest.approx(-places[1, 0].item()) and abs(places[0, 0]) == pytest.approx(0.5**0.5)
    torch.testing.assert_close(places[:, 1], torch.zeros(2), atol=1e-6, rtol=0.0)


def test_one_task_has_no_report(tmp_path):
    assert write_embedding_report(tmp_path, ["walk"], torch.randn(1, 5)) == []
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    paths = write_embedding_report(tmp_path, NAMES, directions(0, 30, 90, 180))
    assert [path.name for path in paths] == ["embeddings.csv"] == [path.name for path in tmp_path.iterdir()]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "m3po[plots]" in lines[0]


def test_the_table_has_a_line_per_task():
    lines = nearest_table(NAMES, directions(0, 30, 90, 180)).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("walk  run (0.87), jump (") and lines[1].endswith("swim (-1.00)")
