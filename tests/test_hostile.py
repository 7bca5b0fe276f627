"""A run folder from a stranger: no command runs code from it, writes outside of it, or passes on
what a terminal obeys.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from adversa.common.sanitize import load_yaml, printable
from adversa.run import control as run_control
from adversa.run import folder as run_folder
from adversa.run import run_lock, step_folder
from adversa.run.folder import RunDir
from adversa.storage import files, tables, weights
from adversa.types import UserError

LOCAL = ("--engine", "local")
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;cm0gLXJm\x07\x9b31m\r\u202e"
SCRIPT = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
SHELL = "$(touch {mark});`touch {mark}`|touch {mark}&&'\""


class Touch:
    """Unpickled, it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.fixture
def home(tmp_path):
    """What surrounds the run, and must stay as it is: a file and a folder of the user's, and no
    mark.
    """
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/letter.txt").write_text("dear")
    (tmp_path / "diary.txt").write_text("today")
    return tmp_path


@pytest.fixture
def run(finished, home):
    return RunDir(Path(shutil.copytree(finished[1].root, home / "run")))


@pytest.fixture
def mark(home):
    return home / "executed"


@pytest.fixture
def unharmed(home, run, mark):
    """Checks that nothing around the run has changed, and nothing was executed."""

    def check(*made):
        assert not mark.exists()
        assert (home / "precious/letter.txt").read_text() == "dear" and (
            home / "diary.txt"
        ).read_text() == "today"
        assert [p.name for p in (home / "precious").iterdir()] == ["letter.txt"]
        assert {p.name for p in home.iterdir()} - {"precious", "diary.txt", "run", *made} == set()

    return check


def tame(result, *codes):
    """One of the exit codes (0 or 2), a line where it is 2, no traceback, and nothing that a
    terminal obeys.
    """
    assert result.exit_code in (codes or (0, 2)), (
        result.exit_code,
        result.output,
        result.exception,
    )
    assert "Traceback" not in result.output
    assert result.exit_code != 2 or (
        result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    ), result.stderr
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", result.output), repr(result.output)
    return result


def names(run, text, relist):
    """The first class under another name, wherever the run says it."""
    old = json.loads((run.data / "classes.json").read_text())["classes"]
    told = json.dumps(text)[1:-1]
    for path in run.root.rglob("*.json"):
        said = path.read_text()
        if old[0] in said:
            path.write_text(said.replace(old[0], told))
    for manifest in run.root.rglob("manifest.json"):
        relist(manifest.parent)


def picture(run, folder):
    path = folder / "picture.png"
    row = tables.read_part(tables.parts(run.data / "mine")[0], ["image"])["image"][0].as_py()
    path.write_bytes(row)
    return path


def first_request(run):
    return tables.read(run.round(1, "requests"), ["request_id"])["request_id"][0].as_py()


# ---- names ---------------------------------------------------------------------------------------


def test_names_are_text_wherever_they_are_shown(adversa, run, home, mark, unharmed, relist):
    hostile = ESCAPES + SCRIPT + SHELL.format(mark=mark) + "../../precious/[link=file:///]x[/y]"
    names(run, hostile, relist)
    status = json.loads(run.status.read_text())
    run.status.write_text(
        json.dumps(status | {"state": "failed", "error": hostile, "stage": hostile})
    )
    shot, sets = picture(run, home), home / "set"
    (sets / "x").mkdir(parents=True)
    for command in ("status", "watch", "report"):
        tame(adversa(command, run.root), 0, *([1] if command == "watch" else []))
    tame(adversa("runs", home), 0)
    tame(adversa("predict", run.root, shot, "--out", home / "p.csv", *LOCAL), 0)
    tame(adversa("evaluate", run.root, "--on", sets, *LOCAL), 2)
    tame(adversa("mine", "--explain", "--run-dir", run.root, *LOCAL), 0)
    tame(
        adversa("regenerate", run.root, first_request(run)), 2
    )  # the denoiser's config.json has another fingerprint now
    tame(
        adversa(
            "generate", run.root, "--labels", f"{hostile}=1", "--out", home / "generated", *LOCAL
        ),
        0,
    )
    tame(adversa("export", run.root, "--out", home / "out"), 0)
    folders = {
        p.name for out in ("out", "generated") for p in (home / out).rglob("*") if p.is_dir()
    }
    assert not any(set(name) & set("<>$`|&;\x1b\x07/") for name in folders)
    html = (run.root / "report.html").read_text()
    assert "&lt;script&gt;" in html and not re.search("<script|<img src=x|\x1b", html)
    unharmed("picture.png", "set", "p.csv", "out", "generated")


def test_escapes_in_what_a_live_view_shows(run):
    import io

    from adversa.cli.console import Screen

    out = io.StringIO()
    screen = Screen(file=out, force_terminal=True, width=60, color_system="standard")
    screen.print(f"[red]{ESCAPES}name", highlight=False)
    said = out.getvalue()
    assert (
        said.count("\x1b") == 2 and "\x1b[31m" in said and "name" in said
    )  # its own colour, and the end of it
    assert not set(said) & set("\x07\x9b\r\u202e")


# ---- files that could hold code ------------------------------------------------------------------


def commands(run, home):
    """Every command that reads a run, with what it needs."""
    shot, sets = picture(run, home), home / "set/nevus"
    sets.mkdir(parents=True, exist_ok=True)
    shutil.copy(shot, sets / "a.png")
    request = (
        first_request(run) if (run.round(1, "requests") / tables.part_name(0)).exists() else "0"
    )
    return {
        "status": ["status", run.root],
        "watch": ["watch", run.root],
        "runs": ["runs", home],
        "report": ["report", run.root],
        "predict": ["predict", run.root, shot, "--out", home / "p.csv", "--force", *LOCAL],
        "export": ["export", run.root, "--out", home / "out"],
        "regenerate": ["regenerate", run.root, request],
        "generate": [
            "generate",
            run.root,
            "--labels",
            "nevus=1",
            "--out",
            home / "generated",
            *LOCAL,
        ],
        "explain": ["mine", "--explain", "--run-dir", run.root, *LOCAL],
        "evaluate": ["evaluate", run.root, "--on", home / "set", *LOCAL],
        "loop": ["loop", run.config, "--run-dir", run.root, *LOCAL],
        "bench": [
            "bench",
            "generate",
            run.root,
            "--images",
            1,
            "--rounds",
            1,
            "--samplers",
            1,
            *LOCAL,
        ],
    }


MADE = ("picture.png", "set", "p.csv", "out", "generated")


def pickled_model(run, mark):
    """A pickle where weights lie, and beside them, under every name that a library may look for."""
    for folder in {p.parent for p in run.root.rglob(weights.MODEL)}:
        for name in (
            weights.MODEL,
            "pytorch_model.bin",
            "diffusion_pytorch_model.bin",
            "model.pt",
            "model.pkl",
        ):
            (folder / name).write_bytes(pickle.dumps(Touch(mark)))


def pickled_checkpoint(run, mark):
    """The run's denoiser is to be trained on, from a state that is a pickle."""
    import torch

    (run.denoiser / step_folder.MANIFEST).unlink()
    (run.denoiser / weights.MODEL).unlink()
    torch.save(Touch(mark), run.denoiser / weights.CHECKPOINT)
    (run.denoiser / weights.COMMITTED).write_text('{"step": 4}')


def yaml_object(run, mark):
    run.config.write_text(f"seed: !!python/object/apply:os.system ['touch {mark}']\n")


def pickled_column(run, mark):
    """Columns that Ray's extension of Arrow, where it is loaded, would unpickle."""
    kind = {
        b"ARROW:extension:name": b"ray.data.arrow_pickled_object",
        b"ARROW:extension:metadata": b"",
    }
    for path in run.root.rglob("*.parquet"):
        table = pq.read_table(path)
        fields = [pa.field(n, pa.large_binary(), metadata=kind) for n in table.schema.names]
        column = pa.array([pickle.dumps(Touch(mark))] * len(table), pa.large_binary())
        pq.write_table(pa.table([column] * len(fields), schema=pa.schema(fields)), path)


def postscript(run, mark):
    """Pictures of a format for which Pillow starts another program; and one that says it is
    huge.
    """
    eps = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(%pipe%touch "
        + str(mark).encode()
        + b") (w) file\n"
    )
    for path in run.root.rglob("*.parquet"):
        table = pq.read_table(path)
        if "image" in table.schema.names:
            at = table.schema.names.index("image")
            pq.write_table(
                table.set_column(
                    at, table.schema.field(at), pa.array([eps] * len(table), pa.binary())
                ),
                path,
            )


def odd_json(run, mark):
    """Every JSON file of the run says something else: what the first hides, the test below sees."""
    odd = [
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        "\xff",
        "[NaN]",
        '{"state": {"running": 1}, "updated": []}',
        "{}",
    ]
    for i, path in enumerate(sorted(run.root.rglob("*.json"))):
        path.write_bytes(odd[i % len(odd)].encode("latin-1"))


# Commands that read nothing of what was spoiled, and take seconds.
SPARED = {"postscript": {"bench"}, "pickled_checkpoint": {"bench", "evaluate", "export", "predict"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil", [pickled_model, pickled_checkpoint, yaml_object, pickled_column, postscript, odd_json]
)
def test_no_command_runs_what_lies_in_a_run(adversa, run, home, mark, unharmed, spoil):
    import ray.data  # noqa: F401  (its extensions of Arrow are there, as in a command with --engine ray)

    every = commands(run, home)
    spoil(run, mark)
    for name, words in every.items():
        if name in SPARED.get(spoil.__name__, ()):
            continue
        result = adversa(*words)
        tame(result, 0, 2, *([1] if name == "watch" else []))
        assert not mark.exists(), name
    unharmed(*MADE)


DAMAGES = {
    "zeroed": lambda data: b"\0" * len(data),
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "no keys": lambda data: b"{}",
    "a list": lambda data: b"[1]",
    "a text": lambda data: b'"x"',
    "other values": lambda data: re.sub(rb'": ("[^"]*"|[\d.]+|true|false)', b'": [1]', data),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_loop_names_the_one_json_file_that_is_damaged(adversa, run, damage):
    """One of each name in a finished run, and those that a run has while it is worked on."""
    run_control.request(run, run_control.GO)
    files.write_json(run.root / run_control.RESTARTS, {"restarts": 1, "seconds": 2.0})
    files.write_json(run.root / run_control.SETTINGS, {"1": {"mine.budget": 7}})
    holder = {"owner": "loop", "host": "h", "machine": "m", "pid": 1, "beat": 3, "held": 2.0}
    files.write_json(run.root / run_lock.LOCK, holder)
    files.write_json(run.denoiser / step_folder.PROGRESS, {"elapsed": 1.0})
    unread = {(run.root / "precision.json", damage)}  # of a finished run
    unread |= {(run.root / run_control.SETTINGS, d) for d in ("no keys", "other values")}
    for path in {p.name: p for p in sorted(run.root.rglob("*.json"))}.values():
        before = path.read_bytes()
        if (after := DAMAGES[damage](before)) == before:
            continue
        if (path, damage) in unread:  # then the loop would wait for the holder's heartbeat
            (run.root / run_lock.LOCK).unlink(missing_ok=True)
        path.write_bytes(after)
        told = tame(adversa("loop", run.config, "--run-dir", run.root, *LOCAL), 0, 2)
        if (path, damage) not in unread:
            assert told.exit_code == 2 and str(path) in told.stderr, (path, told.output)
            assert re.search("delete|put the file back|put back the file", told.stderr)
        path.write_bytes(before)


def test_what_is_no_picture_of_ours_is_not_decoded(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n"
    with pytest.raises(UserError, match="no PNG that can be read"):
        tables.decode_png(eps)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="pixels"):
        tables.decode_png((tmp_path / "bomb.png").read_bytes())


def test_a_training_state_that_is_a_pickle_is_not_loaded(tmp_path, mark):
    import torch

    torch.save({"step": 3, "model": Touch(mark)}, tmp_path / weights.CHECKPOINT)
    with pytest.raises(UserError, match="is no training state .*delete it"):
        weights.load_checkpoint(tmp_path)
    (tmp_path / weights.CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(UserError, match="is no training state"):
        weights.load_checkpoint(tmp_path)
    (tmp_path / weights.COMMITTED).write_text('{"step": "many"}')
    assert weights.committed_step(tmp_path) == 0 and not mark.exists()


def test_a_column_of_pickles_is_refused_by_every_way_to_read(tmp_path, mark):
    import ray.data  # noqa: F401

    kind = {
        b"ARROW:extension:name": b"ray.data.arrow_pickled_object",
        b"ARROW:extension:metadata": b"",
    }
    field = pa.field("id", pa.large_binary(), metadata=kind)
    path = tmp_path / tables.part_name(0)
    pq.write_table(
        pa.table(
            [pa.array([pickle.dumps(Touch(mark))], pa.large_binary())], schema=pa.schema([field])
        ),
        path,
    )
    for read in (
        tables.read_part,
        lambda p: tables.read(p.parent),
        lambda p: list(tables.batches(p)),
    ):
        with pytest.raises(UserError, match="column 'id' is of type ray.data.arrow_pickled_object"):
            read(path)
    assert not mark.exists()


def test_a_diffusers_folder_gives_safetensors_alone(tmp_path, mark):
    import diffusers

    from adversa.diffuse import codec_fit  # noqa: F401
    from adversa.diffuse.pretrained import INDEX, WEIGHTS, load

    small = {
        "block_out_channels": (32,),
        "layers_per_block": 1,
        "latent_channels": 2,
        "down_block_types": ("DownEncoderBlock2D",),
    }
    model = diffusers.AutoencoderKL(**small, up_block_types=("UpDecoderBlock2D",))
    model.save_pretrained(tmp_path)
    assert load(str(tmp_path), "codec.path", ["AutoencoderKL"], local=True) is not None
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../evil.bin"}}))
    with pytest.raises(UserError, match="is in several parts"):
        load(str(tmp_path), "codec.path", ["AutoencoderKL"], local=True)
    (tmp_path / INDEX).unlink()
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(UserError, match="cannot be read"):
        load(str(tmp_path), "codec.path", ["AutoencoderKL"], local=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(settings | {"quantization_config": {"quant_method": "gguf"}})
    )
    with pytest.raises(UserError, match="quantized"):
        load(str(tmp_path), "codec.path", ["AutoencoderKL"], local=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    "model",
    ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:{here}", "{here}", "resnet10t.{here}"],
)
def test_a_model_is_a_name_that_timm_knows(tmp_path, mark, model):
    from adversa.classify.model import build
    from adversa.config import Classifier

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(mark)))
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t", "pretrained_cfg": {}}')
    with pytest.raises(UserError, match="classifier.model"):
        build(Classifier(model=model.replace("{here}", str(tmp_path)), model_args={}), 3, 32)
    for key in ("pretrained", "pretrained_cfg", "checkpoint_path"):
        with pytest.raises(UserError, match="weights are given as classifier.weights"):
            build(
                Classifier(
                    model="resnet10t", model_args={key: str(tmp_path / "pytorch_model.bin")}
                ),
                3,
                32,
            )
    assert not mark.exists()


# ---- places --------------------------------------------------------------------------------------


def links(run, home):
    """What in a run could lead a writer out of it."""
    return {
        ".lock": home / "diary.txt",
        "report.html": home / "diary.txt",
        ".report.html.PID": home / "diary.txt",
        ".status.json.PID": home / "diary.txt",
        "denoiser/metrics.jsonl": home / "diary.txt",
        "round-001/synthetic": home / "precious",
        "external": home / "precious",
        "tracking": home / "precious",
    }


@pytest.mark.parametrize("name", links(RunDir(Path()), Path()))
def test_a_link_leads_no_writer_out_of_a_run(adversa, run, home, unharmed, name):
    path = run.root / name.replace("PID", str(os.getpid()))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(links(run, home)[name])
    tame(adversa("loop", run.config, "--run-dir", run.root, *LOCAL), 2)
    tame(adversa("report", run.root))
    every = commands(run, home)
    tame(adversa(*every["evaluate"]), 2)
    unharmed("picture.png", "set")


def test_a_link_within_the_run_is_no_fault(run):
    (run.root / "alias").symlink_to(run.root / "data")
    run_folder.check_links(run.root)
    elsewhere = run.root.with_name("moved")
    run.root.rename(elsewhere)
    run.root.symlink_to(elsewhere)  # who owns a run may keep it on another disk
    run_folder.check_links(run.root)


@pytest.mark.parametrize("name", ["/etc/hostname", "../diary.txt", "round-001/../../diary.txt"])
def test_a_run_names_no_file_outside_of_itself(adversa, run, home, unharmed, name):
    quality = {"grid": name, "samples": {}, "train": {}, "images": {}}
    (run.root / "quality.json").write_text(json.dumps(quality))
    result = tame(adversa("report", run.root), 2)
    assert "outside of itself" in result.stderr or "does not hold" in result.stderr
    with pytest.raises(UserError, match="outside of itself"):
        run.inside(name)
    unharmed()


# ---- YAML ----------------------------------------------------------------------------------------

PAIRS = zip("abcdefg", "bcdefgh", strict=True)
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in PAIRS
)


@pytest.mark.parametrize(
    "text, said",
    [
        (LAUGHS, "more than 100000 values"),
        ("a: &a [*a]", "an alias stands for a value that holds it"),
        ("[" * 1500, "nested too deeply"),
        ("a: " + "9" * 5000, "4300"),
        ("a: 2001-99-99", "month"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
    ],
    ids=["laughs", "cycle", "deep", "digits", "date", "object"],
)
def test_yaml_is_plain_and_small(tmp_path, text, said):
    from adversa.config import load

    with pytest.raises(yaml.YAMLError, match=said):
        load_yaml(text)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="is not valid YAML"):
        load(path)


def test_yaml_reads_what_it_should():
    text = "a: &x {b: 1}\nc: {<<: *x, d: [1, 2.5, null, yes]}\n"
    assert (
        load_yaml(text)
        == yaml.safe_load(text)
        == {"a": {"b": 1}, "c": {"b": 1, "d": [1, 2.5, None, True]}}
    )
    assert load_yaml("") is None
    assert printable("plain, \u00e4\u00f6\u00fc\n\t") == "plain, \u00e4\u00f6\u00fc\n\t"


# ---- the folder one is in ------------------------------------------------------------------------


def test_the_folder_a_command_is_started_in_lends_no_modules(run, mark, unharmed):
    """As Python itself and Ray's launcher would search it: `-m` puts it before all others."""
    from adversa.distributed import launcher

    (run.root / "ray").mkdir()
    for name in ("ray/__init__.py", "torch.py", "numpy.py"):
        (run.root / name).write_text(f"open({str(mark)!r}, 'w')")
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [*launcher.RAY, "--version"], cwd=run.root, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0 and "version" in done.stdout, done.stderr
    assert sys.executable in launcher.RAY
    unharmed()


@pytest.mark.parametrize(
    "fault", [MemoryError("all taken"), OSError(errno.EIO, "Input/output error")]
)
def test_a_fault_of_the_machine_is_not_said_to_be_the_training_states(tmp_path, monkeypatch, fault):
    """Whoever is told to delete it loses days."""
    import torch

    weights.save_checkpoint(tmp_path, {"step": 3})

    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(fault)):
        weights.load_checkpoint(tmp_path)


def test_the_traceback_of_a_fault_that_is_told_in_one_line_is_kept(tmp_path, monkeypatch):
    from adversa.cli.options import reads_run

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    @reads_run
    def command():
        raise KeyError("nearest")

    with pytest.raises(
        UserError, match=r"KeyError: 'nearest'; test_hostile.py:\d+.*has the traceback"
    ) as told:
        command()
    kept = next(tmp_path.glob("adversa-traceback-*.txt"))
    assert str(kept) in str(told.value) and "raise KeyError" in kept.read_text()
