"""`adversa config show`: YAML that reads back, and says of every key what it is and who set it."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from adversa.config import Config, check, commented, load, packaged, read
from adversa.config.faults import _section


def sections(model: type[BaseModel] = Config):
    yield model
    for info in model.model_fields.values():
        if (sub := _section(info.annotation)) is not None:
            yield from sections(sub)


def test_every_key_and_section_is_described():
    bare = [
        f"{m.__name__}.{name}"
        for m in sections()
        for name, info in m.model_fields.items()
        if not (info.description or _section(info.annotation))
    ]
    assert bare == []
    assert [m.__name__ for m in sections() if not m.__doc__] == []


@pytest.mark.parametrize(
    "name", sorted(p.name for p in packaged("demo.yaml").parent.glob("*.yaml"))
)
def test_what_is_shown_is_the_same_configuration_again(name, tmp_path):
    path = packaged(name)
    shown = tmp_path / "shown.yaml"
    shown.write_text(commented(load(path), read(path)[1]))
    assert load(shown) == load(path)


def comment_of(text: str, key: str) -> str:
    """The comment above a key, found by its indentation among the sections."""
    lines, *path = text.split("\n"), *key.split(".")
    at = 0
    for depth, name in enumerate(path):
        start = "  " * depth + f"{name}:"
        at = next(i for i in range(at + 1, len(lines)) if lines[i].startswith(start))
    return lines[at - 1].strip()


def test_who_set_a_key_is_said(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {resolution: 64}\nclassifier: {model_args: {channels: [8, 8, 8, 8]}}\n")
    options = ["data.resolution=48", "mine.budget=5", "curate.judge={steps: 7}"]
    config, (_, sources) = load(path, options, seed=3), read(path, options, seed=3)
    text = commented(config, sources)
    assert comment_of(text, "data.resolution").endswith("default 32; set by --set")
    assert comment_of(text, "mine.budget").endswith("set by --set")
    assert comment_of(text, "seed").endswith("default 0; set by --seed")
    assert comment_of(text, "classifier.model_args").endswith(f"set by {path}")
    assert "set by" not in comment_of(text, "classifier.steps")
    assert comment_of(text, "curate.judge.steps").endswith("set by --set")
    assert all(
        re.match(r"\s*#", above)
        for above, line in zip(text.split("\n"), text.split("\n")[1:], strict=False)
        if re.match(r"\s*[a-z_]+:", line)
    )


def test_values_that_yaml_could_misread_come_back(tmp_path):
    tree = {
        "data": {"labels": ["no", "1e3", "null", "ä: #b"]},
        "evaluate": {"groups": {"on": ["no", "1e3"]}},
        "classifier": {"model_args": {"channels": [8, 8, 8, 8]}},
    }
    config = check(tree, "x")
    path = tmp_path / "c.yaml"
    path.write_text(commented(config, {}))
    assert load(path) == config
