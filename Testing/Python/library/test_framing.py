from __future__ import annotations

import numpy as np
import pytest
import torch

from goldens import arrays
from SAMAdaptLib.models.framing import Framing, LongestSide, LongestSideMinMax
from SAMAdaptLib.models.medsam import Stretched


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(40, 200, (30, 50), dtype=np.uint8)


def test_the_longest_side_fills_the_input_and_the_rest_is_zeros_after_standardising(
    picture: np.ndarray,
) -> None:
    framing = LongestSide(64)
    pixels = framing.to_input(np.full_like(picture, 100))
    assert framing.inner_shape(picture.shape) == (38, 64), "30 * 1.28 = 38.4"
    assert pixels.shape == (1, 3, 64, 64)
    torch.testing.assert_close(pixels[0, 0, 37, 63], torch.tensor((100 - 123.675) / 58.395))
    torch.testing.assert_close(pixels[0, 2, 0, 0], torch.tensor((100 - 103.53) / 57.375))
    assert not pixels[0, :, 38:].any()


def test_a_half_is_rounded_up() -> None:
    assert LongestSide(10).inner_shape((5, 20)) == (3, 10), "2.5 rounds to 3, as SAM does, not to the even 2"


def test_grey_equals_the_same_picture_in_colours(picture: np.ndarray) -> None:
    colours = np.repeat(picture[:, :, None], 3, axis=2)
    for framing in (LongestSide(64), LongestSideMinMax(64), Stretched(64)):
        torch.testing.assert_close(framing.to_input(picture), framing.to_input(colours), atol=0, rtol=0)


def test_min_max_stretches_to_one_and_survives_a_constant_picture(picture: np.ndarray) -> None:
    pixels = LongestSideMinMax(50).to_input(picture)
    expected = (picture.astype(float) - picture.min()) / (int(picture.max()) - int(picture.min()))
    np.testing.assert_allclose(pixels[0, 1, :30], expected, atol=1e-6)
    assert not LongestSideMinMax(50).to_input(np.full_like(picture, 9)).any()


def test_points_follow_each_axis(picture: np.ndarray) -> None:
    points = np.array([[10, 20]], dtype=np.float32)
    np.testing.assert_allclose(LongestSide(64).to_input_xy(points, picture.shape), [[12.8, 20 * 38 / 30]])
    np.testing.assert_allclose(
        Stretched(64).to_input_xy(points, picture.shape), [[12.8, 20 * 64 / 30]], rtol=1e-6
    )


def test_logits_come_back_to_their_place() -> None:
    # A blob in the left upper quarter of a tall picture, on a grid a quarter of the input.
    low_res = torch.full((1, 1, 16, 16), -5.0)
    low_res[..., 0:8, 0:4] = 5.0
    logits = LongestSide(64).to_picture(low_res, (100, 50))
    assert logits.shape == (1, 1, 100, 50)
    inside = logits[0, 0] > 0
    assert inside[:48, :23].all()
    assert not inside[52:].any()
    assert not inside[:, 27:].any()


def test_medsam_interpolates_probabilities_not_logits() -> None:
    # Half way between logits 4 and -1: the mean logit is inside, the mean probability 0.63 too; between 9 and
    # -2 at a quarter of the way the logits say inside (0.75) and the probabilities outside (0.34).
    low_res = torch.tensor([[[[9.0, -2.0]]]])
    logits = Stretched(8).to_picture(low_res, (1, 4))
    probability = torch.sigmoid(logits)
    expected = 0.25 * torch.sigmoid(torch.tensor(9.0)) + 0.75 * torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(probability[0, 0, 0, 2], expected, atol=1e-5, rtol=0)
    assert logits[0, 0, 0, 2] < 0 < 0.25 * 9 - 0.75 * 2


def test_medsams_resize_is_the_official_one_bit_for_bit() -> None:
    z = arrays("medsam")
    np.testing.assert_array_equal(Stretched(128).resize(z["image_uint8_hw"]), z["resized_uint8_hwc"])


@pytest.mark.parametrize("framing", [LongestSide(64), Stretched(64)])
def test_a_mask_comes_back_as_it_went(framing: Framing) -> None:
    mask = np.zeros((100, 50), dtype=bool)
    mask[20:70, 10:40] = True
    low_res = framing.mask_to_low_res(mask, (16, 16))
    assert low_res.shape == (1, 1, 16, 16)
    assert float(low_res.max()) == pytest.approx(6)
    assert float(low_res.min()) == pytest.approx(-6)
    back = framing.to_picture(low_res, mask.shape)[0, 0].numpy() > 0
    assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.9
