"""PSPNet: a timm backbone, the pyramid pooling module, and one of two heads.

Shape letters: N batch, C channels, H rows, W columns, K classes, B rows of all bins together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medpsp.config import ModelConfig
from medpsp.model.backbones import build_backbone

ALIGN = 32
"""Images are padded to a multiple of this, the largest stride of any backbone here."""


class PyramidPooling(nn.Module):
    """Average pooling to several grids by two matrix products, exact for every H and W.

    Equal to ``nn.AdaptiveAvgPool2d`` (pixel p lies in bin i of b iff (p+1) b > i n and
    p b < (i+1) n), but built from the runtime shape: the native operator exports to ONNX either
    not at all or wrongly away from the traced size. About twice as fast on a CPU, too.
    """

    def __init__(self, bins: tuple[int, ...]) -> None:
        super().__init__()
        self.bins = bins
        rows = [(i, b) for b in bins for i in range(b)]
        self.register_buffer("bin_index", torch.tensor([[i] for i, _ in rows]), persistent=False)
        self.register_buffer("bin_count", torch.tensor([[b] for _, b in rows]), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W) to one (N, C, b, b) for each bin b, in float32 or better."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = torch.matmul(x, self._weights(x, 3).transpose(0, 1))  # (N, C, H, B)
            both = torch.matmul(self._weights(x, 2), wide)  # (N, C, B, B)
        out, start = [], 0
        for b in self.bins:
            out.append(both[..., start : start + b, start : start + b])
            start += b
        return out

    def _weights(self, x: Tensor, dim: int) -> Tensor:
        """(B, n) averaging weights over an axis of length n."""
        length = x.shape[dim]
        pixel = torch.arange(length, device=x.device)[None, :]
        index, count = self.get_buffer("bin_index"), self.get_buffer("bin_count")
        inside = ((pixel + 1) * count > index * length) & (pixel * count < (index + 1) * length)
        weights = inside.to(x.dtype)
        return weights / weights.sum(dim=1, keepdim=True)


class PyramidModule(nn.Module):
    """Pool, reduce, upsample, concatenate with the input, fuse."""

    def __init__(self, channels: int, bins: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.pool = PyramidPooling(bins)
        widths = [
            out_channels // len(bins) + (i < out_channels % len(bins)) for i in range(len(bins))
        ]
        # GroupNorm: a 1 x 1 map of a batch of one has no batch statistics
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, w, 1, bias=False), nn.GroupNorm(1, w), nn.ReLU())
            for w in widths
        )
        self.fuse = conv_block(channels + out_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H, W)."""
        size = x.shape[-2:]
        maps = [
            F.interpolate(branch(pooled), size=size, mode="bilinear", align_corners=False)
            for branch, pooled in zip(self.branches, self.pool(x), strict=True)
        ]
        return self.fuse(torch.cat([x, *maps], dim=1))  # type: ignore[no-any-return]


class RefineDecoder(nn.Module):
    """Adds finer backbone maps one after another, a 3 x 3 convolution at each size."""

    def __init__(self, deep: int, skips: list[int], channels: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(deep, channels, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in skips)
        self.smooth = nn.ModuleList(conv_block(channels, channels, 3) for _ in skips)

    def forward(self, deep: Tensor, skips: list[Tensor]) -> Tensor:
        """Deepest map and skips from coarse to fine, to the size of the last skip."""
        x = self.enter(deep)
        for skip, lateral, smooth in zip(skips, self.lateral, self.smooth, strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = smooth(x + lateral(skip))
        return x  # type: ignore[no-any-return]


class PSPNet(nn.Module):
    """Segmentation network; one forward for training and export.

    The input is padded at the right and bottom to a multiple of 32 by repeating the edge and the
    output is cropped: scaling a ceil(H/32)-cell map straight to H shifts the mask (Dice 0.74 to
    0.56 at odd sizes).
    """

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.backbone = build_backbone(config)
        channels: list[int] = self.backbone.feature_info.channels()
        strides: list[int] = self.backbone.feature_info.reduction()
        self.pyramid = PyramidModule(channels[-1], config.bins, config.psp_channels)
        self.dropout = nn.Dropout2d(config.dropout)
        self.skips: list[int] = []
        width = config.psp_channels
        self.decoder: RefineDecoder | None = None
        if config.head == "refine":
            finer = {s: i for i, s in enumerate(strides) if s < strides[-1]}  # last map of a stride
            self.skips = [finer[s] for s in sorted(finer, reverse=True)]
            width = config.decoder_channels
            self.decoder = RefineDecoder(
                config.psp_channels, [channels[i] for i in self.skips], width
            )
        self.classify = nn.Conv2d(width, classes, 1)
        self.aux: nn.Module | None = None
        if config.aux:
            middle = conv_block(channels[-2], width, 3)
            self.aux = nn.Sequential(
                middle, nn.Dropout2d(config.dropout), nn.Conv2d(width, classes, 1)
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of an image.

        Args:
            x: (N, C, H, W) in [0, 1]; any H and W of at least 1.

        Returns:
            (N, K, H, W) logits, and in training mode those of the auxiliary head.
        """
        height, width = x.shape[-2:]
        pad_h = (height + ALIGN - 1) // ALIGN * ALIGN - height
        pad_w = (width + ALIGN - 1) // ALIGN * ALIGN - width
        x = F.pad(x, (0, pad_w, 0, pad_h), mode="replicate")
        size = x.shape[-2:]
        maps = self.backbone(x)
        features = self.dropout(self.pyramid(maps[-1]))
        if self.decoder is not None:
            features = self.decoder(features, [maps[i] for i in self.skips])
        logits = _upsample(self.classify(features), size)[..., :height, :width]
        if not self.training or self.aux is None:
            return logits, None
        return logits, _upsample(self.aux(maps[-2]), size)[..., :height, :width]

    def train(self, mode: bool = True) -> PSPNet:
        """As any module, but a frozen backbone keeps its BatchNorm statistics, too."""
        super().train(mode)
        if not any(p.requires_grad for p in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """Parameters of the backbone, or of everything else (``head``)."""
        inside = {id(p) for p in self.backbone.parameters()}
        return [p for p in self.parameters() if (id(p) in inside) == (part == "backbone")]


def conv_block(channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the size is kept."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def build_model(config: ModelConfig, classes: int) -> PSPNet:
    """The network of a configuration, for K classes (background included)."""
    return PSPNet(config, classes)


def _upsample(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
