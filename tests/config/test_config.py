"""The border where a user's YAML enters."""

from __future__ import annotations

import pytest
import yaml

from adversa import config
from adversa.types import UserError

CONFIGS = sorted((config.packaged("demo.yaml").parent).glob("*.yaml"))


def fault(tree):
    with pytest.raises(UserError) as e:
        config.check(tree, "my.yaml")
    assert "\n" not in str(e.value)
    return str(e.value)


def written(folder, text):
    (folder / "c.yaml").write_text(text)
    return folder / "c.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_packaged_configurations_are_valid_once_they_have_a_path(path):
    source = (yaml.safe_load(path.read_text()).get("data") or {}).get("source", "phantom")
    config.load(path, [] if source == "phantom" else ["data.path=somewhere"])


def test_a_dumped_configuration_reads_back_as_itself(tmp_path):
    c = config.check(
        {"seed": 3, "data": {"resolution": 64}, "curate": {"judge": {"steps": 7}}}, "x"
    )
    assert config.load(written(tmp_path, config.dump(c))) == c


@pytest.mark.parametrize(
    ("tree", "key", "near"),
    [
        ({"data": {"resolutoin": 64}}, "data.resolutoin", "data.resolution"),
        ({"clasifier": {}}, "clasifier", "classifier"),
        ({"data": {"split": {"tets": 0.1}}}, "data.split.tets", "data.split.test"),
        ({"lr": 1}, "lr", "classifier.lr"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tree, key, near):
    assert f"unknown key {key}; did you mean {near}?" in fault(tree)


def test_every_fault_is_told_at_once_with_its_value():
    text = fault({"data": {"resolution": 33}, "mine": {"budget": -2}, "bogus_key": 1})
    assert text.startswith("my.yaml: ")
    assert "data.resolution = 33" in text and "mine.budget = -2" in text and "bogus_key" in text


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"data": {"source": "folder"}}, "data.path is missing"),
        ({"data": {"split": {"train": 0.9}}}, "add up to 1"),
        ({"mix": {"arms": ["guided"]}}, "must contain real"),
        ({"generate": {"sigma_start": 99}}, "sigma_start 99"),
        ({"generate": {"sigma_min": 50}}, "sigma_min 50"),
        (
            {
                "data": {"resolution": 40},
                "denoiser": {"architecture": "unet", "patch": 2, "channels": [8, 8, 8, 8]},
            },
            "multiple of",
        ),
        ({"classifier": {"lr": float("nan")}}, "classifier.lr"),
    ],
)
def test_values_that_do_not_go_together(tree, text):
    assert text in fault(tree)


def test_set_overrides_and_is_parsed_as_yaml(tmp_path):
    path = written(tmp_path, "data: {resolution: 32}\nclassifier:\n")
    sets = [
        "data.resolution=64",
        "classifier.lr=1e-4",
        "mix.arms=[real, guided]",
        "classifier.weights=null",
    ]
    c = config.load(path, sets, seed=5)
    assert (c.data.resolution, c.classifier.lr, c.mix.arms, c.classifier.weights, c.seed) == (
        64,
        1e-4,
        ["real", "guided"],
        None,
        5,
    )


def test_an_option_of_0_overrides_the_file(tmp_path):
    assert config.load(written(tmp_path, "seed: 3\n"), seed=0).seed == 0


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.resolution", "write key.sub=value"),
        ("=3", "write key.sub=value"),
        ("seed.sub=3", "seed is not a section"),
        ("data.path=[", "not valid YAML"),
        ("data.resolutoin=64", "did you mean data.resolution"),
    ],
)
def test_a_bad_set(tmp_path, override, text):
    with pytest.raises(UserError, match=text):
        config.load(written(tmp_path, "seed: 1\n"), [override])


SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    "value",
    [
        f"s3://AKIA:{SECRET}@b/w",
        f"s3://AKIA:K7/{SECRET}@b/w",
        f"s3:/{SECRET}@b/w",
        f"abfs://box:{SECRET}@account/w",
        f"https://user:{SECRET}@h/x",
        f"https://{SECRET}@h/x",
        f"s3://b/w?token={SECRET}",
        f"https://h/x?a=b&X-Amz-Signature={SECRET}",
        f"https://h/x?secret_key={SECRET}",
        f"https://h/x?sv=1&sig={SECRET}",
    ],
)
@pytest.mark.parametrize(
    "key", ["classifier.weights", "denoiser.external", "data.path", "curate.judge.weights", "nokey"]
)
def test_credentials_in_a_setting_are_refused_and_not_shown(tmp_path, key, value):
    tree = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    path = written(tmp_path, yaml.safe_dump(tree))
    for read in (
        lambda: config.load(path),
        lambda: config.load(None, [f"{key}={value}"]),
        lambda: config.check(tree, "here"),
    ):
        with pytest.raises(UserError, match=f"{key} carries credentials; take them out") as told:
            read()
        assert SECRET not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "setting",
    [
        f"s3://AKIA:{SECRET}.x@b/w",
        f"s3://AKIA:{SECRET}.x@b/w=3",
        f"classifier.model_args={{a: ['https://u:{SECRET}@h']}}",
        f"data.path=[s3://AKIA:{SECRET}@b",
        f"seed.x=https://h?token={SECRET}",
    ],
)
def test_credentials_in_a_bad_setting_are_not_shown(tmp_path, setting):
    said = []
    for write in (lambda: None, lambda: (tmp_path / "c.yaml").write_text(f"a: ['{setting}")):
        write()
        path = tmp_path / "c.yaml"
        with pytest.raises(UserError) as told:
            config.load(path if path.exists() else None, [] if path.exists() else [setting])
        said.append(str(told.value))
    assert "carries credentials" in said[0] and "is not valid YAML" in said[1]
    assert not any(SECRET in line for line in said)


@pytest.mark.parametrize(
    "path",
    ["s3://b/a@1/x", "s3://b:9000/a@1", "abfs://box@account/x", "https://h/x?b=1", "a:b@c", "/a@b"],
)
def test_an_at_sign_is_no_credential(path):
    assert config.check({"classifier": {"weights": path}}, "").classifier.weights == path


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- a\n- b\n", "holds a list"),
        ("a: [", "not valid YAML"),
        ("\xff\xfe", "cannot read|not valid YAML|unknown|holds a str"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, what):
    (tmp_path / "c.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=what):
        config.load(tmp_path / "c.yaml")


def test_no_file_a_folder_and_an_empty_file(tmp_path):
    with pytest.raises(UserError, match="no configuration at"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot read"):
        config.load(tmp_path)
    assert config.load(written(tmp_path, "")) == config.Config()


def test_keys_names_every_section_and_leaf():
    keys = config.keys()
    assert {"seed", "data", "data.split.test", "curate.judge.lr", "cluster.attempts"} <= set(keys)
    for section in (
        "data",
        "classifier",
        "denoiser",
        "mine",
        "generate",
        "curate",
        "mix",
        "evaluate",
        "cluster",
    ):
        assert section in keys


def test_another_model_does_not_get_the_default_models_arguments():
    assert config.check({"classifier": {"model": "resnet18"}}, "x").classifier.model_args == {}
    given = config.check(
        {"classifier": {"model": "resnet18", "model_args": {"drop_rate": 0.1}}}, "x"
    )
    assert given.classifier.model_args == {"drop_rate": 0.1}


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"mix": {"arms": ["real", "guided", "real"]}}, "names an arm twice"),
        ({"mix": {"arms": ["guided"]}}, "must contain real"),
        ({"denoiser": {"architecture": "unet", "channels": [12, 16]}}, "multiples of 8"),
        (
            {"denoiser": {"channels": [8, 16]}},
            "channels .8, 16. belongs to architecture unet, this is transformer",
        ),
        (
            {"denoiser": {"architecture": "unet", "depth": 3}},
            "depth 3 belongs to architecture transformer, this is unet",
        ),
        ({"classifier": {"first_size": 48}}, "first_size 48 is above data.resolution 32"),
        (
            {"classifier": {"first_size": 80, "input_size": 64}},
            "first_size 80 is above classifier.input_size 64",
        ),
        (
            {"classifier": {"first_size": 16}, "data": {"resolution": 64}},
            "first_size 16 is below half of data.resolution 64",
        ),
        ({"classifier": {"first_size": 16, "augment": None}}, "first_size needs augmentation"),
        ({"classifier": {"first_size": 24}}, "classifier.first_size 24 must be a multiple of 16"),
        (
            {"mine": {"scorer": "bald"}},
            "mine.scorer bald measures how seeds disagree; set evaluate.seeds 1 to 2 or more",
        ),
        (
            {"curate": {"judge": {"first_size": 24}}},
            "curate.judge.first_size 24 must be a multiple of 16",
        ),
        (
            {"classifier": {"weights": "x", "head_steps": 600}},
            "classifier.head_steps 600 leaves none of classifier.steps 600",
        ),
        (
            {"curate": {"judge": {"weights": "x", "head_steps": 7, "steps": 7}}},
            "curate.judge.head_steps 7 leaves none of",
        ),
        (
            {"classifier": {"head_steps": 3}},
            "classifier.head_steps 3 keeps what pretrained layers know.*weights is null",
        ),
        (
            {"classifier": {"layer_decay": 0.9}},
            "classifier.layer_decay 0.9 keeps .*give weights, or leave layer_decay out",
        ),
        (
            {"curate": {"judge": {"freeze_norm": True}}},
            "curate.judge.freeze_norm true keeps .*curate.judge.weights is null",
        ),
        (
            {"denoiser": {"null_probability": 0}},
            r"null_probability 0 .* generate.guidance 2 steers .* set generate.guidance=1",
        ),
        (
            {
                "denoiser": {"null_probability": 0},
                "generate": {"guidance": 1},
                "quality": {"guidance": 1.5},
            },
            "null_probability 0 .* quality.guidance 1.5",
        ),
        (
            {"cluster": {"training_workers": 65}},
            "classifier.batch_size 64 cannot be shared among cluster.training_workers 65",
        ),
        (
            {"curate": {"judge": {"batch_size": 2}}, "cluster": {"training_workers": 3}},
            "curate.judge.batch_size 2 cannot be",
        ),
        (
            {"denoiser": {"batch_size": 2}, "cluster": {"training_workers": 3}},
            "denoiser.batch_size 2 cannot be shared",
        ),
        (
            {"codec": {"kind": "tiny", "batch_size": 2}, "cluster": {"training_workers": 3}},
            "codec.batch_size 2 cannot be shared",
        ),
        ({"codec": {"kind": "kl"}}, "kind kl needs a path"),
        ({"codec": {"path": "x"}}, "path x is given, but kind is pixels"),
        (
            {"codec": {"kind": "tiny", "halvings": 4}},
            "data.resolution 32, its latents' side 2, must be a multiple of .* = 4",
        ),
        (
            {"codec": {"kind": "tiny", "halvings": 5}, "data": {"resolution": 48}},
            "must be a multiple of 2.codec.halvings = 32",
        ),
        (
            {"codec": {"kind": "tiny"}, "denoiser": {"weights": "phantom"}},
            "weights phantom is for codec.kind pixels",
        ),
        (
            {"codec": {"kind": "tiny"}, "denoiser": {"external": "x"}},
            "give its autoencoder as codec.path",
        ),
        ({"denoiser": {"external": "x", "weights": "y"}}, "external x is used as it is"),
        (
            {"data": {"source": "csv", "path": "x"}, "denoiser": {"weights": "phantom"}},
            "weights phantom is for data.source phantom",
        ),
    ],
)
def test_settings_that_do_not_go_together(tree, text):
    with pytest.raises(UserError, match=text):
        config.check(tree, "x")


@pytest.mark.parametrize(
    "tree",
    [
        {"classifier": {"weights": "x", "head_steps": 3, "layer_decay": 0.9, "freeze_norm": True}},
        {"classifier": {"first_size": 32}, "data": {"resolution": 32}},
        {"denoiser": {"null_probability": 0}, "generate": {"guidance": 1}},
        {
            "denoiser": {"null_probability": 0, "weights": "x"}
        },  # what it starts from may know the null class
        {"denoiser": {"null_probability": 0}, "mix": {"arms": ["real"]}},
        {
            "denoiser": {"batch_size": 2},
            "mix": {"arms": ["real"]},
            "cluster": {"training_workers": 3},
        },
        {"denoiser": {"batch_size": 2, "external": "x"}, "cluster": {"training_workers": 3}},
        {"codec": {"batch_size": 2}, "cluster": {"training_workers": 3}},
    ],
)
def test_what_is_not_used_or_goes_together_is_not_refused(tree):
    config.check(tree, "x")


def test_one_tracker_needs_no_list(tmp_path):
    assert config.check({"tracking": "tensorboard"}, "x").tracking == ["tensorboard"]
    assert config.load(written(tmp_path, "tracking: []"), ["tracking=wandb"]).tracking == ["wandb"]
    assert "tracking" in fault({"tracking": "tensorbord"})


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("classifier.amp=maybe", "classifier.amp = 'maybe': give auto, true or false"),
        ("denoiser.amp=1", "denoiser.amp = 1: give auto, true or false"),
        ("curate.judge={amp: x}", "curate.judge.amp = 'x': give auto, true or false"),
        ("sweep.real=[x]", "sweep.real.0 = 'x': give a whole number of at least 1, or all"),
        ("sweep.real=[0]", "sweep.real.0 = 0: give a whole number of at least 1, or all"),
    ],
)
def test_a_value_or_a_word_has_one_fault(setting, said):
    with pytest.raises(UserError) as told:
        config.load(None, [setting])
    assert str(told.value).endswith(said)
