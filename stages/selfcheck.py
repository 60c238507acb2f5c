"""Does our way of computing a model equal `transformers`' own? Asked of a small random one."""

import torch

from stages.architecture import Model


@torch.no_grad()
def randomise(model: Model) -> None:
    """Spread a fresh model's weights so wide that every bias, gain and flag shows in its logits."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
