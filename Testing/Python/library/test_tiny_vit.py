from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from SAMAdaptLib.models.tiny_vit import (
    AttentionBlock,
    ConvNorm,
    TinyViT,
    TinyViTConfig,
    WindowAttention,
    join_windows,
    split_windows,
    window_offsets,
)

SMALL = TinyViTConfig((8, 12, 16, 20), (1, 1, 2, 1), (1, 3, 2, 4), (7, 3, 4, 3), out_channels=24)


def random_encoder(config: TinyViTConfig = SMALL) -> TinyViT:
    torch.manual_seed(3)
    encoder = TinyViT(config).eval()
    for name, value in encoder.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value) * 0.2
            )
    return encoder


def test_offsets_count_rows_before_columns() -> None:
    assert window_offsets(2).tolist() == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]


def test_windows_are_cut_in_reading_order_and_padded_at_bottom_and_right() -> None:
    grid = torch.arange(1, 7).reshape(1, 2, 3, 1)  # 1 2 3 / 4 5 6
    cut = split_windows(grid, 2)[..., 0]
    assert cut.tolist() == [[1, 2, 4, 5], [3, 0, 6, 0]]


@pytest.mark.parametrize(("height", "width", "side"), [(5, 9, 4), (8, 8, 4), (3, 2, 7), (14, 15, 14)])
def test_windows_join_to_what_was_cut(height: int, width: int, side: int) -> None:
    x = torch.randn(2, height, width, 3)
    cut = split_windows(x, side)
    assert cut.shape == (2 * math.ceil(height / side) * math.ceil(width / side), side * side, 3)
    assert torch.equal(join_windows(cut, side, height, width), x)


def test_attention_is_softmax_with_the_bias_of_the_offset() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(6, 2, 2).eval()
    torch.nn.init.normal_(attention.attention_biases)
    x = torch.randn(3, 4, 6)
    with torch.no_grad():
        qkv = attention.qkv(attention.norm(x)).reshape(3, 4, 2, 9)
        expected = torch.empty(3, 4, 2, 3)
        for head in range(2):
            q, k, v = qkv[:, :, head, :3], qkv[:, :, head, 3:6], qkv[:, :, head, 6:]
            for a in range(4):
                weights = torch.stack(
                    [
                        (q[:, a] * k[:, b]).sum(-1) / math.sqrt(3)
                        + attention.attention_biases[head, abs(a // 2 - b // 2) * 2 + abs(a % 2 - b % 2)]
                        for b in range(4)
                    ],
                    dim=-1,
                ).softmax(-1)
                expected[:, a, head] = (weights[..., None] * v).sum(1)
        torch.testing.assert_close(attention(x), attention.proj(expected.flatten(2)))


def test_padding_takes_part_in_attention_as_normalised_zeros() -> None:
    block = AttentionBlock(2, 1, 2).eval()
    with torch.no_grad():
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 0]))
        block.attn.qkv.weight[4:] = torch.eye(2)  # values are the normalised input, all weights are equal
        block.attn.norm.bias.copy_(torch.tensor([5.0, 5.0]))
        block.attn.proj.weight.copy_(torch.eye(2))
        block.attn.proj.bias.zero_()
        x = torch.tensor([3.0, -3.0]).reshape(1, 2, 1, 1)
        windows = split_windows(x.permute(0, 2, 3, 1), 2)
        attended = join_windows(block.attn(windows), 2, 1, 1).flatten()
    # One cell gives (1, -1) + 5; the three cells of padding give 0 + 5.
    torch.testing.assert_close(attended, torch.tensor([5.25, 4.75]), atol=1e-4, rtol=0)


def test_bias_follows_the_weights_in_evaluation() -> None:
    attention = WindowAttention(4, 1, 2).eval()
    with torch.no_grad():
        before = attention.bias().clone()
        attention.attention_biases.add_(1.0)
        assert torch.equal(attention.bias(), before + 1)
        assert attention.bias() is attention.bias()
    attention.bias().sum().backward()
    assert attention.attention_biases.grad is not None
    assert attention.attention_biases.grad.sum() == 16


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (80, 48), (176, 112)])
def test_any_multiple_of_sixteen_goes_in(rows: int, columns: int) -> None:
    with torch.inference_mode():
        assert random_encoder()(torch.randn(1, 3, rows, columns)).shape == (1, 24, rows // 16, columns // 16)


def test_lite_variant_keeps_the_resolution_in_its_patches() -> None:
    config = TinyViTConfig(SMALL.widths, SMALL.depths, SMALL.heads, SMALL.windows, 24, pointwise_patches=True)
    encoder = random_encoder(config)
    assert encoder.patch_embed.seq[0].c.weight.shape == (4, 3, 1, 1)
    with torch.inference_mode():
        assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, 24, 8, 8)
    assert config.stride == 4


def test_upper_after_lower_is_the_encoder() -> None:
    encoder, x = random_encoder(), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        lower = encoder.lower(x)
        assert lower.shape == (1, 20, 4, 4)
        assert torch.equal(encoder.upper(lower), encoder(x))


def test_folding_changes_keys_but_not_the_output() -> None:
    encoder, x = random_encoder(), torch.randn(2, 3, 64, 80)
    with torch.inference_mode():
        before = encoder(x)
        folded = encoder.fold_batch_norms()(x)
        again = encoder.fold_batch_norms()(x)
    torch.testing.assert_close(folded, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(again, folded)
    assert not any("running" in name for name in encoder.state_dict())


def test_folded_convolution_by_hand() -> None:
    layer = ConvNorm(1, 1, 1).eval()
    with torch.no_grad():
        layer.c.weight.fill_(3.0)
        norm = layer.bn
        assert isinstance(norm, torch.nn.BatchNorm2d)
        norm.weight.fill_(2.0)
        norm.bias.fill_(0.5)
        norm.running_mean = torch.tensor([1.0])
        norm.running_var = torch.tensor([4.0])
        layer.fold()
    x: Tensor = torch.full((1, 1, 1, 1), 2.0)
    # (3 * 2 - 1) / 2 * 2 + 0.5
    torch.testing.assert_close(layer(x).item(), 5.5, atol=1e-4, rtol=0)
