import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from adversa.classify import features, model
from adversa.config import Classifier
from adversa.types import UserError

SMALL = {"channels": [8, 16, 16, 32]}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "trunk.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=0, **SMALL).state_dict(), path)
    return path


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)


def test_pretrained_features_are_the_trunks_own_embedding_in_float32(weights, images):
    config = Classifier(model="resnet10t", model_args=SMALL, weights=str(weights))
    found = features.make_features(features.FeatureSpace("x", config=config), 32)(images)
    network = model.build(config.model_copy(update={"amp": False}), 2, 32).eval()
    with torch.no_grad():
        expected = network(model.to_pixels(images))[1].numpy()
    assert found.shape == (70, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_features_do_not_hang_on_chance_or_on_neighbours(weights, images):
    space = features.FeatureSpace(
        "x", config=Classifier(model="resnet10t", model_args=SMALL, weights=str(weights))
    )
    before = torch.random.get_rng_state()
    first = features.make_features(space, 32)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(9)
    again = features.make_features(space, 32)
    assert (first(images) == again(images)).all() and (
        first(images)[5:9] == first(images[5:9])
    ).all()


def test_a_timm_model_sees_images_at_its_own_size():
    assert features.pretrained("tf_efficientnet_lite0", "imagenet").config.input_size == 224
    assert features.pretrained("resnet10t", "w.safetensors").config.input_size == 176


def test_what_is_wrong_with_a_feature_space_is_said(tmp_path):
    with pytest.raises(UserError, match="quality.features.*resnet99.*no timm model"):
        features.make_features(features.pretrained("resnet99", "imagenet"), 32)
    with pytest.raises(UserError, match="quality.features.*no readable safetensors"):
        features.make_features(features.pretrained("resnet10t", str(tmp_path / "none")), 32)
