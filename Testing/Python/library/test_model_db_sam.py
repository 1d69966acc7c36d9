from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import randomised, shared_set, silent_keys
from goldens import GOLDENS, published_keys
from SAMAdaptLib.cards import find_card
from SAMAdaptLib.errors import CardError, PromptError, WeightsError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models import build_predictor
from SAMAdaptLib.models.db_sam import DbSam, DbSamEncoder, build_db_sam, load_into_db_sam, official_box
from SAMAdaptLib.models.db_sam_adapter import (
    ChannelAttention,
    FourBranches,
    Pyramid,
    SigmoidFusion,
    SoftmaxFusion,
    TwoBranches,
)
from SAMAdaptLib.models.db_sam_attention import POINTS, CrossBlock, DeformableAttention, MixingMLP
from SAMAdaptLib.models.layers import LayerNorm2d
from SAMAdaptLib.models.mask_decoder import SINGLE_MASK, THREE_MASKS, MaskDecoder
from SAMAdaptLib.models.prompt_encoder import PromptEncoder
from SAMAdaptLib.models.vit import ViTShape, blocks_of
from SAMAdaptLib.prompts import Box
from SAMAdaptLib.propagation import SliceBySlice
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.db_sam import load_golden
from SAMAdaptLib.volume import Volume
from SAMAdaptLib.weights import read_checkpoint, recognise

CPU = torch.device("cpu")
CARD = find_card("db_sam_vit_b.experimental")
TINY = ViTShape(
    embed_dim=16, depth=4, heads=2, global_blocks=(1, 3), input_size=64, window=3, out_channels=16
)
LEVELS = (1, 2, 3, 4)
SIGN_ONLY = "image_encoder.adapter.aggregation.conv_fc.2.0.weight"
"""Its two channels are normalised in the recorded set, which leaves little but their order."""


def blocks(levels: int) -> nn.ModuleList:
    return nn.ModuleList(CrossBlock(16, 2, levels, 32) for _ in range(2))


def tiny(branches: int, per_pixel: bool = True, attends_first: bool = True) -> DbSam:
    pyramid = Pyramid(16, LEVELS, (2, 4, 8))
    adapter: FourBranches | TwoBranches
    if branches == 4:
        adapter = FourBranches(16, pyramid, SoftmaxFusion(16, 32, 4, 5), (blocks(5), blocks(5)))
    else:
        attention = nn.ModuleList(ChannelAttention(16, 8) for _ in range(2))
        fusion = SigmoidFusion(16, 32, 4, per_pixel)
        adapter = TwoBranches(16, pyramid, fusion, (blocks(4), blocks(1)), attention, attends_first)
    network = DbSam(
        DbSamEncoder(TINY, adapter),
        PromptEncoder(16, (4, 4), (64, 64), 4),
        MaskDecoder(16, mlp_dim=32, score_width=16),
    )
    randomised(network)
    return network


def test_pictures_and_boxes_enter_as_in_the_official_code() -> None:
    rows = verify(GOLDENS / "db_sam")
    assert {row.output for row in rows} == {"out_images", "out_boxes_perturb_False", "out_boxes_perturb_True"}
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("name", ["four_branch", "two_branch"])
def test_the_official_numbers_are_reached(shared_data: Path, name: str) -> None:
    rows = verify(shared_set(shared_data, "db_sam", name).path)
    assert len(rows) == 10
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("name", ["four_branch", "two_branch"])
def test_every_tensor_of_the_official_files_has_its_effect(shared_data: Path, name: str) -> None:
    golden = shared_set(shared_data, "db_sam", name)
    network, arrays = load_golden(golden), golden.arrays()
    picture = (torch.from_numpy(arrays["in_images"][:1]).permute(0, 3, 1, 2).float() - 120) / 58
    picture = F.pad(picture, (0, 0, 0, 128 - picture.shape[2]))
    box = torch.from_numpy(arrays["in_boxes"][0]).float()
    points = torch.from_numpy(arrays["in_point_coords"]), torch.from_numpy(arrays["in_point_labels"])

    def decoded(embedding: Tensor) -> list[Tensor]:
        place = network.prompt_encoder.dense_pe()
        one = network.prompt_encoder(boxes_xyxy=box)
        several = network.prompt_encoder(*points, boxes_xyxy=box)
        return [
            network.mask_decoder(embedding, place, *one, SINGLE_MASK)[0],
            *network.mask_decoder(embedding, place, *several, THREE_MASKS),
        ]

    with torch.inference_mode():
        embedding = network.image_encoder(picture)
    named = network.state_dict()
    encoding = {key: tensor for key, tensor in named.items() if key.startswith("image_encoder.")}
    decoding = {key: tensor for key, tensor in named.items() if key not in encoding}
    silent = silent_keys(encoding, lambda: decoded(network.image_encoder(picture)))
    silent |= silent_keys(decoding, lambda: decoded(embedding))
    for key in silent & {SIGN_ONLY}:
        named[key].neg_()
        with torch.inference_mode():
            assert not torch.allclose(network.image_encoder(picture), embedding, atol=1e-3)
    without_effect = set(golden.facts["keys_without_effect_on_these_outputs"])
    shifts = {key for key in named if key.endswith("k_proj.bias")}  # the softmax takes these out
    assert silent - {SIGN_ONLY} == without_effect | shifts


@pytest.mark.parametrize(("branches", "parameters"), [("four", 159_891_912), ("two", 163_120_136)])
def test_the_published_size_has_exactly_the_official_keys_and_shapes(branches: str, parameters: int) -> None:
    keys = published_keys(f"db_sam_{branches}_branch")
    tensors = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        network = build_db_sam(tensors)
    named = network.state_dict()
    assert {key: list(tensor.shape) for key, tensor in named.items()} == keys
    assert sum(tensor.numel() for tensor in named.values()) == parameters
    assert network.image_encoder.stages == ((0, 2), (3, 5), (6, 8), (9, 11))
    heads = {module.heads for module in network.modules() if isinstance(module, DeformableAttention)}
    assert heads == {12}
    assert recognise(tensors) == "DB-SAM, ViT-B"


@pytest.mark.parametrize("branches", [2, 4])
def test_every_norm_has_the_epsilon_of_the_official_code(branches: int) -> None:
    network = tiny(branches)
    for block in blocks_of(network.image_encoder):
        assert block.norm1.eps == block.norm2.eps == 1e-5
    for name, module in network.named_modules():
        if isinstance(module, LayerNorm2d):
            assert module.eps == 1e-6, name
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert module.eps == 1e-5, name


def test_offsets_are_in_cells_x_before_y_and_outside_is_zero() -> None:
    attention = DeformableAttention(2, 1, 1)
    for name, parameter in attention.named_parameters():
        parameter.data.zero_()
        if name in ("value_proj.weight", "output_proj.weight"):
            parameter.data.copy_(torch.eye(2))
    attention.sampling_offsets.bias.data.copy_(torch.tensor([1.0, 0.0]).repeat(POINTS))
    values = torch.randn(1, 1, 3, 4, 2)
    given = attention(torch.zeros(1, 1, 3, 4, 2), values)
    expected = torch.zeros_like(values)
    expected[:, :, :, :3] = values[:, :, :, 1:]  # the neighbour in x; beyond the last column nothing
    torch.testing.assert_close(given, expected)
    attention.sampling_offsets.bias.data.copy_(torch.tensor([0.0, -0.5]).repeat(POINTS))
    between = attention(torch.zeros(1, 1, 3, 4, 2), values)
    torch.testing.assert_close(between[0, 0, 1], (values[0, 0, 0] + values[0, 0, 1]) / 2)
    torch.testing.assert_close(between[0, 0, 0], values[0, 0, 0] / 2)


def test_heads_levels_and_points_are_weighed_together() -> None:
    attention = DeformableAttention(4, 2, 3)
    for name, parameter in attention.named_parameters():
        parameter.data.zero_()
        if name in ("value_proj.weight", "output_proj.weight"):
            parameter.data.copy_(torch.eye(4))
    scores = torch.randn(2, 3, POINTS)
    attention.attention_weights.bias.data.copy_(scores.flatten())
    values = torch.randn(1, 3, 2, 2, 4)
    shares = scores.flatten(1).softmax(1).reshape(2, 3, POINTS).sum(-1)  # all points lie on the query itself
    expected = torch.cat(
        [
            sum(shares[head, k] * values[:, k, :, :, 2 * head : 2 * head + 2] for k in range(3))
            for head in (0, 1)
        ],
        dim=-1,
    )
    given = attention(torch.randn(1, 2, 2, 2, 4), values)
    torch.testing.assert_close(given, torch.stack([expected, expected], dim=1))


def test_the_mixing_mlp_sees_neighbours_of_its_own_map_only() -> None:
    torch.manual_seed(0)
    mlp = MixingMLP(2, 3)
    maps = torch.randn(1, 2, 4, 4, 2)
    changed = maps.clone()
    changed[0, 0, 0, 0] += 1
    moved = (mlp(changed) - mlp(maps)).abs().sum(-1)[0] > 1e-6
    assert moved[0, :2, :2].all()
    assert int(moved.sum()) == 4


@pytest.mark.parametrize("antialias", [False, True])
def test_the_pyramid_ends_on_the_grid_whatever_it_starts_from(antialias: bool) -> None:
    pyramid = Pyramid(16, LEVELS, (2, 4, 8), antialias)
    randomised(pyramid)
    x = torch.randn(1, 3, 64, 64)
    maps = pyramid(x)
    assert maps.shape == (1, 4, 4, 4, 16)
    small = F.interpolate(x, (4, 4), mode="bilinear", antialias=antialias)
    torch.testing.assert_close(maps[:, 3], pyramid.get_submodule("lcb4")(small).permute(0, 2, 3, 1))
    strides = [
        [pyramid.get_submodule(f"lcb{level}.{index}.conv").stride[0] for index in (1, 3, 5)]
        for level in LEVELS
    ]
    assert strides == [[2, 2, 2], [2, 2, 1], [2, 1, 1], [1, 1, 1]]


def test_maps_look_at_the_tokens_of_before() -> None:
    for first in (True, False):
        adapter = tiny(2, attends_first=first).image_encoder.adapter
        assert isinstance(adapter, TwoBranches)
        tokens, maps = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 4, 16)
        attention = adapter.vit_conv_blocks[1]
        seen = (attention(tokens) if first else tokens)[:, None]
        updated = adapter.vit_cross_attn_blocks[1](seen, maps)[:, 0]
        expected = updated if first else attention(updated), adapter.conv_cross_attn_blocks[1](maps, seen)
        torch.testing.assert_close(adapter(1, tokens, maps), expected)


def test_the_shares_of_two_branches_add_up() -> None:
    tokens, fused_map = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 16)
    for per_pixel in (True, False):
        fusion = SigmoidFusion(16, 32, 4, per_pixel)
        randomised(fusion)
        seen = tokens if per_pixel else tokens.mean(dim=(1, 2), keepdim=True)
        share = torch.sigmoid(fusion.fc_spatial(fused_map) + fusion.fc_channel(seen))
        torch.testing.assert_close(fusion.mixed(tokens, fused_map), tokens + share * (fused_map - tokens))
        x = fusion.mixed(tokens, fused_map)
        torch.testing.assert_close(fusion(tokens, fused_map), x + fusion.ffn(fusion.ffn_norm(x)))


def test_channel_attention_weighs_after_the_depthwise_convolution() -> None:
    block = ChannelAttention(4, 2)
    randomised(block)
    tokens = torch.randn(1, 3, 3, 4)
    x = tokens.permute(0, 3, 1, 2)
    y = F.gelu(F.conv2d(block.pre_norm(x), block.conv_dw.weight, padding=1, groups=4))
    hidden = F.gelu(y.mean(dim=(2, 3)) @ block.se.fc1.weight[:, :, 0, 0].T)
    y = y * (hidden @ block.se.fc2.weight[:, :, 0, 0].T).sigmoid()[:, :, None, None]
    expected = x + F.conv2d(y, block.conv_pw.weight)
    torch.testing.assert_close(block(tokens), expected.permute(0, 2, 3, 1))


def test_boxes_are_inclusive_and_stay_inside_when_widened() -> None:
    mask = np.zeros((20, 40), bool)
    mask[4:8, 12:30] = True
    assert official_box(mask, (20, 40)).tolist() == [12, 4, 29, 7]
    assert official_box(mask, (50, 100)).tolist() == [30, 10, 72, 17]
    assert official_box(mask, (20, 40), widened=True).tolist() == [3, 0, 38, 16]
    with pytest.raises(PromptError, match="the mask is empty"):
        official_box(np.zeros((3, 3), bool), (3, 3))


def test_the_official_wrapper_is_unwrapped() -> None:
    tensors = read_checkpoint(GOLDENS / "db_sam" / "official_wrapper_example.pth").tensors
    assert list(tensors) == ["image_encoder.pos_embed"]


@pytest.mark.parametrize(("branches", "per_pixel"), [(4, True), (2, True), (2, False)])
def test_a_session_segments_in_a_box_with_any_of_the_adapters(
    branches: int, per_pixel: bool, tmp_path: Path
) -> None:
    network = tiny(branches, per_pixel)
    file = tmp_path / "ckpt_best.pth"
    torch.save({"net": network.state_dict(), "acc": 0.5, "epoch": 3}, file)
    predictor = build_predictor(CARD, file, None, CPU)
    picture = np.random.default_rng(1).integers(0, 256, (40, 48)).astype(np.uint8)
    seen = predictor._framing.to_input(picture)
    with torch.inference_mode():
        torch.testing.assert_close(
            predictor.encode(picture).features, network.image_encoder(seen), atol=1e-5, rtol=0
        )
    volume = Volume(np.stack([picture] * 2), Geometry((2, 40, 48), np.eye(4)))
    session = Session(volume, SliceBySlice(predictor), axis="K")
    session.add(Box.from_corners(*volume.geometry.ijk_to_ras(np.array([[4, 4, 1], [40, 34, 1]]))))
    assert set(session.confidence) == {1}
    assert not session.mask[0].any()


def test_options_of_the_card_are_used(tmp_path: Path) -> None:
    network, file = tiny(2), tmp_path / "ckpt_best.pth"
    torch.save(network.state_dict(), file)
    for options, expected in (
        ({}, (False, True)),
        ({"antialias": True}, (True, True)),
        ({"channel_attention": "after"}, (False, False)),
    ):
        predictor = build_predictor(replace(CARD, options=options), file, None, CPU)
        adapter = predictor._image_encoder.adapter
        assert (adapter.spatial_prior_module.antialias, adapter.attends_first) == expected
    with pytest.raises(CardError, match="is before or after, but came as 'beside'"):
        build_predictor(replace(CARD, options={"channel_attention": "beside"}), file, None, CPU)


def test_files_of_other_networks_are_refused() -> None:
    network = tiny(2)
    with pytest.raises(WeightsError, match=r"of DB-SAM was wanted, but the file .*it looks like DB-SAM"):
        load_into_db_sam(network, tiny(4).state_dict())
    with pytest.raises(WeightsError, match=r"lacks image_encoder\.pos_embed; it looks like DAPSAM"):
        build_db_sam({"prompt_generator.memory_bank.weight": torch.zeros(1)})
    plain = {name: tensor for name, tensor in network.state_dict().items() if ".adapter." not in name}
    with pytest.raises(WeightsError, match=r"of DB-SAM was wanted.*looks like SAM or MedSAM"):
        build_db_sam(plain)
