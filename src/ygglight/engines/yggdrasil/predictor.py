"""How deep will the draft be right? Guessed from the target's last hidden state (brief A.3; our design)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE, SHAPE = "predictor.safetensors", "predictor.json"


class DepthPredictor(nn.Module):
    """P(accepted length >= d) for d = 1..max_depth, from the hidden state before the root.

    A two-layer network gives hazards, h_d = P(>= d | >= d - 1); their running product is the survival curve, monotone
    by construction.

    Args:
        hidden_size: of the target. max_depth: D. width: of the layers.
    """

    def __init__(self, hidden_size: int, max_depth: int, width: int = 256) -> None:
        super().__init__()
        self.hidden_size, self.max_depth, self.width = hidden_size, max_depth, width
        self.norm = nn.LayerNorm(hidden_size)
        self.encoder = nn.Sequential(nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.heads = nn.Linear(width, max_depth)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the hazards.

        Args:
            hidden: ``[..., H]``, any float dtype.

        Returns:
            float32 ``[..., D]``.
        """
        return self.heads(self.encoder(self.norm(hidden.float())))  # type: ignore[no-any-return]

    @torch.no_grad()
    def survival(self, hidden: Tensor) -> Tensor:
        """P(accepted length >= d): float32 ``[..., D]``, non-increasing."""
        return torch.sigmoid(self(hidden)).cumprod(dim=-1)

    def loss(self, hidden: Tensor, accepted: Tensor, drafted: Tensor) -> Tensor:
        """Mean binary cross entropy of the hazards that were seen.

        Args:
            hidden: ``[N, H]``. accepted: int64 ``[N]``, accepted length. drafted: int64 ``[N]``, depth of the tree:
                when all of it was accepted, that is only a lower bound, and deeper hazards were not seen
                (right-censored).
        """
        depths = torch.arange(1, self.max_depth + 1, device=hidden.device)
        tried = depths[None] <= torch.minimum(accepted + 1, drafted)[:, None]  # hazard d is seen once d - 1 was reached
        went_on = (depths[None] <= accepted[:, None]).float()
        each = nn.functional.binary_cross_entropy_with_logits(self(hidden), went_on, reduction="none")
        return (each * tried).sum() / tried.sum().clamp_min(1)

    def check(self, hidden_size: int, name: str = "") -> None:
        """Raise if this was fitted to another model.

        Args:
            hidden_size: of the target. name: of the predictor, for the message.

        Raises:
            ValueError: its hidden states have another size.
        """
        if hidden_size != self.hidden_size:
            raise ValueError(
                f"the depth predictor {name!r} was fitted to a model of hidden size {self.hidden_size}, and this one's "
                f"is {hidden_size}: fit one to a log of this model (recipe yggdrasil/fit_depth_predictor.yaml)"
            )

    def save(self, directory: str | Path) -> None:
        """Write weights and shape to a folder, made if it is not there."""
        folder = Path(directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()}, folder / FILE)
        shape = {"hidden_size": self.hidden_size, "max_depth": self.max_depth, "width": self.width}
        (folder / SHAPE).write_text(json.dumps(shape))

    @staticmethod
    def load(directory: str | Path) -> DepthPredictor:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no predictor there; the text says how to make one.
        """
        folder = Path(directory).expanduser()
        if not (folder / SHAPE).is_file():
            raise FileNotFoundError(
                f"{folder} holds no depth predictor: fit one with the recipe yggdrasil/fit_depth_predictor.yaml"
            )
        predictor = DepthPredictor(**json.loads((folder / SHAPE).read_text()))
        predictor.load_state_dict(load_file(folder / FILE))
        return predictor.eval()
