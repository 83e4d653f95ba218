"""The network between what a scanner gives and what a device shows, as one graph to export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medpsp.deploy.inputs import GraphInput, window_rows


class DeployGraph(nn.Module):
    """Modality values in, class ids out: windows, network, argmax.

    Args:
        model: Gives logits (N, K, H, W) and something else for (N, C, H, W) in [0, 1].
        given: What it is fed.
        confidence: Give the share of the chosen class, too. onnxruntime computes every output,
            whichever are fetched: 4 % of the time of ResNet18's int8, and 27 % as a softmax.
    """

    def __init__(self, model: nn.Module, given: GraphInput, confidence: bool = False) -> None:
        super().__init__()
        self.model, self.given, self.confidence = model, given, confidence
        constant = torch.from_numpy(window_rows(given.windows)) if given.windows else None
        self.register_buffer("window", constant, persistent=False)
        self.sigmoid = not given.windows or any(w.function == "SIGMOID" for w in given.windows)

    def forward(self, image: Tensor, window: Tensor | None = None) -> tuple[Tensor, ...]:
        """Masks, logits and, if wanted, confidences.

        Args:
            image: (N, P, H, W) modality values of any real dtype.
            window: (N, V, 3), see `window_rows`; None where they are constants.

        Returns:
            (N, H, W) uint8 class ids, (N, K, H, W) logits, and (N, H, W) share of the chosen class
            (softmax).
        """
        logits, _ = self.model(self.unit(image, window))
        found = logits.argmax(dim=1).to(torch.uint8), logits
        if not self.confidence:
            return found
        top = logits.amax(dim=1, keepdim=True)
        return *found, 1 / (logits - top).exp().sum(dim=1)

    def unit(self, image: Tensor, window: Tensor | None = None) -> Tensor:
        """(N, P V, H, W) in [0, 1], as `intensity.to_unit` has it; NaN counts as low."""
        rows = self.get_buffer("window")[None] if window is None else window
        low, width, kind = (rows[:, None, :, i, None, None] for i in range(3))
        x = (image.to(torch.float32)[:, :, None] - low) / width.abs()
        if self.sigmoid:
            x = torch.where(kind > 0, 0.5 + 0.5 * torch.tanh(2 * x), x)
        if image.is_floating_point() or window is not None:  # either may hold NaN
            x = torch.where(x > 0, x, torch.zeros_like(x))  # NaN is not above 0
        x = x.clamp(0, 1)
        x = torch.where(width < 0, 1 - x, x) if window is not None else x
        return x.flatten(1, 2)
