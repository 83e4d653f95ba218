"""PSPNet: a timm backbone, the pyramid pooling module, and one of three heads.

`refine` decodes down to the finest maps of the backbone; `classic` and `shallow` scale the pooled
map up at once, and differ in the backbone only: dilated, or ending at the output stride.

Shape letters: N batch, C channels, H rows, W columns, K classes, B rows of all bins together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medpsp.config import ModelConfig
from medpsp.model.backbones import build_backbone
from medpsp.model.dropout import KeyedDropout2d
from medpsp.model.norm import set_norm

ALIGN = 32
"""Images are padded to a multiple of this, the largest stride that `ModelConfig` allows."""


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
    """Pool, reduce, upsample, concatenate with the input, fuse.

    The branches together are as wide as the input, as in Zhao et al. 2017, but no wider than the
    output. Where the width is no multiple of their number the first are one channel wider.
    """

    def __init__(
        self, channels: int, bins: tuple[int, ...], out_channels: int, kernel: int = 3
    ) -> None:
        super().__init__()
        self.pool = PyramidPooling(bins)
        widths = branch_widths(min(channels, out_channels), len(bins))
        # GroupNorm: a 1 x 1 map of a batch of one has no batch statistics
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, w, 1, bias=False), nn.GroupNorm(1, w), nn.ReLU())
            for w in widths
        )
        self.fuse = conv_block(channels + sum(widths), out_channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H, W)."""
        size = x.shape[-2:]
        maps = [
            spread(branch(pooled), size)
            for branch, pooled in zip(self.branches, self.pool(x), strict=True)
        ]
        return self.fuse(torch.cat([x, *maps], dim=1))  # type: ignore[no-any-return]


def spread(grid: Tensor, size: torch.Size) -> Tensor:
    """(N, C, b, b) to (N, C, H, W) as bilinear `F.interpolate`, but by one matrix product.

    For a few cells that is several times as fast on a CPU, backward too: 2 % of a training step.
    """
    with torch.autocast(grid.device.type, enabled=False):
        wide = grid.to(torch.promote_types(grid.dtype, torch.float32))  # bfloat16 counts to 256
        rows, columns = (_hats(wide, length) for length in size)
        cells = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)
        out = torch.matmul(wide.flatten(2), cells)  # (N, C, H W)
    return out.reshape(*grid.shape[:2], *size).to(grid.dtype)


def _hats(grid: Tensor, length: int) -> Tensor:
    """(b, n) weight of each cell at each of n places: 1 at its centre, 0 from the next on."""
    count = grid.shape[-1]
    at = (torch.arange(length, device=grid.device, dtype=grid.dtype) + 0.5) * count / length - 0.5
    cell = torch.arange(count, device=grid.device, dtype=grid.dtype)
    return (1 - (at.clamp(0, count - 1) - cell[:, None]).abs()).clamp_min(0)


def branch_widths(total: int, count: int) -> list[int]:
    """Channels of each branch, adding up to ``total``; 2 at least, or one has no variance."""
    total = max(total, 2 * count)
    return [total // count + (i < total % count) for i in range(count)]


class RefineDecoder(nn.Module):
    """Adds finer backbone maps one after another, a 3 x 3 convolution at each size.

    Args:
        deep: Channels of the deepest map.
        skips: Of the finer ones, from coarse to fine.
        widths: Of what is made of each of them.
    """

    def __init__(self, deep: int, skips: list[int], widths: list[int]) -> None:
        super().__init__()
        coarser = [deep, *widths[:-1]]
        self.enter = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(coarser, widths, strict=True))
        self.lateral = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(skips, widths, strict=True))
        self.smooth = nn.ModuleList(conv_block(w, w, 3) for w in widths)

    def forward(self, deep: Tensor, skips: list[Tensor]) -> Tensor:
        """Deepest map and skips from coarse to fine, to the size of the last skip."""
        x = deep
        levels = zip(skips, self.enter, self.lateral, self.smooth, strict=True)
        for skip, enter, lateral, smooth in levels:
            x = enter(x)  # before it grows
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = smooth(x + lateral(skip))
        return x


class AuxHead(nn.Module):
    """Logits of a middle map, for a second loss in training."""

    def __init__(self, channels: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.reduce = conv_block(channels, width, 3)
        self.dropout = KeyedDropout2d(dropout, salt=2, channels=width)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """(N, C, H, W) to (N, K, H, W)."""
        return self.classify(self.dropout(self.reduce(x), keys))  # type: ignore[no-any-return]


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
        width = config.psp_channels
        kernel = 1 if config.head == "shallow" else 3
        self.pyramid = PyramidModule(channels[-1], config.bins, width, kernel)
        self.dropout = KeyedDropout2d(config.dropout, salt=1, channels=config.psp_channels)
        self.skips: list[int] = []
        self.decoder: RefineDecoder | None = None
        if config.head == "refine":
            finer = {s: i for i, s in enumerate(strides) if s < strides[-1]}  # last map of a stride
            self.skips = [finer[s] for s in sorted(finer, reverse=True)]
            width, finest = config.decoder_channels, min(finer)
            widths = [
                min(width * strides[i] // finest, max(width, config.psp_channels))
                for i in self.skips
            ]
            self.decoder = RefineDecoder(
                config.psp_channels, [channels[i] for i in self.skips], widths
            )
        self.stride = strides[self.skips[-1]] if self.skips else strides[-1]
        self.classify = nn.Conv2d(width, classes, 1)
        self.aux = AuxHead(channels[-2], width, classes, config.dropout) if config.aux else None

    def forward(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of an image.

        Args:
            x: (N, C, H, W) in [0, 1]; any H and W of at least 1.
            keys: (N,) int64, what the dropout of each sample is drawn from; in training only.

        Returns:
            (N, K, H, W) logits, and in training mode those of the auxiliary head.

        Raises:
            ValueError: Training with dropout and without keys.
        """
        height, width = x.shape[-2:]
        pad_h = (height + ALIGN - 1) // ALIGN * ALIGN - height
        pad_w = (width + ALIGN - 1) // ALIGN * ALIGN - width
        x = F.pad(x, (0, pad_w, 0, pad_h), mode="replicate")
        size = x.shape[-2:]
        maps = self.backbone(x)
        features = self.dropout(self.pyramid(maps[-1]), keys)
        if self.decoder is not None:
            features = self.decoder(features, [maps[i] for i in self.skips])
        logits = _upsample(self.classify(features), size)[..., :height, :width]
        if not self.training or self.aux is None:
            return logits, None
        return logits, _upsample(self.aux(maps[-2], keys), size)[..., :height, :width]

    def train(self, mode: bool = True) -> PSPNet:
        """As any module, but a frozen part keeps its BatchNorm statistics, too."""
        super().train(mode)
        for part in ("backbone", "head"):
            if not any(p.requires_grad for p in self.part_parameters(part)):
                for module in self.part_modules(part):
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def part_modules(self, part: str) -> Iterator[nn.Module]:
        """All modules of the backbone, or of everything else (``head``)."""
        for name, child in self.named_children():
            if (name == "backbone") == (part == "backbone"):
                yield from child.modules()

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """Parameters of the backbone, or of everything else (``head``)."""
        return [p for m in self.part_modules(part) for p in m.parameters(recurse=False)]


def conv_block(channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the size is kept."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def build_model(config: ModelConfig, classes: int) -> PSPNet:
    """The network of a configuration, for K classes (background included)."""
    model = PSPNet(config, classes)
    set_norm(model, config)
    return model


def _upsample(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
