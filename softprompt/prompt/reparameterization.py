"""Reparameterization: while a prompt [P, H] is trained, it is a function of other parameters.

A reparameterization is a module, called encoder as in PEFT, whose `forward()` returns the prompt. The engines see only
the prompt, and once per optimizer step its gradient is passed on to the encoder. What is saved is the prompt, so an
adapter does not depend on how it was trained. An encoder is initialized so that its first output is a
given prompt [P, H], such as the embeddings of a text.
"""

import torch
from torch import Tensor, nn

from softprompt.prompt.soft_prompt import PromptEmbedding


class ReparameterizedPrompt(PromptEmbedding):
    """A prompt [P, H] that is the output of an encoder, whose parameters are trained.

    `weight` is a leaf for the engines; the optimizer does not change it. `backward` and `fold` connect it to the
    encoder. Both compute in fp32, and take far less time than a step through the base.
    """

    def __init__(self, encoder: nn.Module):
        """Args:
        encoder: A module whose `forward()` returns the prompt [P, H] fp32.
        """
        with torch.no_grad():
            super().__init__(encoder())
        self.encoder = encoder

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.encoder.named_parameters())

    def backward(self) -> None:
        self.encoder().backward(self.weight.grad)
        self.weight.grad = None

    @torch.no_grad()
    def fold(self) -> None:
        self.weight.copy_(self.encoder())

    def encoder_state(self) -> dict[str, Tensor]:
        return self.encoder.state_dict()


class MLPEncoder(nn.Module):
    """The MLP of P-tuning (Liu et al. 2021, arXiv:2103.10385), with the layers of PEFT's PromptEncoder: an embedding of
    size H for each virtual token, and three linear layers with ReLU between them, shared by all virtual tokens.

    PEFT initializes all layers at random, so its prompts begin as nearly equal small vectors. Here the last layer is
    changed as little as possible so that the prompt begins at the start, up to rounding. This needs at least P hidden
    units that are active (not zero) for some virtual token, as there are with a width well above P. With fewer, the
    prompt begins at the best approximation, by least squares, that the last layer allows.
    """

    def __init__(self, start: Tensor, width: int):
        """Args:
        start: The initial prompt [P, H] fp32.
        width: The size of the two hidden layers.
        """
        super().__init__()
        P, H = start.shape
        self.embedding = nn.Parameter(torch.randn(P, H))
        layers = [nn.Linear(H, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, H)]
        self.mlp_head = nn.Sequential(*layers)
        self._begin_at(start)

    def forward(self) -> Tensor:
        return self.mlp_head(self.embedding)

    @torch.no_grad()
    def _begin_at(self, start: Tensor) -> None:
        """Change the weight of the last layer so that the output is `start`, by least squares in fp64. If the weight
        alone cannot, the bias is fitted, too."""
        hidden, last = self.mlp_head[:-1](self.embedding).double(), self.mlp_head[-1].double()  # [P, width]
        missing = start.double() - last(hidden)  # [P, H]
        change = torch.linalg.lstsq(hidden, missing, driver="gelsd").solution  # [width, H]
        if (hidden @ change - missing).norm() > 1e-6 * start.norm():
            ones = torch.ones_like(hidden[:, :1])
            *change, bias = torch.linalg.lstsq(torch.cat([hidden, ones], 1), missing, driver="gelsd").solution
            change = torch.stack(change)
            last.bias += bias
        last.weight += change.T
        self.mlp_head.float()
