"""The tool that compares two versions must see every difference, and none in mere names."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from adversa import types


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).resolve().parents[1] / "tools" / "same_results.py"
    spec = importlib.util.spec_from_file_location("same_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png(value: int, level: int = 6) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out, "png", compress_level=level)
    return out.getvalue()


def made_up(
    root: Path, renamed: bool = False, image: int = 7, accuracy: float = 0.5, seconds: float = 1.0
) -> Path:
    """A run folder of four images, as one version writes it or as one with other names does."""
    judge = "verifier" if renamed else "judge"
    guided, unguided = ("new-a", "new-b") if renamed else ("a", "b")
    real = [{"id": f"{i}", "label": i, "image": png(i)} for i in range(2)]
    asked = {"label": 0, "guidance": 2.0}
    requests = [
        asked
        | {"request_id": guided, "arm": "guided", "seed": 5, "example": "1", "sigma_start": 2.0}
        | {"strategy": "img2img" if renamed else "vary"},
        asked
        | {"request_id": unguided, "arm": "unguided", "seed": 6, "example": None}
        | {"strategy": "sample", "sigma_start": 40.0},
    ]
    mix = [{"id": "0", "kind": "real", "label": 0, "weight": 1.0}]
    mix += [{"id": guided, "kind": "synthetic", "label": 0, "weight": 1.0}]
    said = {"seed": 0, "label": 0, "id": "0", "logits": [0.25, 0.75]}
    parts = {
        "data/train": real,
        "round-001/guided/mix": mix[::-1] if renamed else mix,  # the order is of no weight
        f"{judge}/mix-0": mix[:1],
        "round-001/hard": [{"example": "1", "label": 0, "rank": 0}],
        "round-001/requests": requests,
        "round-001/synthetic": [
            {"request_id": guided, "image": png(image, level=9 if renamed else 1)},
            {"request_id": unguided, "image": None},
        ],
        "round-001/verdicts": [
            {"request_id": guided, "keep": False, "reason": f"{judge} disagrees"},
            {"request_id": unguided, "keep": True, "reason": ""},
        ],
        "test": [said | {"arm": "baseline" if renamed else "before"}],
    }
    for folder, rows in parts.items():
        (root / folder).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), root / folder / "part-00000.parquet")
    weights = {"x": np.ones(3, np.float32), "y": np.zeros(2, np.float32)}
    for folder in (f"{judge}/fold-0", "denoiser", "round-001/guided/seed-0/classifier"):
        (root / folder).mkdir(parents=True)
        named = {f"new.{k}": v for k, v in reversed(weights.items())} if renamed else weights
        save_file(named, root / folder / "model.safetensors", {"made": str(renamed)})
    card = {"arm": "guided", "seed": 0, "round": 1, "role": "test", "n": 2}
    card |= {"metrics": {"accuracy": accuracy}, "intervals": {"accuracy": [0.1, math.nan]}}
    name = (
        "test/guided/seed-0/scorecard.json"
        if renamed
        else "round-001/guided/seed-0/scorecard-test.json"
    )
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(card))
    summary = {
        "classes": ["mel", "nv"],
        "run_id": "new" if renamed else "old",
        "git": "0" if renamed else "1",
        "wall_seconds": seconds,
        "verdict": "not shown",
        "rejected": {f"{judge} disagrees": 1},
        "baseline" if renamed else "before": {"test": {"accuracy": accuracy}},
        "comparisons": [{"a": "guided", "b": "real", "gain_per_device_hour": {"gain": seconds}}],
    }
    (root / "summary.json").write_text(json.dumps(summary))
    return root


def compare(tool, a, b):
    """Of two records of one run each."""
    return tool.compare(
        *({"demo": {"run_id": "r", "made": {"threads": 1}, "facts": f}} for f in (a, b))
    )


def test_other_names_ids_times_and_encodings_are_the_same_results(tool, tmp_path):
    a = tool.facts_of(made_up(tmp_path / "a"))
    b = tool.facts_of(made_up(tmp_path / "b", renamed=True, seconds=2.0))
    lines, same = compare(tool, a, b)
    assert same and lines == [
        "demo: identical (1 data, 2 mix, 3 weights, 1 hard, 2 request, 2 image, 2 verdict, "
        "1 prediction, 4 scorecard, 7 summary)"
    ]


def test_a_planted_image_and_metric_are_found(tool, tmp_path):
    a = tool.facts_of(made_up(tmp_path / "a"))
    b = tool.facts_of(made_up(tmp_path / "b", image=8, accuracy=0.75))
    lines, same = compare(tool, a, b)
    assert not same
    key = "round=1 arm=guided strategy=vary class=mel of=1 n=1"
    assert lines[1] == "  image: 1 of 2 differ"
    assert lines[2].startswith(f"    {key}: ")
    card = "arm=guided seed=0 round=1 role=test metrics.accuracy"
    assert lines[3] == f"  scorecard: 1 of 4 differ; largest absolute difference 0.25 ({card})"
    assert lines[4:] == [
        f"    {card}: 0.5 -> 0.75",
        "  summary: 1 of 7 differ; largest absolute difference 0.25 (before.test.accuracy)",
        "    before.test.accuracy: 0.5 -> 0.75",
    ]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("data", "x"),
        ("mix", "x"),
        ("weights", "x"),
        ("hard", "x"),
        ("request", "x"),
        ("verdict", "kept"),
        ("prediction", "x"),
        ("scorecard", math.nextafter(0.5, 1)),
        ("summary", True),
        ("image", None),
    ],
)
def test_one_change_of_any_kind_is_a_difference(tool, tmp_path, kind, change):
    a = tool.facts_of(made_up(tmp_path / "a"))
    b = copy.deepcopy(a)
    key = next(k for k, v in a[kind].items() if kind != "scorecard" or v == 0.5)
    b[kind][key] = change
    for first, second in ((a, b), (b, a)):
        lines, same = compare(tool, first, second)
        assert not same and lines[1].startswith(f"  {kind}: 1 of ")
    del b[kind][key]
    for first, second, side in ((a, b, "A"), (b, a, "B")):
        lines, same = compare(tool, first, second)
        assert not same and f"1 only in {side}" in lines[1]


def test_the_command_ends_with_1_where_anything_differs(tool, tmp_path, monkeypatch, capsys):
    for name, accuracy in {"a": 0.5, "b": 0.5, "c": 0.6}.items():
        made_up(tmp_path / name / "demo/run", accuracy=accuracy)
        made = {"threads": 1 + (name == "c"), "seconds": 1.0}
        tool.read(tmp_path / name, "demo", made, None)
    before = (tmp_path / "a/facts.json").read_text()
    monkeypatch.setattr(sys, "argv", ["same_results.py", "read", str(tmp_path / "a")])
    tool.main()
    assert (tmp_path / "a/facts.json").read_text() == before
    for other, code in (("b", 0), ("c", 1)):
        paths = [str(tmp_path / name) for name in ("a", other)]
        monkeypatch.setattr(sys, "argv", ["same_results.py", "compare", *paths])
        with pytest.raises(SystemExit) as end:
            tool.main()
        assert end.value.code == code
    assert "demo: DIFFERENT (threads 1 -> 2, which alone may change" in capsys.readouterr().out


def test_nothing_to_compare_is_no_agreement(tool, tmp_path):
    with pytest.raises(ValueError, match="neither record has a run"):
        tool.compare({}, {})
    with pytest.raises(ValueError, match="neither record has a data"):
        compare(tool, *[dict.fromkeys(tool.KINDS, {})] * 2)
    facts = tool.facts_of(made_up(tmp_path / "a"))
    record = {"run_id": "r", "made": {}, "facts": facts}
    assert tool.compare({"demo": record}, {}) == (["demo: only in A"], False)
    (tmp_path / "a/denoiser").rename(tmp_path / "a/elsewhere")
    (tmp_path / "a/round-001/hard").rename(tmp_path / "a/round-001/difficult")
    with pytest.raises(ValueError, match="has no hard; change the rows of LAYOUT"):
        tool.facts_of(tmp_path / "a")


def test_seeds_are_those_of_the_names_there_were(tool, monkeypatch):
    asked = [1, "guided", "e", "vary", 0]
    old = types.request_id("old", *asked), types.seed_of("judge", 0, 1), types.digest("fold", "g")
    for name in ("digest", "request_id"):
        monkeypatch.setattr(types, name, getattr(types, name))  # put back at the end
    tool.rename("old")
    asked[3] = "img2img"
    assert old == (
        types.request_id("new", *asked),
        types.seed_of("verifier", 0, 1),
        types.digest("fold", "g"),
    )


def test_a_part_of_ham_has_whole_lesions(tool, tmp_path):
    rows = [f"HAM_{i // 2},ISIC_{i},mel" for i in range(40)]
    with zipfile.ZipFile(tmp_path / "ham.zip", "w") as z:
        z.writestr("HAM10000_metadata.csv", "\n".join(["lesion_id,image_id,dx", *rows]))
        for i in range(40):
            z.writestr(f"images/ISIC_{i}.jpg", b"x")
    tool.part_of_ham(tmp_path / "ham.zip", tmp_path / "a.zip", 3)
    tool.part_of_ham(tmp_path / "ham.zip", tmp_path / "b.zip", 3)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as z:
        kept = {int(n[len("images/ISIC_") : -4]) for n in z.namelist() if n.endswith(".jpg")}
        assert len(z.read("HAM10000_metadata.csv").splitlines()) == len(kept) + 1
    assert 0 < len(kept) < 40 and {i ^ 1 for i in kept} == kept
