"""The pages say what the code does: their links, commands, options, configuration keys, make
targets, paths and imports exist, and the README's quick commands run.
"""

from __future__ import annotations

import ast
import re
import shlex
import string
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from adversa.cli.app import app
from adversa.config import keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
COMMAND = typer.main.get_command(app)
KEYS = set(keys())
SECTIONS = {key.partition(".")[0] for key in KEYS}
MAPPINGS = {  # their keys are the user's
    "evaluate.groups",
    "data.labels",
    "classifier.model_args",
    "sweep.search.space",
    "sweep.search.searcher_args",
    "sweep.search.scheduler_args",
}
FILES = (".py", ".md", ".json", ".html", ".parquet", ".yaml")
FOLDERS = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def fences(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """What the page sets in code font, outside of its fenced blocks; a table's \\| is a bar."""
    return [s.replace("\\|", "|") for s in re.findall(r"`([^`\n]+)`", prose(text))]


def lines(text: str) -> list[str]:
    """Each line that a reader may type: those of blocks without a language, and code in prose."""
    typed = [line for language, block in fences(text) if not language for line in block.split("\n")]
    return [*typed, *spans(text)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    kept = string.ascii_lowercase + string.digits + "-_ "
    titles = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.M)
    return {"".join(c for c in t.lower() if c in kept).replace(" ", "-") for t in titles}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page.read_text()))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def unknown_commands(text: str) -> list[str]:
    """Lines that name a command or an option of adversa that does not exist."""
    unknown = []
    for line in lines(text):
        if line.startswith("adversa ") and not is_known(line):
            unknown.append(line)
    return unknown


def is_known(line: str) -> bool:
    _, *words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
    command = COMMAND
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if getattr(command, "commands", {}) and words not in (["--help"], ["COMMAND", "--help"]):
        return False
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    return all(w.partition("=")[0] in options for w in words if w.startswith("-"))


def flat(tree: dict[str, object], under: str = "") -> Iterator[str]:
    """The dotted keys of a configuration's mapping."""
    for name, value in tree.items():
        key = f"{under}{name}"
        yield key
        if isinstance(value, dict) and key not in MAPPINGS:
            yield from flat(value, f"{key}.")


def unknown_keys(text: str) -> list[str]:
    """Configuration keys that do not exist: dotted ones in code font, those of YAML blocks, those
    of --set, and those of a table's column "key of `section`".
    """
    named = [m[1] for s in spans(text) if (m := re.match(r"([a-z]+(?:\.[a-z_]+)+)(?:[=: ]|$)", s))]
    named = [k for k in named if k.partition(".")[0] in SECTIONS and not k.endswith(FILES)]
    named += [m for line in lines(text) for m in re.findall(r"--set ([a-z_.]+)=", line)]
    for language, block in fences(text):
        tree = yaml.safe_load(block) if language == "yaml" else {}
        if tree.keys() <= SECTIONS:
            named += flat(tree)
    named += table_keys(text)
    return sorted(set(named) - KEYS - MAPPINGS - {"key.sub"})


def table_keys(text: str) -> Iterator[str]:
    section, column = "", 0
    for row in prose(text).split("\n"):
        cells = [c.strip() for c in row.split("|")]
        if header := next((c for c in cells if re.fullmatch(r"keys? of `\w+`", c)), None):
            section, column = header.split("`")[1], cells.index(header)
        elif not row.startswith("|"):
            section = ""
        elif section:
            found = re.sub(r"\([^)]*\)", "", cells[column])
            yield from (f"{section}.{k.split(':')[0]}" for k in re.findall(r"`([^`]+)`", found))


def missing_paths(text: str) -> list[str]:
    """Typed paths of modules, or below a folder of the repository, that do not exist there or below
    adversa.
    """
    words = [w.strip("(),;.") for line in lines(text) for w in line.split() if "/" in w]
    words = [w for w in words if not re.search(r"[<>*:{}$]", w)]
    ours = [w for w in words if w.endswith(".py") or w.partition("/")[0] in FOLDERS]
    return [w for w in ours if not any((at / w).exists() for at in (ROOT, ROOT / "adversa"))]


def missing_imports(text: str) -> list[str]:
    """Names that Python blocks import from adversa, and that are not there. Nothing is imported."""
    missing = []
    for block in (block for language, block in fences(text) if language == "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adversa"):
                at = ROOT / (node.module or "").replace(".", "/")
                known = defined(at / "__init__.py" if at.is_dir() else at.with_suffix(".py"))
                known |= {p.stem for p in at.glob("*")}
                missing += [f"{node.module}.{a.name}" for a in node.names if a.name not in known]
    return missing


def defined(module: Path) -> set[str]:
    """Top-level functions and classes of a module, and what it imports by name."""
    body = ast.parse(module.read_text()).body if module.exists() else []
    named = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return named | {
        a.asname or a.name for n in body if isinstance(n, ast.ImportFrom) for a in n.names
    }


def missing_targets(text: str) -> list[str]:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = [m[1] for line in lines(text) if (m := re.match(r"make ([\w-]+)", line))]
    return [name for name in named if name not in targets]


@each_page
def test_links_resolve(page):
    assert broken_links(page) == []


@each_page
def test_what_is_named_exists(page):
    text = page.read_text()
    assert unknown_commands(text) == []
    assert unknown_keys(text) == []
    assert missing_paths(text) == []
    assert missing_targets(text) == []
    assert missing_imports(text) == []


def test_each_kind_of_error_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` title\n[1](gone.md) [2](#nowhere) [3](#a-b-title) [4](page.md#a-b-title)\n"
    )
    assert broken_links(page) == ["gone.md", "#nowhere"]
    text = (
        "`adversa lop`, `adversa loop --seeds 3`, `adversa loop --seed 3`; `make cake`\n"
        "`mine.bugdet`, `mine.budget: 3`, `mine.py`; `adversa/gone.py`, `engine/step.py`\n"
        "```\nadversa mine --set mine.bugdets=3 --explian\n```\n"
        "```yaml\nmine: {budgets: 3}\n```\n"
        "```python\nfrom adversa.config import load, gone\nfrom adversa.sweep import run\n```\n"
        "| check | key of `curate` |\n| --- | --- |\n| a | `twin`, `quota: 3` |\n"
    )
    assert unknown_commands(text) == [
        "adversa mine --set mine.bugdets=3 --explian",
        "adversa lop",
        "adversa loop --seeds 3",
    ]
    assert unknown_keys(text) == ["curate.twin", "mine.budgets", "mine.bugdet", "mine.bugdets"]
    assert missing_paths(text) == ["adversa/gone.py"]
    assert missing_targets(text) == ["cake"]
    assert missing_imports(text) == ["adversa.config.gone"]


def test_every_page_is_in_the_index():
    for index in (ROOT / "docs/README.md", ROOT / "docs/decisions/README.md"):
        linked = set(re.findall(r"\]\(([\w-]+\.md)\)", index.read_text()))
        assert linked == {p.name for p in index.parent.glob("*.md")} - {"README.md"}


def test_the_architecture_page_draws_the_layers_that_are_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    checked = next(c for c in project["tool"]["importlinter"]["contracts"] if "layers" in c)[
        "layers"
    ]
    drawing = fences((ROOT / "docs/architecture.md").read_text())[0][1]
    drawn = [re.split(r"\s{2,}", line)[0] for line in drawing.split("\n") if line[:1].isalpha()]
    assert drawn == checked


def test_the_quick_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lesions").mkdir()
    typed = [line for line in lines((ROOT / "README.md").read_text()) if line.strip()]
    made = next(line for line in typed if line.startswith("echo "))
    written, name = re.fullmatch(r"echo '(.*)' > (\S+)", made).groups()
    (tmp_path / name).write_text(written)
    quick = {
        shlex.join(shlex.split(line, comments=True)) for line in typed if "adversa config" in line
    }
    quick = {c for c in quick if "CONFIG" not in c and c != "adversa config"}
    assert len(quick) >= 2
    for command in sorted(
        quick | {"adversa --help", "adversa config show", "adversa config check"}
    ):
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.output)
        assert result.output
