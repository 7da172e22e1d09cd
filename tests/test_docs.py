"""The documentation is true: its Python runs, its recipes are right, its links and quotes hold."""

import os
import re
import runpy
import shlex
import socket
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from distillkit import cli, plugins
from distillkit.recipe import bundled, load
from distillkit.training.metrics import read

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DATA = os.environ.get("DISTILLKIT_DATA", "")
#: pages named after a package that not everyone has installed
OPTIONAL = ("mmdet", "mmrotate", "transformers", "lightning", "text", "ultralytics")
FENCE = re.compile(r"^```(\w+)(?: (needs-weights))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str, needs_weights: bool = False) -> list[str]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for kind, needs, text in found if kind == language and bool(needs) == needs_weights]


def params(pages: list[Path]) -> list:
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in pages]


def pages_with(language: str, needs_weights: bool = False) -> list:
    """All but recipes.md: its recipes are held by tests/test_recipe.py, and its package by a test of its own."""
    return params([p for p in PAGES if p.name != "recipes.md" and blocks(p, language, needs_weights)])


def run(page: Path, sources: list[str]) -> None:
    package = {"text": "transformers"}.get(page.stem, page.stem)
    if page.stem in OPTIONAL and find_spec(package) is None:
        pytest.skip(f"needs {package}")
    script = Path(f"{page.stem}.py")
    script.write_text("\n".join(sources), encoding="utf-8")
    runpy.run_path(str(script))


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder, the only rank of a group that may be opened, and a compiler that traces but needs no C++."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # else the next test's mixed precision is this one's
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_a_page_runs_from_top_to_bottom(page, alone):
    run(page, blocks(page, "python"))


@pytest.mark.skipif(not DATA, reason="set DISTILLKIT_DATA to the folder that holds weights_nanodet")
@pytest.mark.parametrize("page", pages_with("python", needs_weights=True))
def test_python_that_needs_weights_runs(page, alone):
    Path("weights_nanodet").symlink_to(Path(DATA) / "weights_nanodet")
    run(page, blocks(page, "python", needs_weights=True))


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_recipes_of_a_page_are_right(page, tmp_path):
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"block{number}.yaml"
        file.write_text(block)
        load(file)


def test_the_package_of_the_recipes_page_runs_from_start_to_end(alone, monkeypatch):
    """A detector and a data set of one's own, with LD, as the page has them; then the verbs on what the run left."""
    monkeypatch.setattr(plugins, "_registered", {"model": {}, "distiller": {}, "data": {}})
    monkeypatch.setattr(sys, "path", list(sys.path))
    page = ROOT / "docs" / "recipes.md"
    (package,) = blocks(page, "python")
    Path("my_package.py").write_text(package, encoding="utf-8")
    Path("own.yaml").write_text(blocks(page, "yaml")[-1], encoding="utf-8")
    Image.new("RGB", (50, 40), "white").save("white.png")
    for words in (
        ["check", "own.yaml"],
        ["run", "own.yaml"],
        ["eval", "own.yaml", "--model", "distilled", "--split", "test"],
        ["predict", "own.yaml", "white.png", "--weights", "distilled"],
        ["export", "own.yaml", "--weights", "distilled"],
    ):
        done = CliRunner().invoke(cli.app, [*words, "--import", "my_package"])
        assert done.exit_code == 0, done.output
    losses = [row["losses"] for row in read(Path("runs/own/distilled/metrics.jsonl")) if row["kind"] == "train"]
    assert all(step["ld"] > 0 and step["loss_bbox"] > 0 for step in losses)
    assert {p.name for p in Path("runs/own").glob("*.png")} >= {"regions.png", "distribution.png"}


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub makes it."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", params([*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]))
def test_links_lead_somewhere(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: no such heading"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index


def test_the_first_two_commands_of_the_readme_are_those_that_ci_runs():
    assert blocks(ROOT / "README.md", "bash")[:2] == [
        "pip install -e . && distillkit run recipes/quickstart.yaml\n",
        'pip install -e ".[test]" && pytest\n',
    ]
    assert FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))[1][0] == "bash"


def test_the_table_of_the_readme_is_the_one_that_the_benchmark_wrote():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- table:quickstart -->\n(.*?)<!-- end -->", readme, re.DOTALL)
    written = (ROOT / "benchmarks" / "results" / "quickstart.md").read_text(encoding="utf-8")
    assert block.strip() in written
    assert "| distilled | 3 |" in block
    assert "python -m benchmarks.seeds recipes/quickstart.yaml" in block


def commands() -> list:
    """The words of every `distillkit VERB ...` in the pages, without comments and `accelerate launch`."""
    found = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for block in [text for language in ("sh", "bash", "console") for text in blocks(page, language)]:
            for line in re.sub(r"\\\n", " ", block).splitlines():
                if at := re.search(r"(?:^| )distillkit (?!-)(.*)$", line):
                    words = shlex.split(at[1], comments=True)
                    found.append(pytest.param(words, id=f"{page.name}: {' '.join(words[:3])}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_docs_can_be_typed(words):
    """The verb is there and knows the options; a recipe that is named without a path comes with distillkit."""
    known = get_command(cli.app).commands
    verb, *rest = words
    assert verb in known, f"no verb {verb}; there are {', '.join(known)}"
    options = {name for parameter in known[verb].params for name in parameter.opts}
    for word in rest:
        assert not word.startswith("--") or word.partition("=")[0] in options, f"{verb} has no option {word}"
    if verb in ("run", "check", "eval", "predict", "export", "cam", "show") and rest and not rest[0].startswith("-"):
        assert rest[0].endswith(".yaml") or rest[0] in {path.stem for path in bundled()}


def test_the_readme_names_every_verb():
    listed = re.search(r"`--help` after each verb \((.*)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == set(get_command(cli.app).commands)


def test_messages_that_the_docs_explain_are_messages_of_the_code():
    """The first column of tables headed "the error says"; ... stands for what differs from case to case."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "distillkit").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # messages written over several lines
    docs = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    tables = re.findall(r"^\| the error says \|.*?\n((?:\|.*\n)+)", docs, re.MULTILINE)
    quoted = [row for table in tables for row in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)]
    assert quoted
    for message in quoted:
        for part in filter(None, message.split("...")):
            assert part.strip() in code, f"no message says {part.strip()!r}"
