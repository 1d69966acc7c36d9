from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import randomised, shared_set, silent_keys
from goldens import GOLDENS, published_keys
from SAMAdaptLib.cards import find_card
from SAMAdaptLib.errors import PromptError, WeightsError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models import build_predictor
from SAMAdaptLib.models.layers import LayerNorm2d
from SAMAdaptLib.models.prompt_encoder import PromptEncoder
from SAMAdaptLib.models.sam import SamSlicePredictor
from SAMAdaptLib.models.sam_unet import (
    Reshaper,
    ResidualBlock,
    ResNet,
    SamUnet,
    SamUnetDecoder,
    SamUnetEncoder,
    box_of_largest_part,
    build_sam_unet,
    load_sam_unet,
    published_tensors,
)
from SAMAdaptLib.models.vit import ViTShape
from SAMAdaptLib.prompts import Box, PixelPrompts, Point
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.sam_unet import load_golden
from SAMAdaptLib.volume import Volume
from SAMAdaptLib.weights import read_checkpoint, recognise

CPU = torch.device("cpu")
CARD = find_card("sam_unet_vit_b.sa_med2d")
TINY = ViTShape(
    embed_dim=16, depth=12, heads=2, global_blocks=(2, 5, 8, 11), input_size=64, window=3, out_channels=16
)


def tiny(bottleneck: bool = False, seed: int = 0) -> SamUnet:
    network = SamUnet(
        SamUnetEncoder(TINY, ResNet(8, (1, 2, 1, 1), bottleneck), 4),
        PromptEncoder(16, (4, 4), (64, 64), 4),
        SamUnetDecoder(16, 4, 2, mlp_dim=32),
    )
    randomised(network, seed)
    return network


@pytest.fixture(scope="module")
def network() -> SamUnet:
    return tiny(seed=4)  # one that fills a part of a picture


def test_boxes_and_pictures_enter_as_in_the_official_code() -> None:
    rows = verify(GOLDENS / "sam_unet")
    assert {row.output for row in rows} == {
        "out_boxes",
        "out_resized",
        "out_boxes_resized",
        "out_normalised_padded",
    }
    for row in rows:
        assert row.passed, row


def test_the_official_numbers_are_reached(shared_data: Path) -> None:
    rows = verify(shared_set(shared_data, "sam_unet", "res50_like").path)
    assert len(rows) == 13
    for row in rows:
        assert row.passed, row


def test_every_tensor_of_the_official_file_has_its_effect(shared_data: Path) -> None:
    golden = shared_set(shared_data, "sam_unet", "res50_like")
    network, arrays = load_golden(golden), golden.arrays()
    picture = (torch.from_numpy(arrays["in_image_chw"])[None].float() - 120) / 58
    picture = F.pad(picture, (0, 0, 0, 128 - picture.shape[2]))
    points = torch.from_numpy(arrays["in_points"])[None], torch.from_numpy(arrays["in_point_labels"])[None]

    def run() -> list[Tensor]:
        features, place = network.image_encoder(picture), network.prompt_encoder.dense_pe()
        encoded = (
            network.prompt_encoder(*points),
            network.prompt_encoder(boxes_xyxy=torch.from_numpy(arrays["in_box"])),
        )
        return [network.mask_decoder(features, place, *each)[0] for each in encoded]

    named = published_tensors(network)
    without_effect = set(golden.facts["keys_without_effect_on_these_outputs"])
    shifts = {key for key in named if key.endswith("k_proj.bias")}  # the softmax takes these out
    assert silent_keys(named, run) == without_effect | shifts


@pytest.mark.parametrize("kind", [34, 50])
def test_the_published_size_has_exactly_the_official_keys_and_shapes(kind: int) -> None:
    keys = published_keys(f"sam_unet_res{kind}")
    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        network = build_sam_unet(tensors)
    assert {key: list(tensor.shape) for key, tensor in published_tensors(network).items()} == keys
    assert network.image_encoder.input_size == network.prompt_encoder.input_size == (256, 256)
    assert network.image_encoder.vit.shape.window == 14
    assert [len(network.image_encoder.resnet.get_submodule(f"stage{n}")) for n in range(1, 5)] == [3, 4, 6, 3]
    assert recognise(tensors) == "SAM-UNet"


def test_every_norm_has_the_epsilon_of_the_official_code(network: SamUnet) -> None:
    expected = {nn.BatchNorm2d: 1e-5, LayerNorm2d: 1e-6}
    for name, module in network.named_modules():
        if type(module) in expected:
            assert module.eps == expected[type(module)], name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-6 if ".blocks." in name else 1e-5), name


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_block_strides_in_its_3_x_3_convolution(bottleneck: bool) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, 4, 2, bottleneck)
    randomised(block)
    x = torch.randn(1, 8, 6, 6)
    strides, y = ([1, 2, 1] if bottleneck else [2, 1]), x
    for number, stride in enumerate(strides, start=1):
        weight = block.get_parameter(f"conv{number}.weight")
        y = F.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2)
        y = block.get_submodule(f"bn{number}")(y)
        y = y.relu() if number < len(strides) else y
    short = F.conv2d(x, block.get_parameter("downsample.0.weight"), stride=2)
    expected = (y + block.get_submodule("downsample.1")(short)).relu()
    torch.testing.assert_close(block(x), expected)
    assert isinstance(ResidualBlock(4, 4, 1, False).downsample, nn.Identity)


def test_batch_norm_uses_the_statistics_of_the_file() -> None:
    block = ResidualBlock(4, 4, 1, False)
    randomised(block)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x)[:1], block(x[:1]))  # those of the batch would differ


@pytest.mark.parametrize(("extent", "layers"), [(16, 7), (8, 4), (4, 1), (2, 4)])
def test_reshapers_bring_every_stage_to_the_grid(extent: int, layers: int) -> None:
    reshaper = Reshaper(8, extent, 4, 12)
    assert len(reshaper.reshaper) == layers
    assert reshaper(torch.zeros(1, 8, extent, extent)).shape == (1, 12, 4, 4)


def test_stages_are_added_before_the_global_blocks_and_depths_are_summed(network: SamUnet) -> None:
    encoder, x = network.image_encoder, torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = encoder.resnet(x)
        tokens = encoder.vit.patch_embed(x) + encoder.vit.pos_embed
        depths = []
        for index, block in enumerate(encoder.vit.blocks):
            if index in (2, 5, 8, 11):
                stage = index // 3
                tokens = tokens + encoder.adapters_in[stage](maps[stage]).permute(0, 2, 3, 1)
            tokens = block(tokens)
            if index in (2, 5, 8):
                depths.append(encoder.adapters_bridge[2 - index // 3](tokens.permute(0, 3, 1, 2)))
        embedding = encoder.vit.neck(tokens.permute(0, 3, 1, 2))
        expected = encoder.embedding_encoder(embedding) + depths[0] + depths[1] + depths[2]
        given = encoder(x)
    torch.testing.assert_close(given, (embedding, expected))


def test_the_score_is_the_mean_probability_inside(network: SamUnet) -> None:
    predictor = SamSlicePredictor(network, CARD, "a" * 64)
    picture = np.random.default_rng(0).integers(0, 256, (48, 40)).astype(np.uint8)
    embedding = predictor.encode(picture)
    prompts = PixelPrompts(
        np.zeros((0, 2), np.float32), np.zeros(0, np.int64), np.array([5, 5, 30, 30], np.float32)
    )
    result = predictor.decode(embedding, prompts)
    assert result.logits.shape == (48, 40)
    assert result.low_res.shape == (1, 16, 16)
    inside = result.low_res[result.low_res > 0]
    assert 0 < inside.size < 256
    assert result.score == pytest.approx((1 / (1 + np.exp(-inside))).mean(), abs=1e-5)


def test_boxes_are_those_of_the_largest_part() -> None:
    mask = np.zeros((9, 9), bool)
    mask[0, 0:3] = True
    mask[4, 2] = mask[5, 3] = mask[6, 4] = mask[7, 5] = True  # corners touch
    assert box_of_largest_part(mask).tolist() == [2, 4, 6, 8]
    with pytest.raises(PromptError, match="the mask is empty"):
        box_of_largest_part(np.zeros((3, 3), bool))


def test_a_file_with_a_pickled_optimizer_is_read() -> None:
    tensors = read_checkpoint(GOLDENS / "sam_unet" / "official_wrapper_example.pth").tensors
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "resnet.stage0.0.weight": [2, 3, 7, 7],
        "mask_decoder.med_token.weight": [1, 8],
    }


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_session_segments_in_a_box_and_refuses_clicks(bottleneck: bool, tmp_path: Path) -> None:
    network = tiny(bottleneck, seed=1 if bottleneck else 4)
    file = tmp_path / "sam_unet.pth"
    torch.save({"model": published_tensors(network)}, file)
    predictor = build_predictor(CARD, file, None, CPU)
    voxels = np.random.default_rng(0).integers(0, 256, (3, 40, 48)).astype(np.uint8)
    volume = Volume(voxels, Geometry(voxels.shape, np.eye(4)))
    session = Session(volume, SliceBySlice(predictor), axis="K")
    corners = volume.geometry.ijk_to_ras(np.array([[4, 4, 1], [40, 34, 1]]))
    session.add(Box.from_corners(*corners))
    assert session.mask[1].any()
    assert not session.mask[[0, 2]].any()
    other = Session(volume, SliceBySlice(predictor), axis="K")
    with pytest.raises(PromptError, match="takes box prompts, but a point was placed"):
        other.add(Point(tuple(volume.geometry.centre_ras)))


def test_files_of_other_networks_are_refused(network: SamUnet) -> None:
    with pytest.raises(
        WeightsError, match=r"of SAM-UNet was wanted, but the file lacks .*it looks like DAPSAM"
    ):
        load_sam_unet({"prompt_generator.memory_bank.weight": torch.zeros(2, 2)})
    more = {**published_tensors(network), "resnet.fc.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"also holds resnet\.fc\.weight; it looks like SAM-UNet"):
        load_sam_unet(more)
