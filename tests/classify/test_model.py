from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from adversa.classify.model import build, load, to_pixels
from adversa.classify.score import forward, make_scorer
from adversa.config import Classifier
from adversa.storage.weights import save_model
from adversa.types import UserError

TINY = Classifier(model="test_resnet")


def images(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def saved(folder: Path, config: Classifier = TINY) -> Path:
    network = build(config, 5, 32)
    torch.nn.init.normal_(network.head.weight)
    save_model(
        folder,
        network.state_dict(),
        {"config": config.model_dump(), "num_classes": 5, "resolution": 32},
    )
    return folder


def test_pixels_are_the_same_numbers_in_another_order() -> None:
    x = images(2)
    pixels = to_pixels(x)
    assert pixels.shape == (2, 3, 32, 32) and pixels.is_contiguous(
        memory_format=torch.channels_last
    )
    assert pixels[1, 2, 3, 4] == torch.tensor(x[1, 3, 4, 2] / 255, dtype=torch.float32)
    x.flags.writeable = False
    assert torch.equal(to_pixels(x), pixels)


def test_normalises_by_the_models_own_statistics() -> None:
    network = build(Classifier(model="test_efficientnet"), 3, 32).eval()
    statistics = timm.data.resolve_model_data_config(network.trunk)
    pixels = to_pixels(images(2))
    mean, std = (torch.tensor(statistics[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.inference_mode():
        logits, embedding = network(pixels)
        assert torch.allclose(embedding, network.trunk((pixels - mean) / std), atol=1e-5)
        assert torch.allclose(logits, network.head(embedding)) and logits.shape == (2, 3)


def test_images_are_resized_to_input_size() -> None:
    seen = []
    network = build(TINY.model_copy(update={"input_size": 48}), 3, 32)
    network.trunk.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    network(to_pixels(images(2)))
    assert seen == [(2, 3, 48, 48)]


@pytest.mark.parametrize(
    "model", ["resnet10t", "tf_efficientnet_lite0", "tf_mobilenetv3_small_minimal_100"]
)
def test_resizing_is_the_models_own_interpolation(model: str) -> None:
    network = build(Classifier(model=model, model_args={}, input_size=64), 3, 48).eval()
    mode = timm.data.resolve_model_data_config(network.trunk)["interpolation"]
    pixels, seen = to_pixels(images(2, 48)), []
    network.trunk.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    network(pixels)
    resized = torch.nn.functional.interpolate(pixels, (64, 64), mode=mode, antialias=True).clamp(
        0, 1
    )
    assert mode in ("bicubic", "bilinear") and torch.allclose(
        seen[0], (resized - network.mean) / network.std, atol=1e-6
    )


def test_an_image_scores_the_same_whatever_its_neighbours(tmp_path: Path) -> None:
    x = images(70)
    score = make_scorer(saved(tmp_path), embed=True)
    logits, embedding = score(x)
    assert (
        logits.shape == (70, 5)
        and logits.dtype == embedding.dtype == np.float32
        and embedding.shape[1] > 5
    )
    order = np.random.default_rng(1).permutation(70)
    assert (score(x[order])[0] == logits[order]).all()
    assert (np.concatenate([score(x[i : i + 1])[0] for i in range(5)]) == logits[:5]).all()
    assert (score(x[60:])[1] == embedding[60:]).all()
    assert logits.std(0).min() > 0.01  # images do differ


def test_the_network_only_ever_sees_batches_of_one_shape() -> None:
    # The kernels, and with them the last bit, depend on the shape; whether a small network shows it
    # is luck.
    seen = []
    network = build(TINY, 5, 32).eval()
    network.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    for n in (1, 64, 70):
        assert len(forward(network, images(n), True)[0]) == n
    assert set(seen) == {(64, 3, 32, 32)}


@pytest.mark.parametrize("views", [1, 2, 4, 8])
def test_views_average_over_the_symmetries(tmp_path: Path, views: int) -> None:
    x = images(5)
    score = make_scorer(
        saved(tmp_path, TINY.model_copy(update={"views": views, "amp": False})), embed=True
    )
    network, *_ = load(tmp_path)
    mirrored = [x, x[:, :, ::-1], x[:, ::-1], x[:, ::-1, ::-1]]
    seen = [*mirrored, *(m.swapaxes(1, 2) for m in mirrored)][:views]
    alone = [forward(network, np.ascontiguousarray(v), False) for v in seen]
    for found, single in zip(score(x), zip(*alone, strict=True), strict=True):
        assert np.allclose(found, np.mean(single, 0), atol=1e-5)
    if views == 8:  # all of them: no symmetry makes a difference any more
        assert np.allclose(score(np.rot90(x, 1, (1, 2)).copy())[0], score(x)[0], atol=1e-5)


def test_scorer_without_embedding_and_without_images(tmp_path: Path) -> None:
    score = make_scorer(saved(tmp_path))
    assert score(images(3))[1].shape == (3, 0)
    assert score(images(0))[0].shape == (0, 5) and score(images(0))[1].shape == (0, 0)


def test_folder_gives_the_same_network_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build(TINY, 5, 32).eval()
    meta = {"config": TINY.model_dump(), "num_classes": 5, "resolution": 32}
    fingerprint = save_model(tmp_path, network.state_dict(), meta)
    before = torch.get_rng_state()
    again, found, again_fingerprint = load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert found == meta and fingerprint == again_fingerprint and not again.training
    assert (forward(again, images(3), False)[0] == forward(network, images(3), False)[0]).all()


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    state = build(TINY, 5, 32).state_dict()
    save_model(tmp_path, state, {"config": TINY.model_dump(), "num_classes": 6, "resolution": 32})
    with pytest.raises(UserError, match=r"head.weight is \(5, \d+\), not \(6, \d+\)"):
        load(tmp_path)
    save_model(tmp_path, state, {"num_classes": 6})
    with pytest.raises(UserError, match="no classifier this version can read"):
        load(tmp_path)


def test_building_leaves_batchnorm_and_mode_alone() -> None:
    network = build(TINY, 3, 32)
    assert network.training and network.trunk.training
    assert all(v == 0 for k, v in network.state_dict().items() if k.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet18x"}, "no timm model; did you mean .*resnet18"),
        ({"model_args": {"no_such": 1}}, "model_args.*no_such"),
        (
            {"model_args": {"pretrained": True}},
            "model_args pretrained: weights are given as classifier.weights",
        ),
        (
            {"model_args": {"checkpoint_path": "/x.pth"}},
            "model_args checkpoint_path: weights are given as classifier.weights",
        ),
        ({"model": "vit_tiny_patch16_224"}, "32 px .*classifier.input_size"),
        ({"input_size": 16}, "shrinks images of 16 px to one pixel"),
        ({"weights": "/nowhere/x.safetensors"}, "/nowhere/x.safetensors: no readable"),
    ],
)
def test_what_cannot_be_built(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        build(Classifier(**{"model": "test_resnet", **settings}), 3, 32)
    assert "\n" not in str(e.value)


def test_the_default_arguments_are_the_default_models_own() -> None:
    assert (
        Classifier().model_args
        and Classifier(model="resnet10t").model_args == Classifier().model_args
    )
    assert Classifier(model="test_resnet").model_args == {}
    assert Classifier(model="resnet18", model_args={"layers": [1, 1, 1, 1]}).model_args == {
        "layers": [1, 1, 1, 1]
    }
    network = build(Classifier(), 3, 32)
    assert sum(p.numel() for p in network.parameters()) < 1.5e6 and network.head.in_features == 256


def test_local_weights_go_into_the_trunk_and_the_old_head_goes(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", num_classes=10)
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    network = build(TINY.model_copy(update={"weights": str(path)}), 3, 32)
    state = source.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in network.trunk.state_dict().items())


def test_a_folder_of_a_trained_classifier_gives_its_trunk(tmp_path: Path) -> None:
    source = build(TINY, 5, 32)
    save_model(tmp_path, source.state_dict(), {"kind": "classifier"})
    network = build(TINY.model_copy(update={"weights": str(tmp_path)}), 3, 32)
    assert all(
        torch.equal(v, source.trunk.state_dict()[k]) for k, v in network.trunk.state_dict().items()
    )
    assert network.head.out_features == 3
    save_model(tmp_path, {"net.x": torch.zeros(1)}, {"kind": "denoiser"})
    with pytest.raises(UserError, match="holds no classifier"):
        build(TINY.model_copy(update={"weights": str(tmp_path)}), 3, 32)


def test_foreign_weights_are_refused_with_the_first_mismatches(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=10).state_dict(), path)
    with pytest.raises(UserError, match="does not fit test_resnet: .*is missing.* more"):
        build(TINY.model_copy(update={"weights": str(path)}), 3, 32)
    state = timm.create_model("test_resnet").state_dict()
    first = next(iter(state))
    save_file({**state, first: state[first][:1].clone()}, path)
    with pytest.raises(UserError, match=rf"{first} is \(1, .*, not "):
        build(TINY.model_copy(update={"weights": str(path)}), 3, 32)


def test_weights_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **more: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("no route to host")
        return create(name, **more)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError, match="from the hub .no route to host.; give a local safetensors file"
    ):
        build(TINY.model_copy(update={"weights": "imagenet"}), 3, 32)


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **more: object) -> torch.nn.Module:
        if not pretrained:
            return create(name, **more)
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry 5/5].")
        try:
            raise ConnectionRefusedError("refused")
        except ConnectionRefusedError as e:
            raise OSError("a text that misleads") from e

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(
        logging.getLogger("huggingface_hub"), "propagate", True
    )  # so that caplog would see it
    with pytest.raises(
        UserError,
        match="from the hub .it cannot be reached from here.; give a local safetensors file",
    ):
        build(TINY.model_copy(update={"weights": "imagenet"}), 3, 32)
    assert "Retrying" not in caplog.text


def test_imagenet_weights_of_a_file_are_the_trunks(timm_weights: Path) -> None:
    config = Classifier(model="tf_efficientnet_lite0", weights=str(timm_weights))
    network = build(config, 7, 64)
    state = load_file(timm_weights)
    trunk = network.trunk.state_dict()
    assert len(trunk) > 200 and all(torch.equal(v, state[k]) for k, v in trunk.items())
    assert set(state) - set(trunk) == {
        "classifier.weight",
        "classifier.bias",
    }  # the old head, and nothing else
    assert network.head.weight.shape == (7, state["classifier.weight"].shape[1])
    logits, _ = forward(network.eval(), images(2, 64), True)
    assert np.isfinite(logits).all()


def test_imagenet_weights_of_another_model_are_refused(timm_weights: Path) -> None:
    message = (
        r"does not fit resnet18: conv1.weight is missing; layer1.0.conv1.weight is missing; "
        r".*and \d+ more"
    )
    with pytest.raises(UserError, match=message) as e:
        build(Classifier(model="resnet18", weights=str(timm_weights)), 7, 64)
    assert "\n" not in str(e.value)
