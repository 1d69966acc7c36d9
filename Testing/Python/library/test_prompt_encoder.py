from __future__ import annotations

import math

import pytest
import torch

from SAMAdaptLib.models.prompt_encoder import NOT_A_POINT, PromptEncoder


@pytest.fixture
def encoder() -> PromptEncoder:
    torch.manual_seed(0)
    return PromptEncoder(embed_dim=8, grid=(4, 6), input_size=(64, 96), mask_channels=16).eval()


def weight(encoder: PromptEncoder, kind: int) -> torch.Tensor:
    return encoder.point_embeddings[kind].weight[0]


def test_a_pixel_is_encoded_at_its_middle_x_over_width_y_over_height(encoder: PromptEncoder) -> None:
    matrix = encoder.pe_layer.positional_encoding_gaussian_matrix
    x, y = 2 * (10.5 / 96) - 1, 2 * (20.5 / 64) - 1
    angles = 2 * math.pi * (x * matrix[0] + y * matrix[1])
    sparse, _ = encoder(torch.tensor([[[10.0, 20.0]]]), torch.tensor([[1]]))
    expected = torch.cat([angles.sin(), angles.cos()]) + weight(encoder, 1)
    torch.testing.assert_close(sparse[0, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse[0, 1], encoder.not_a_point_embed.weight[0])


def test_labels_choose_the_embedding_and_others_add_nothing(encoder: PromptEncoder) -> None:
    points = torch.full((1, 4, 2), 7.0)
    sparse, _ = encoder(points, torch.tensor([[0, 1, NOT_A_POINT, 5]]), torch.tensor([[1.0, 2, 3, 4]]))
    place = sparse[0, 3]
    torch.testing.assert_close(sparse[0, 0] - place, weight(encoder, 0))
    torch.testing.assert_close(sparse[0, 1] - place, weight(encoder, 1))
    torch.testing.assert_close(sparse[0, 2], encoder.not_a_point_embed.weight[0])
    assert sparse.shape == (1, 6, 8), "with a box no point is filled up"


def test_corners_of_a_box_are_told_apart(encoder: PromptEncoder) -> None:
    sparse, _ = encoder(boxes_xyxy=torch.tensor([[5.0, 5, 5, 5]]))
    torch.testing.assert_close(sparse[0, 0] - sparse[0, 1], weight(encoder, 2) - weight(encoder, 3))


def test_without_prompts_there_is_one_set_of_no_tokens(encoder: PromptEncoder) -> None:
    sparse, dense = encoder()
    assert sparse.shape == (1, 0, 8)
    assert dense.shape == (1, 8, 4, 6)
    torch.testing.assert_close(dense[0, :, 2, 3], encoder.no_mask_embed.weight[0])


def test_a_mask_sets_the_dense_embedding_and_the_batch(encoder: PromptEncoder) -> None:
    masks = torch.randn(3, 1, *encoder.mask_size)
    sparse, dense = encoder(masks=masks)
    assert encoder.mask_size == (16, 24)
    assert sparse.shape == (3, 0, 8)
    torch.testing.assert_close(dense, encoder.mask_downscaling(masks))


def test_dense_pe_encodes_the_middle_of_each_cell(encoder: PromptEncoder) -> None:
    # Cell (row 1, column 4) of a 4 x 6 grid over 64 x 96 pixels has its middle at pixel edge (72, 24).
    sparse, _ = encoder(torch.tensor([[[71.5, 23.5]]]), torch.tensor([[1]]))
    torch.testing.assert_close(encoder.dense_pe()[0, :, 1, 4], sparse[0, 0] - weight(encoder, 1))


def test_gradients_reach_every_tensor(encoder: PromptEncoder) -> None:
    points, labels = torch.rand(2, 3, 2) * 50, torch.tensor([[0, 1, NOT_A_POINT]] * 2)
    boxes, masks = torch.rand(2, 4) * 50, torch.randn(2, 1, *encoder.mask_size)
    for parts in (encoder(points, labels, boxes, masks), encoder(points, labels)):
        sum(part.square().sum() for part in parts).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
