"""Paths on an object store (moto on loopback): names, refusals, faults."""

from __future__ import annotations

import importlib.util
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pytest

from adversa.engine import tasks
from adversa.pipeline import loop
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files, tables, weights
from adversa.storage.arrays import RoleArray
from adversa.storage.path import (
    BucketPath,
    StoreError,
    append,
    asking,
    move,
    names,
    rmtree,
    scratch,
    scrubbed,
    storage_path,
)
from adversa.types import Example, UserError

spec = importlib.util.spec_from_file_location("s3", Path(__file__).parents[1] / "s3.py")
s3 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(s3)

ROWS = pa.table(
    {"id": ["a", "b"], "kind": ["real", "real"], "label": [0, 1], "weight": [1.0, 0.5]},
    schema=tables.MIX,
)
URI = "s3://bucket/runs/ham?endpoint_override=127.0.0.1:9000&scheme=http"


# ---- names ---------------------------------------------------------------------------------------


def test_a_local_path_stays_pathlibs():
    assert storage_path("runs/demo") == Path("runs/demo") and isinstance(
        storage_path("file:///tmp/a%20b"), Path
    )
    assert str(storage_path("file:///tmp/a%20b")) == "/tmp/a b"
    assert storage_path(Path("x")) == Path("x")


def test_a_remote_place_has_the_names_that_pathlib_gives():
    here, like = storage_path(URI), PurePosixPath("/bucket/runs/ham")
    below, beside = here / "round-001" / "part-0.parquet", like / "round-001" / "part-0.parquet"
    assert (below.name, below.stem, below.suffix) == (beside.name, beside.stem, beside.suffix)
    assert (
        below.parent.name == "round-001"
        and below.parents[1] == here
        and below.parent.parent == here
    )
    assert (
        str(below.relative_to(here)) == str(beside.relative_to(like))
        and below.is_relative_to(here)
        and not here.is_relative_to(below)
    )
    assert not below.is_relative_to(Path.cwd()) and below.with_suffix(".csv").name == "part-0.csv"
    assert below.with_name("x") == below.parent / "x" and here.absolute() == here.resolve() == here
    assert sorted([here / "b", here / "a"]) == [here / "a", here / "b"]
    with pytest.raises(ValueError):
        below.relative_to(storage_path("s3://other/runs/ham"))


def test_a_remote_place_is_its_uri_and_travels_by_it():
    here = storage_path(URI)
    assert (
        storage_path(str(here)) == here
        and hash(storage_path(str(here))) == hash(here)
        and storage_path(str(here / "a")) == here / "a"
    )
    assert pickle.loads(pickle.dumps(RunDir(here))) == RunDir(here)
    assert (
        here != storage_path("s3://bucket/runs/ham")
        and str(storage_path("s3://bucket")) == "s3://bucket"
    )
    with pytest.raises(TypeError):  # never mistaken for a local path
        open(here)  # noqa: SIM115
    with pytest.raises(TypeError):
        Path(here)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"s3://{s3.KEY}:{s3.SECRET}@bucket/x", "must not carry credentials"),
        (f"s3://{s3.KEY}@bucket/x", "must not carry credentials"),
        (f"abfs://box:{s3.SECRET}@account/x", "must not carry credentials"),
        (f"s3://bucket/x?access_key={s3.KEY}&secret_key={s3.SECRET}", "unknown option access_key"),
        (f"s3://bucket/x?{s3.KEY}", "unknown option (not a name)"),
        (f"s3://bucket/x?endpoint_override=u:{s3.SECRET}@host", "has an @"),
        ("gs://bucket/x?endpoint_override=evil.org", "your token is not sent"),
        ("gs://bucket/x?endpoint_override=evil.org/a.googleapis.com", "your token is not sent"),
        ("gs://bucket/x?endpoint_override=evilgoogleapis.com", "STORAGE_EMULATOR_HOST"),
        ("gs://bucket/x?endpoint_override=storage.googleapis.com&scheme=http", "not sent"),
        ("az://box/x?endpoint_override=evil.org", "AZURE_STORAGE_CONNECTION_STRING"),
        ("az://box/x?account_name=evil.org/", "account_name must be letters and digits"),
        ("abfs://box@evil#/x", "account_name must be letters and digits"),
        ("s3:///x", "names no bucket"),
        ("hdfs://host/x", "an object store (s3://, gs://"),
    ],
)
def test_an_address_that_cannot_be_used_or_carries_credentials_is_refused_without_showing_them(
    text, says
):
    with pytest.raises(UserError) as e:
        storage_path(text)
    shown = str(e.value)
    assert says in shown and s3.KEY not in shown and s3.SECRET not in shown and "\n" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "gs://bucket/x?endpoint_override=storage.googleapis.com",
        "gs://bucket/x?endpoint_override=127.0.0.1:9000&scheme=http",
        "az://box/x?endpoint_override=me.blob.core.windows.net",
        "s3://bucket/x?endpoint_override=minio.example.org:9000&scheme=http",
    ],
)
def test_an_endpoint_that_a_token_is_for_or_that_is_sent_none(text):
    assert str(storage_path(text)) == text


def test_the_command_line_keeps_both_slashes_and_shows_no_credentials(adversa, monkeypatch):
    from adversa.cli.options import run_path

    assert run_path("s3://bucket/x") == storage_path("s3://bucket/x") and run_path(
        "runs/x"
    ) == Path("runs/x")
    for command in (["status"], ["report"], ["predict"], ["loop", "--run-dir"]):
        done = adversa(*command, f"s3://{s3.KEY}:{s3.SECRET}@bucket/x")
        assert (
            done.exit_code == 2
            and "must not carry" in done.output
            and s3.SECRET not in done.output
            and s3.KEY not in done.output
        )


# ---- what lies there -----------------------------------------------------------------------------


def test_files_and_folders_behave_as_pathlibs(store):
    for name in ("a/b.json", "a/c.parquet", "round-001/hard/x", "round-002/verdicts/x"):
        (store / name).write_bytes(name.encode())
    assert (
        (store / "a/b.json").read_text() == "a/b.json"
        and (store / "a/b.json").is_file()
        and not (store / "a/b.json").is_dir()
    )
    assert (store / "a").is_dir() and (store / "a").exists() and not (store / "z").exists()
    assert [p.name for p in store.iterdir()] == ["a", "round-001", "round-002"]
    assert list(store.glob("a/*.json")) == [store / "a/b.json"] and list(
        store.glob("round-*/hard")
    ) == [store / "round-001/hard"]
    assert list(store.glob("*/*/x")) == [store / "round-001/hard/x", store / "round-002/verdicts/x"]
    assert (
        list(store.rglob("x")) == list(store.glob("*/*/x")) and list((store / "z").glob("*")) == []
    )
    assert names(store / "a") == {"b.json", "c.parquet"} and names(store / "z") == set()
    append(store / "log", "1\n"), append(store / "log", "2\n")
    assert (store / "log").read_text() == "1\n2\n"
    for call in (
        (store / "z").read_bytes,
        (store / "z").unlink,
        lambda: list((store / "z").iterdir()),
        lambda: rmtree(store / "z"),
    ):
        with pytest.raises(FileNotFoundError) as e:
            call()
        assert e.value.filename == str(store / "z")
    (store / "z").unlink(missing_ok=True), rmtree(store / "z", missing_ok=True)
    (store / "a/b.json").unlink()
    assert names(store / "a") == {"c.parquet"}
    rmtree(store / "a")
    assert not list(store.rglob("c.parquet"))


def test_a_folder_is_moved_file_by_file_and_a_cut_move_goes_on(store, monkeypatch):
    for name in ("opened.json", "part-0", "part-1", "sub/x"):
        (store / "test" / name).write_bytes(name.encode())
    real, done = BucketPath.fs.fget, []

    def cut(self):
        if self.name == "part-1" and not done:
            done.append(self)
            raise StoreError("cut; again")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(BucketPath, "fs", property(cut))
        with pytest.raises(StoreError):
            move(store / "test", store / "kept", "opened.json")
    assert names(store / "test") == {"opened.json", "part-1", "sub"} and names(store / "kept") == {
        "part-0"
    }
    move(store / "test", store / "kept", "opened.json")
    assert (
        names(store / "kept") == {"opened.json", "part-0", "part-1", "sub"}
        and names(store / "test") == set()
    )


def test_parts_models_and_training_states_read_back(store):
    import torch

    tables.write_part(store / "x" / tables.part_name(1), ROWS)
    tables.write_part(store / "x" / tables.part_name(0), ROWS)
    assert [p.name for p in tables.parts(store / "x")] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert (
        tables.read(store / "x").equals(pa.concat_tables([ROWS, ROWS]))
        and tables.count(store / "x" / tables.part_name(0)) == 2
    )
    assert tables.read_part(
        store / "x" / tables.part_name(0), ["label"], [("id", "in", ["b"])]
    ).to_pylist() == [{"label": 1}]
    assert [b.num_rows for b in tables.batches(store / "x" / tables.part_name(0), ["id"], 1)] == [
        1,
        1,
    ]
    state = {"w": torch.arange(6.0).reshape(2, 3)}
    fingerprint = weights.save_model(store / "m", state, {"a": 1})
    again, config, same = weights.read_model(store / "m")
    assert torch.equal(again["w"], state["w"]) and config == {"a": 1} and same == fingerprint
    weights.save_checkpoint(store / "m", {"step": 7, "w": state["w"]})
    assert weights.committed_step(store / "m") == 7 and torch.equal(
        weights.load_checkpoint(store / "m")["w"], state["w"]
    )
    weights.drop_checkpoint(store / "m")
    assert weights.load_checkpoint(store / "m") is None and weights.committed_step(store / "m") == 0
    with pytest.raises(UserError, match="holds no model"):
        weights.read_model(store / "none")


@pytest.mark.parametrize("limit", ["1", "0"])
def test_images_are_fetched_once_a_machine(store, proxy, tmp_path, monkeypatch, limit):
    monkeypatch.setenv("ADVERSA_CACHE", str(tmp_path))
    monkeypatch.setenv("ADVERSA_CACHE_GB", limit)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    for k in range(3):
        some = [
            Example(f"r{i}", "s", 0, "g", "", {}, tables.encode_png(images[i]))
            for i in (2 * k, 2 * k + 1)
        ]
        path = store / "data/train" / tables.part_name(k)
        tables.write_part(path, tables.to_table(some, tables.EXAMPLES))
    step_folder.finish(store / "data", step_folder.Recipe("prepare", 1, {}, {}))
    for _ in range(2):
        before = proxy.count("GET", ".parquet")
        array = RoleArray(store / "data/train")
        assert np.array_equal(array.take(np.array([5, 0, 3])), images[[5, 0, 3]])
        assert [i.decode() for i in array.ids] == [f"r{i}" for i in range(6)]
    assert (proxy.count("GET", ".parquet") == before) == (limit == "1")


def test_of_many_that_create_a_file_at_the_same_time_one_succeeds(store):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: files.create_json(store / "x.json", {"by": i}), range(8)))
    assert sum(made) == 1 and files.read_json(store / "x.json") == {"by": made.index(True)}
    assert not files.create_json(store / "x.json", {"by": 9})


def test_scratch_files_are_local(store, tmp_path):
    with scratch(tmp_path) as here:
        assert here == tmp_path
    with scratch(store) as here:
        assert here.is_dir() and isinstance(here, Path)
    assert not here.exists()


def test_listings_do_not_grow_with_the_files(store, proxy):
    out = store / "out"
    for i in range(12):
        tables.write_part(out / tables.part_name(i), ROWS)
    for call, lists in (
        (lambda: tasks.missing([tasks.Part(i, 2) for i in range(20)], out), 1),
        (lambda: tables.read(out), 1),
        (lambda: list(store.glob("*/*.parquet")), 2),
        (lambda: list(store.rglob("part-*")), 1),
    ):
        before = proxy.count("GET", "list-type")
        call()
        assert proxy.count("GET", "list-type") - before == lists


# ---- faults --------------------------------------------------------------------------------------


def test_a_put_that_fails_once_is_made_again(store, proxy):
    proxy.fault = lambda method, path, before: 500 if method == "PUT" and before == 0 else None
    tables.write_part(store / tables.part_name(0), ROWS)
    assert tables.read(store).equals(ROWS)


def test_a_put_that_fails_for_ever_is_one_line_and_leaves_the_old_file(store, proxy):
    files.write_json(store / "a.json", {"old": 1})
    proxy.fault = lambda method, path, before: 500 if method == "PUT" else None
    with pytest.raises(UserError) as e, files.writing(store):
        files.write_json(store / "a.json", {"new": 1})
    assert "a.json" in s3.one_line(e) and "run the same command again" in str(e.value)
    with pytest.raises(UserError), files.writing(store):
        tables.write_part(store / tables.part_name(0), ROWS)
    proxy.fault = s3._none
    assert files.read_json(store / "a.json") == {"old": 1} and tables.parts(store) == []


def test_a_connection_cut_within_a_put_leaves_no_object(store, proxy):
    data = np.random.default_rng(0).bytes(200_000)
    proxy.fault = lambda method, path, before: "cut" if method == "PUT" else None
    with pytest.raises(StoreError, match="cannot be reached") as e:
        (store / "x").write_bytes(data)
    s3.one_line(e)
    proxy.fault = s3._none
    assert not (store / "x").exists() and names(store) == set()
    proxy.fault = lambda method, path, before: "cut" if method == "PUT" and before < 5 else None
    (store / "x").write_bytes(data)
    assert (store / "x").read_bytes() == data


def test_of_a_large_file_whose_second_half_cannot_be_put_nothing_is_there(store, proxy):
    data = bytes(101 << 20)  # s3fs puts it in parts of 50 MiB
    proxy.fault = lambda method, path, before: 500 if "partNumber=2" in path else None
    with pytest.raises(StoreError) as e:
        (store / "x").write_bytes(data)
    s3.one_line(e)
    assert not (store / "x").exists() and names(store) == set()
    proxy.fault = s3._none
    (store / "x").write_bytes(data)
    assert (store / "x").read_bytes() == data


def test_what_is_interrupted_while_it_puts_ends_with_the_whole_file(store, proxy):
    """As by Ctrl-C: sent to a process of its own while the store takes its time with the answer."""
    proxy.fault = lambda method, path, before: 3.0 if method == "PUT" else None
    code = (
        "import os, signal, sys, threading; from adversa.storage.path import storage_path; p = "
        "storage_path(sys.argv[1]); list(p.glob('*'))\n"
        # a shell starts what is in the background without
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try: p.write_bytes(b'x' * 1000)\n"
        "except KeyboardInterrupt: print(len(p.read_bytes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store / "x")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "1000\n", done.stderr


def test_a_slow_listing_is_waited_for(store, proxy):
    tables.write_part(store / tables.part_name(0), ROWS)
    proxy.fault = lambda method, path, before: 5.0 if "list-type" in path else None
    before = proxy.count("GET", "list-type")
    assert len(tables.parts(store)) == 1 and proxy.count("GET", "list-type") - before == 1


def test_what_a_store_refuses_is_one_line_with_what_to_do(store, proxy, tiny):
    proxy.fault = lambda method, path, before: 403
    with pytest.raises(
        UserError, match=r"access denied in \w+; the credentials of the environment"
    ) as e:
        loop.open_run(tiny(), store)
    s3.one_line(e)
    proxy.fault = s3._none
    with pytest.raises(UserError, match="there is no such bucket in PutObject; make it") as e:
        loop.open_run(tiny(), s3.address(proxy, "x", bucket="no-such-bucket"))
    s3.one_line(e)
    with pytest.raises(UserError, match="cannot be reached; look at the network") as e:
        loop.open_run(
            tiny(), storage_path("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http")
        )
    s3.one_line(e)


def test_without_credentials_one_line_says_where_they_go(store, monkeypatch, tmp_path):
    for name in s3.ENVIRONMENT:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    elsewhere = storage_path(f"{store}&region=eu-west-1")  # whose client has not seen any yet
    with pytest.raises(StoreError, match="there are no credentials; set the credentials of") as e:
        elsewhere.write_bytes(b"1")
    s3.one_line(e)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError("x"), "access denied"),
        (ConnectionResetError("x"), "cannot be reached"),
        (OSError(f"at https://u:{s3.SECRET}@host {s3.KEY}"), "https://***@host ***"),
    ],
)
def test_a_fault_of_a_client_is_one_line_without_secrets(error, says, proxy):
    with pytest.raises(StoreError, match=re.escape(says)) as e, asking(storage_path(URI)):
        raise error
    s3.one_line(e)


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        *("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING"),
        *("AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET"),
    ],
)
def test_a_credential_of_the_environment_is_known_whatever_it_looks_like(monkeypatch, name):
    monkeypatch.setenv(name, "minio-admin")
    assert scrubbed("refused:\n'minio-admin'") == "refused: '***'"


def test_an_azure_address_names_container_and_account():
    where = storage_path("abfs://box@account.dfs.core.windows.net/runs/x")
    assert str(where) == "abfs://box/runs/x?account_name=account"
    assert storage_path(str(where)) == where and where.parent.parent.name == ""


def test_the_endpoint_may_stand_in_the_environment(store, proxy, monkeypatch):
    (store / "x").write_bytes(b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.at}")
    assert storage_path(f"s3://{s3.BUCKET}/{store.path.partition('/')[2]}/x").read_bytes() == b"1"


def test_services_that_write_piece_by_piece_are_refused(store):
    from adversa.run import tracking

    with pytest.raises(UserError, match="object store; leave it out") as e:
        tracking.Follow(["tensorboard"], store)
    assert "tensorboard" in s3.one_line(e)
