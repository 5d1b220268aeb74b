"""Tables of the documentation are those of the code; files and names that it refers to exist."""

from __future__ import annotations

import ast
import csv
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, run_process
from toy_env import PointEnv, runner_cfg

from m3po.config import REMOVED, AlgorithmCfg
from m3po.presets import MODES, sized, suite_runner_cfg
from m3po.runners import M3PORunner
from m3po.runners.reporting import SCORE_COLUMNS

PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
LOG = REPOSITORY / "docs" / "experiments"
ALGORITHM = REPOSITORY / "docs" / "algorithm.md"
FIELDS = "| field (below `agent.algorithm.`) |"
OLD_NAMES = "## Names of version 0.1"


def leaves(cfg: AlgorithmCfg) -> dict[str, Any]:
    """Values of all fields by their dotted names."""
    found = {}
    for name, value in dataclasses.asdict(cfg).items():
        found |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return found


def read_table(head: str) -> dict[str, list[str]]:
    """First cell -> others of the table of the page about the algorithm whose head starts so."""
    lines = ALGORITHM.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head)) + 2
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        name, *values = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name.strip("`")] = values
    return rows


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_of_fields_has_the_values_of_both_modes_and_devices():
    columns = []
    for mode in ("default", "paper"):
        cpu, cuda = leaves(MODES[mode]()), leaves(sized(MODES[mode](), "cuda:0"))
        columns += [cpu, {name: "-" if cuda[name] == cpu[name] else cuda[name] for name in cpu}]
    expected = {name: [shown(column[name]) for column in columns] for name in columns[0]}
    assert read_table(f"{FIELDS} default |") == expected


def test_the_table_of_suites_has_what_they_change():
    default = leaves(AlgorithmCfg())
    one, several = (leaves(suite_runner_cfg(many, "cpu", "default")["algorithm"]) for many in (False, True))
    changed = [name for name in default if (one[name], several[name]) != (default[name], default[name])]
    expected = {name: [shown(one[name]), shown(several[name])] for name in changed}
    assert read_table(f"{FIELDS} one task |") == expected


def test_equations_are_where_the_page_says():
    text = ALGORITHM.read_text(encoding="utf-8")
    references = re.findall(r"`(\w+/\w+\.py)`((?:, `[\w.]+`)*)", text)
    assert len(references) > 10
    for path, names in references:
        tree = ast.parse((REPOSITORY / "source" / "m3po" / path).read_text(encoding="utf-8"))
        defined = set()
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                defined.add(node.name)
                defined |= {f"{node.name}.{part.name}" for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
        assert set(re.findall(r"[\w.]+", names)) <= defined, (path, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != LOG], ids=lambda page: page.name)
def test_no_page_tells_of_fields_that_are_gone(page):
    """The log of experiments does: it says what was. So does the table of names at the end of the glossary."""
    text = page.read_text(encoding="utf-8").partition(OLD_NAMES)[0]
    present = {name.split(".")[-1] for name in leaves(AlgorithmCfg())}
    sections = {"AlgorithmCfg": "", "WorldModelCfg": "world_model.", "PlannerCfg": "planner."}
    sections |= {"BonusCfg": "bonus.", "CriticReplayCfg": "critic_replay."}
    for section, fields in REMOVED.items():
        for name in fields:
            path = re.escape(f"{sections[section]}{name}" if sections[section] else f"agent.algorithm.{name}")
            assert not re.search(rf"\b{path}\b", text), path
            if name not in present and "_" in name:
                assert f"`{name}`" not in text, name


def test_overrides_on_pages_are_fields_of_today():
    """``agent.algorithm.X.Y=...``, of M3PO or of rsl_rl's PPO."""
    names = set(leaves(AlgorithmCfg()))
    for page in PAGES:
        if page.parent != LOG:
            found = re.findall(r"agent\.algorithm\.([\w.]*\w)", page.read_text(encoding="utf-8"))
            sections = {name.rsplit(".", 1)[0] for name in names if "." in name}
            assert set(found) <= names | sections, page.name


def test_the_glossary_has_every_figure_of_a_run(tmp_path):
    """Of M3PO and of rsl_rl's PPO, of one task; those that an environment logs are its own."""
    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8").partition(OLD_NAMES)[0]
    M3PORunner(PointEnv(16), runner_cfg(), str(tmp_path), "cpu").learn(3)
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    assert len(columns) > 40
    columns += [*SCORE_COLUMNS, "loss/value"]
    assert [name for name in columns if f"`{name}`" not in text] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as a site; what a page refers to and lacks is a failure."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    result = run_process(command, timeout=120, cwd=REPOSITORY)
    assert result.rc == 0, result.stderr[-3000:]
    return folder


def test_the_site_has_every_page_and_the_readme_as_its_first(site):
    pages = {path.parent.name for path in site.rglob("index.html")}
    assert {page.stem for page in PAGES if page.stem not in ("README", "index")} | {"experiments"} <= pages
    assert "Two commands" in (site / "index.html").read_text(encoding="utf-8")


def test_the_site_documents_every_field_of_the_configuration(site):
    text = (site / "configuration" / "index.html").read_text(encoding="utf-8")
    assert [name for name in leaves(AlgorithmCfg()) if f".{name.split('.')[-1]}" not in text] == []


def test_no_picture_of_the_site_is_missing(site):
    for page in site.rglob("*.html"):
        for source in re.findall(r'<img[^>]* src="([^"]+)"', page.read_text(encoding="utf-8")):
            assert source.startswith(("http", "data:")) or (page.parent / source).resolve().is_file(), (page, source)
