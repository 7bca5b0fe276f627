"""The cluster files that are shipped, against Ray's own schema; and reading them, also where they
are wrong or hostile.
"""

from __future__ import annotations

import copy
import ipaddress
import re
from pathlib import Path

import pytest
import yaml

from adversa.config import Cluster, load
from adversa.distributed import cluster_file
from adversa.distributed.cluster_file import Asks
from adversa.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "cluster"
LAUNCHER = ("local", "gpu", "gcp")

MINIMAL = """
cluster_name: mine
provider: {type: local, head_ip: 127.0.0.1, worker_ips: [127.0.0.2]}
metadata:
  owner: somebody
  adversa: {ASKS}
"""


def tree_of(name: str) -> dict:
    return yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return write


def asking(asks: str) -> str:
    return MINIMAL.replace("{ASKS}", asks)


# ---- what is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_shipped_file_is_what_ray_up_takes(name):
    """As `ray up` does it before it calls a cloud: defaults filled in, then Ray's schema and its
    other rules.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    tree = tree_of(name)
    validate_config(prepare_config(copy.deepcopy(tree)))
    with pytest.raises(Exception, match="surplus"):  # the schema does look at names
        validate_config(prepare_config(tree | {"surplus": {}}))


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_shipped_file_mounts_what_a_checkout_has_and_installs_it(name):
    tree = tree_of(name)
    mounted = {local for local in tree["file_mounts"].values() if not local.startswith("~")}
    assert mounted == {"pyproject.toml", "README.md", "adversa", "configs"} and all(
        (ROOT / f).exists() for f in mounted
    )
    assert any(
        "pip install" in command and "adversa-source" in command
        for command in tree["setup_commands"]
    )


def test_images_have_the_ray_that_is_asked_for():
    """One minor version on both sides, or the jobs client refuses the cluster."""
    import ray

    minor = ".".join(ray.__version__.split(".")[:2])
    said = [
        *(tree_of(name)["docker"]["image"] for name in ("gpu", "gcp")),
        (SHIPPED / "Dockerfile").read_text(),
    ]
    assert all(re.search(rf"rayproject/ray:{re.escape(minor)}\.\d+-py311", text) for text in said)
    assert tree_of("kuberay")["spec"]["rayClusterSpec"]["rayVersion"].startswith(f"{minor}.")


def conforms(value, fields, where="") -> list[str]:
    """What in a manifest is not in the list of fields, or is of another type, or is missing."""
    if isinstance(fields, dict):
        if not isinstance(value, dict):
            return [f"{where}: not a mapping"]
        known = {name.rstrip("!"): sub for name, sub in fields.items()}
        faults = [
            f"{where}: no {name[:-1]}"
            for name in fields
            if name.endswith("!") and name[:-1] not in value
        ]
        for key, item in value.items():
            sub = known.get(key, known.get("*"))
            faults += (
                [f"{where}.{key}: unknown"]
                if sub is None
                else conforms(item, sub, f"{where}.{key}")
            )
        return faults
    if isinstance(fields, list):
        return (
            ["not a list"]
            if not isinstance(value, list)
            else [f for v in value for f in conforms(v, fields[0], f"{where}[]")]
        )
    kinds = {"string": str, "integer": int, "boolean": bool}
    return [] if type(value) is kinds[fields] else [f"{where}: {value!r} is no {fields}"]


def test_the_kuberay_manifest_uses_fields_of_its_crd():
    fields = yaml.safe_load((ROOT / "tests" / "kuberay_fields.yaml").read_text())
    manifest = tree_of("kuberay")
    assert conforms(manifest, fields) == []
    manifest["spec"]["rayClusterSpec"]["workerGroupSpec"] = []
    del manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert len(conforms(manifest, fields)) == 2


def test_the_kuberay_entrypoint_is_a_command_of_ours():
    import shlex

    words = shlex.split(tree_of("kuberay")["spec"]["entrypoint"])
    assert (
        words[:2] == ["adversa", "loop"]
        and (ROOT / words[2].removeprefix("/home/ray/adversa-source/")).is_file()
    )
    assert words[words.index("--run-dir") + 1].startswith(
        cluster_file.read(SHIPPED / "kuberay.yaml").asks.run_storage + "/"
    )
    settings = [word for flag, word in zip(words, words[1:], strict=False) if flag == "--set"]
    data = [s for s in settings if s.startswith("data.path=")]
    assert len(data) == 1 and data[0].removeprefix("data.path=").startswith(
        "/"
    )  # where the claim has it
    assert set(settings) - set(data) <= set(
        cluster_file.overrides(cluster_file.read(SHIPPED / "kuberay.yaml").asks)
    )


# ---- security of what is shipped -----------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_dashboard_stays_on_loopback_and_ray_asks_for_a_token(name):
    from ray.autoscaler._private.util import prepare_config

    tree = prepare_config(
        tree_of(name)
    )  # with Ray's defaults, which for clouds open the dashboard to all interfaces
    heads = [command for command in tree["head_start_ray_commands"] if "ray start" in command]
    starts = heads + [
        command for command in tree["worker_start_ray_commands"] if "ray start" in command
    ]
    assert len(heads) == 1 and re.findall(r"--dashboard-host=(\S+)", heads[0]) == ["127.0.0.1"]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert any(remote.endswith("/.ray/auth_token") for remote in tree["file_mounts"])


@pytest.mark.parametrize("name", [*LAUNCHER, "kuberay"])
def test_no_file_opens_a_port_to_the_world(name):
    def texts(value):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from texts(key)
                yield from texts(item)
        elif isinstance(value, list):
            for item in value:
                yield from texts(item)
        else:
            yield str(value)

    found = " ".join(texts(tree_of(name)))
    for world in (
        "0.0.0.0",
        "::/0",
        "LoadBalancer",
        "NodePort",
        "Ingress",
        "enableIngress",
        "privileged",
        "--privileged",
    ):
        assert world not in found, f"{name}: {world}"
    assert "IpPermissions" not in found
    for address in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", found):
        assert ipaddress.ip_address(address).is_private


@pytest.mark.parametrize("name", [*LAUNCHER, "kuberay"])
def test_no_file_hands_a_port_of_a_container_to_its_host_or_opens_rays_client_server(name):
    text = "\n".join(
        line.partition("#")[0] for line in (SHIPPED / f"{name}.yaml").read_text().splitlines()
    )
    for opened in (
        "hostPort",
        "hostNetwork",
        "externalIPs",
        "--publish",
        "--network",
        "ray-client-server-port",
        "10001",
    ):
        assert opened not in text, f"{name}: {opened}"
    assert (
        not re.search(r"(?<![\w-])-[pP] ", text)
        and "EXPOSE" not in (SHIPPED / "Dockerfile").read_text()
    )
    assert set(re.findall(r"dashboard-host[=: ]+(\S+)", text)) <= {"127.0.0.1"}


def test_the_image_is_not_root_and_copies_nothing_but_the_source():
    lines = [
        line.split()
        for line in (SHIPPED / "Dockerfile").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    users = [words[1] for words in lines if words[0] == "USER"]
    copied = [
        word.rstrip("/")
        for words in lines
        if words[0] in ("COPY", "ADD")
        for word in words[1:-1]
        if not word.startswith("--")
    ]
    assert users == ["ray"] and set(copied) == {"pyproject.toml", "README.md", "adversa", "configs"}
    ignored = (SHIPPED / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*" and {word[1:] for word in ignored if word.startswith("!")} == set(
        copied
    )


def test_pods_are_not_root():
    spec = tree_of("kuberay")["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert all(
            c["securityContext"]["allowPrivilegeEscalation"] is False for c in pod["containers"]
        )


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind, provider, workers",
    [
        ("local", "ray", "local", 2),
        ("gpu", "ray", "aws", 1),
        ("gcp", "ray", "gcp", 1),
        ("kuberay", "kuberay", "kuberay", 0),
    ],
)
def test_a_shipped_file_is_read(name, kind, provider, workers):
    found = cluster_file.read(SHIPPED / f"{name}.yaml")
    assert (found.kind, found.provider, found.workers) == (kind, provider, workers)
    assert found.name and found.asks.training_workers_min == 1
    config = load(None, cluster_file.overrides(found.asks))
    assert config.cluster.training_workers == found.asks.training_workers


def test_what_a_file_asks_for_becomes_settings(written):
    asks = cluster_file.read(
        written(asking("{samplers: 3, gpus_per_sampler: 0.5, sampler_threads: 2}"))
    ).asks
    assert cluster_file.overrides(asks) == [
        "cluster.samplers=3",
        "cluster.gpus_per_sampler=0.5",
        "cluster.sampler_threads=2",
    ]
    section = load(None, cluster_file.overrides(asks)).cluster
    assert (section.samplers, section.gpus_per_sampler, section.sampler_threads) == (3, 0.5, 2)


def test_a_file_that_asks_for_nothing_changes_nothing(written):
    for text in ("cluster_name: a\nprovider: {type: aws}\n", asking("null"), asking("{}")):
        found = cluster_file.read(written(text))
        assert found.asks == Asks() and cluster_file.overrides(found.asks) == []


def test_the_ranges_are_those_of_the_configuration():
    for key in cluster_file.SETTINGS:
        assert Asks.model_fields[key].metadata == Cluster.model_fields[key].metadata, key


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: [1", "is not valid YAML"),
        ("- 1", "holds a list"),
        ("just words", "holds a str"),
        ("", "has no provider.type"),
        ("cluster_name: a\n", "has no provider.type"),
        ("provider: {type: aws}\n", "has no cluster_name"),
        ("provider: aws\ncluster_name: a\n", "has no provider.type"),
        ("apiVersion: v1\nkind: Pod\n", "neither a file for `ray up` nor a KubeRay manifest"),
        (asking("{sampler: 3}"), "metadata.adversa: unknown key sampler; did you mean samplers?"),
        (asking("{colour: red}"), "unknown key colour; known: address, plain_http, run_storage, "),
        (asking("{samplers: 0}"), "samplers = 0: "),
        (asking("{gpus_per_sampler: -1}"), "gpus_per_sampler = -1: "),
        (asking("{samplers: many}"), "samplers = 'many': "),
        (asking("[1]"), "metadata.adversa must hold keys"),
        (
            asking("{run_storage: runs/here}"),
            "run_storage = 'runs/here': must be the same on every node",
        ),
        (
            asking("{address: 'ray://10.0.0.1:10001'}"),
            "must be the jobs server's URL, for example http://127.0.0.1:8265",
        ),
        (asking("{address: 'http://head:notaport'}"), "must be the jobs server's URL"),
        (
            asking("{address: 'http://bob:s3cr3t@head:8265'}"),
            "address carries credentials; take them out of the address",
        ),
        (
            asking("{address: 'http://t0ken@head:8265'}"),
            "address carries credentials; take them out of the address",
        ),
        ("metadata: 3\ncluster_name: a\nprovider: {type: aws}\n", "metadata must hold keys"),
        (
            "apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {annotations: {adversa: "
            "'samplers: ['}}\n",
            "adversa is not valid YAML",
        ),
        (
            "apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {annotations: {adversa: "
            "'samples: 1'}}\n",
            "did you mean samplers?",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(written, text, said):
    with pytest.raises(UserError) as told:
        cluster_file.read(written(text))
    assert said in str(told.value) and "\n" not in str(told.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no cluster file at .*nothing.yaml"):
        cluster_file.read(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="cannot read"):
        cluster_file.read(tmp_path)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {mark}']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]",
        "!!python/object/new:subprocess.Popen [['touch', '{mark}']]",
        "!!python/name:os.system",
    ],
)
def test_a_hostile_file_executes_nothing(written, tmp_path, tag):
    mark = tmp_path / "executed"
    hostile = tag.replace("{mark}", str(mark))
    for text in (
        f"cluster_name: {hostile}\nprovider: {{type: local}}\n",
        asking(f"{{samplers: {hostile}}}"),
    ):
        with pytest.raises(UserError, match="not valid YAML"):
            cluster_file.read(written(text))
    annotation = yaml.safe_dump({"adversa": f"samplers: {hostile}"})
    with pytest.raises(UserError, match="not valid YAML"):
        cluster_file.read(
            written(
                f"apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {{annotations: "
                f"{annotation.strip()}}}\n"
            )
        )
    assert not mark.exists()
