"""Preprocessing equals timm's evaluation transform, and is pinned where timm and the paper differ."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.config import resolve_model_data_config

from pipeline.embeddings.encoder import Encoder
from pipeline.embeddings.pixels import pixels_of_bytes
from pipeline.embeddings.preprocessing import pixels_of, preprocessing_for, shortest_of
from pipeline.errors import EncoderError
from pipeline.store.tables.identity import Preprocessing
from tests.images.pictures import encoded


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(generator.integers(0, 256, (max(height // 7, 2), max(width // 7, 2), 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (97, 96), (32, 32), (28, 28), (1000, 61), (224, 224)])
@pytest.mark.parametrize("crop", [96, 224])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_pixels_equal_timms_transform(size: tuple[int, int], crop: int, crop_mode: str) -> None:
    config = {
        "input_size": (3, crop, crop),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_mode": crop_mode,
    }
    image = noise(*size)
    expected = (create_transform(**config, is_training=False)(image) * 0.5 + 0.5) * 255
    found = torch.from_numpy(pixels_of(image, preprocessing_for(config, "a model", None)).copy()).permute(2, 0, 1)
    difference = (expected - found).abs()
    assert difference.max() <= 2.01  # whole grey levels, where the fused resampling rounds the other way
    assert difference.mean() < 0.25


def test_a_crop_larger_than_the_resized_image_is_padded() -> None:
    preprocessing = Preprocessing(resize=8, crop=12, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    found = pixels_of(Image.new("RGB", (40, 40), "white"), preprocessing)
    assert found.shape == (12, 12, 3)
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[6, 6].tolist() == [255, 255, 255]


def test_squash_keeps_everything() -> None:
    preprocessing = Preprocessing(
        resize=8, crop=8, crop_mode="squash", interpolation="nearest", mean=(0, 0, 0), std=(1, 1, 1)
    )
    image = Image.new("RGB", (64, 8), "white")
    image.paste("black", (0, 0, 8, 8))
    assert pixels_of(image, preprocessing)[0, 0].tolist() == [0, 0, 0]


def test_dinov2_is_seen_as_in_the_paper() -> None:
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False, img_size=224)
    config = resolve_model_data_config(model)
    preprocessing = preprocessing_for(config, "vit_small_patch14_dinov2.lvd142m", None)
    assert (preprocessing.resize, preprocessing.crop) == (256, 224)


def test_the_demo_encoder_at_96_pixels(encoder: Encoder) -> None:
    config = {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"}
    config |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert preprocessing_for(config, "tf_efficientnet_lite0", 96).resize == 109


def test_inputs_that_are_not_square_rgb_are_refused() -> None:
    with pytest.raises(EncoderError, match="square RGB"):
        preprocessing_for({"input_size": (1, 64, 64)}, "a model", None)


def test_scaled_decoding_is_another_identity_which_decodes_no_smaller_than_twice_the_resize() -> None:
    config = resolve_model_data_config(timm.create_model("resnet10t")) | {"input_size": (3, 64, 64)}
    exact, scaled = (preprocessing_for(config, "a model", None, decoding) for decoding in (None, "scaled"))
    assert (exact.pixel_path, scaled.pixel_path) == ("pillow", "pillow-draft")
    assert (shortest_of(exact), shortest_of(scaled)) == (None, 2 * scaled.resize)
    data = encoded(noise(1200, 900), "JPEG")
    whole, small = (pixels_of_bytes(data, preprocessing) for preprocessing in (exact, scaled))
    assert whole.facts == small.facts
    difference = np.abs(whole.pixels_SS3.astype(int) - small.pixels_SS3.astype(int))
    assert 0 < difference.mean() < 3
