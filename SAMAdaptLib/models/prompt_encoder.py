"""SAM's prompt encoder: points, boxes and masks become embeddings.

Paper: Kirillov et al., "Segment Anything", ICCV 2023 (https://arxiv.org/abs/2304.02643).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .layers import LayerNorm2d

NOT_A_POINT = -1
"""Label of a point that only fills up a batch."""


class PositionalEncoding(nn.Module):
    """Random Fourier features of positions (Tancik et al., NeurIPS 2020)."""

    positional_encoding_gaussian_matrix: Tensor  # (2, features)

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, unit_xy: Tensor) -> Tensor:
        """Encode (..., 2) positions in [0, 1], x before y, as (..., 2 * features)."""
        angles = 2 * math.pi * ((2 * unit_xy - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def of_cells(self, grid: tuple[int, int]) -> Tensor:
        """Encode the middles of the cells of a grid (h, w) as (1, 2 * features, h, w)."""
        h, w = grid
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(h, device=device) + 0.5) / h
        x = (torch.arange(w, device=device) + 0.5) / w
        cells_xy = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)
        encoded: Tensor = self(cells_xy)
        return encoded.permute(2, 0, 1).unsqueeze(0)


class PromptEncoder(nn.Module):
    """Encode prompts given in pixels of the network input.

    Neither the input size nor the grid is part of the weights: the same checkpoint serves any of them.

    Args:
        embed_dim: Channels C of the embeddings.
        grid: Rows and columns (h, w) of the image embedding.
        input_size: Rows and columns of the network input, padding included.
        mask_channels: Width of the mask branch.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        grid: tuple[int, int] = (64, 64),
        input_size: tuple[int, int] = (1024, 1024),
        mask_channels: int = 16,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.input_size = input_size
        self.pe_layer = PositionalEncoding(embed_dim // 2)
        # Negative point, positive point, first and second corner of a box.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    @property
    def mask_size(self) -> tuple[int, int]:
        """Rows and columns (4h, 4w) of a mask prompt."""
        return 4 * self.grid[0], 4 * self.grid[1]

    def forward(
        self,
        points_xy: Tensor | None = None,
        labels: Tensor | None = None,
        boxes_xyxy: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode a batch of B prompt sets; without any prompt B is 1.

        Args:
            points_xy: (B, N, 2) pixels of the network input, an integer being the middle of a pixel.
            labels: (B, N): 1 positive, 0 negative, -1 not a point; 2 and 3 the corners of a box.
            boxes_xyxy: (B, 4) first and last corner in the same pixels.
            masks: (B, 1, 4h, 4w) logits.

        Returns:
            The sparse embeddings (B, tokens, C) and the dense embedding (B, C, h, w).
        """
        sparse: list[Tensor] = []
        if points_xy is not None and labels is not None:
            sparse.append(self._embed_points(points_xy, labels, pad=boxes_xyxy is None))
        if boxes_xyxy is not None:
            sparse.append(self._embed_boxes(boxes_xyxy))
        if masks is not None:
            dense = self.mask_downscaling(masks)
            batch = sparse[0].shape[0] if sparse else masks.shape[0]
        else:
            batch = sparse[0].shape[0] if sparse else 1
            dense = self.no_mask_embed.weight[:, :, None, None].expand(batch, -1, *self.grid)
        nothing = self.no_mask_embed.weight.new_empty(batch, 0, dense.shape[1])
        return torch.cat([nothing, *sparse], dim=1), dense

    def dense_pe(self) -> Tensor:
        """Return the positional encoding of the cells of the grid, (1, C, h, w)."""
        return self.pe_layer.of_cells(self.grid)

    def _encode_pixels(self, pixels_xy: Tensor) -> Tensor:
        height, width = self.input_size
        encoded: Tensor = self.pe_layer((pixels_xy + 0.5) / pixels_xy.new_tensor([width, height]))
        return encoded

    def _embed_points(self, points_xy: Tensor, labels: Tensor, pad: bool) -> Tensor:
        if pad:
            batch = points_xy.shape[0]
            points_xy = torch.cat([points_xy, points_xy.new_zeros(batch, 1, 2)], dim=1)
            labels = torch.cat([labels, labels.new_full((batch, 1), NOT_A_POINT)], dim=1)
        labels = labels.unsqueeze(-1)  # B, N, 1
        embedded = self._encode_pixels(points_xy).masked_fill(labels == NOT_A_POINT, 0.0)
        kinds = {NOT_A_POINT: self.not_a_point_embed.weight}
        kinds |= {label: self._kind(label) for label in range(len(self.point_embeddings))}
        for label, weight in kinds.items():
            embedded = embedded + (labels == label) * weight
        return embedded

    def _embed_boxes(self, boxes_xyxy: Tensor) -> Tensor:
        corners = self._encode_pixels(boxes_xyxy.reshape(-1, 2, 2))
        return corners + torch.cat([self._kind(2), self._kind(3)])

    def _kind(self, index: int) -> Tensor:
        return self.point_embeddings.get_parameter(f"{index}.weight")
