"""Features of image observations: the convolutions and the random shift of TD-MPC2's encoder (arXiv 2310.16828).

What Isaac Lab 3.0.0 delivers (measured): ``Isaac-Cartpole-Camera`` the last two frames, (6, 96, 96) float32, colours
divided by 255 minus the mean of the image's channel; its preset ``depth`` (2, 96, 96) float32 metres, 0 where nothing
is seen. The tasks of its showcase have the channels last, (100, 100, 3), and so has a camera itself, uint8.
"""

from __future__ import annotations

import torch
from torch import nn

from m3po.errors import UserError
from m3po.models.layers import trunk

LAYERS = ((7, 2), (5, 2), (3, 2), (3, 1))
"""Kernel size and stride of each convolution."""

MAX_SHIFT = 3
"""Pixels by which training moves images, per 64 pixels of their smaller side."""


class ImageEncoder(nn.Module):
    """Maps images to feature vectors; while training, images are moved by a few random pixels first."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        out_dim: int,
        value_range: tuple[float, float],
        num_channels: int = 32,
    ) -> None:
        """Create the networks.

        Args:
            image_shape: Shape of an image, (C, H, W) or (H, W, C): the smaller one of both ends counts the channels,
                those of stacked frames together.
            out_dim: Features F.
            value_range: Pixel values that the network sees as -0.5 and 0.5: (0, 255) for bytes, (0, 1) for fractions,
                (-0.5, 0.5) for fractions minus their mean, (0, 20) for metres of depth with that clipping distance.
            num_channels: Channels of each convolution.

        Raises:
            UserError: If this is no shape of an image, the image is too small, or the range is empty.
        """
        super().__init__()
        self.image_shape = tuple(image_shape)
        if len(self.image_shape) != 3:
            raise UserError(f"an image is (C, H, W) or (H, W, C), got the observation shape {self.image_shape}.")
        first, _, last = self.image_shape
        if first == last:
            raise UserError(f"cannot tell the channels of an image of shape {self.image_shape} from its size.")
        self.channels_first = first < last
        channels, *size = self.image_shape if self.channels_first else (last, *self.image_shape[:2])
        left = [_size_after_convolutions(pixels) for pixels in size]
        if min(left) < 1:
            raise UserError(f"images of {size[0]} x {size[1]} pixels are too small; the least is 39 x 39.")
        low, high = value_range
        if not low < high:
            raise UserError(f"value_range must be (low, high) with low < high, got {value_range}.")
        self.value_range = (low, high)
        self.max_shift = MAX_SHIFT * min(size) // 64

        widths = [channels, *[num_channels] * len(LAYERS)]
        layers: list[nn.Module] = []
        for i, (kernel, stride) in enumerate(LAYERS):
            layer = nn.Conv2d(widths[i], widths[i + 1], kernel, stride)
            # torch's own start shrinks what four layers let through, and drowns it in their biases.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.head = trunk(num_channels * left[0] * left[1], [out_dim])

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode images.

        Args:
            images: Shape (..., *image_shape), uint8 or float32, finite.
            generator: Where training draws its shifts from; torch's own stream without one.

        Returns:
            Features of unit scale, (..., F).

        Raises:
            UserError: If these are no images of this shape.
        """
        if images.shape[-3:] != self.image_shape:
            raise UserError(f"expected images of shape (batch, *{self.image_shape}), got {tuple(images.shape)}.")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise UserError(f"expected images of uint8 or floats, got {images.dtype}.")
        pixels = images.reshape(-1, *self.image_shape)
        if not self.channels_first:
            pixels = pixels.movedim(-1, 1)
        if self.training:
            pixels = random_shift(pixels, self.max_shift, generator)
        low, high = self.value_range
        features = self.head(self.convolutions((pixels.float() - low) / (high - low) - 0.5).flatten(1))
        return features.reshape(*images.shape[:-3], features.shape[-1])


def random_shift(images: torch.Tensor, max_shift: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Move each image by its own whole number of pixels per axis; its border fills what moves in (arXiv 2004.13649).

    Args:
        images: Shape (B, C, H, W), any type.
        max_shift: Largest distance, pixels.
        generator: Source of the distances; torch's own stream without one.

    Returns:
        The moved images, (B, C, H, W).
    """
    count, _, height, width = images.shape
    offsets = torch.randint(-max_shift, max_shift + 1, (2, count, 1), generator=generator, device=images.device)
    rows = (torch.arange(height, device=images.device) + offsets[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + offsets[1]).clamp(0, width - 1)
    picked = torch.arange(count, device=images.device)[:, None, None]
    # Indices around a slice put their own dimensions first: (B, H, W, C).
    return images[picked, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _size_after_convolutions(size: int) -> int:
    """Pixels that the convolutions leave of a side of an image."""
    for kernel, stride in LAYERS:
        size = (size - kernel) // stride + 1
    return size
