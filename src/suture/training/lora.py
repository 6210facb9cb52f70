r"""Low-rank updates through PEFT, plain and linearized.

:math:`W = W_0 + (\alpha / r) B A` with :math:`B = 0` at first (Hu et al. 2022, arXiv:2106.09685).
The derivative by :math:`A` is zero where :math:`B` is, so that the module, linearized at the
start, is the same with :math:`A` frozen (Tang et al. 2024, arXiv:2310.04742): no forward-mode pass
is needed, in training or afterwards. Updates of several tasks add up only if :math:`A` is shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from suture.errors import MissingExtraError, RecipeError
from suture.tensors.roles import role_of
from suture.training.calibrate import last_blocks
from suture.training.persample import is_linear
from suture.training.strategy import TrainJob, backbone_of


class LoraUpdates:
    """Low-rank updates inside of a model, until they are merged into its weights."""

    def __init__(
        self,
        job: TrainJob,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        dropout: float,
        seed: int,
        blocks: int = 0,
    ) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise MissingExtraError("low-rank fine-tuning", "finetune") from error
        backbone: Any = backbone_of(job.model, job.body)
        linear = {n: m for n, m in backbone.named_modules() if is_linear(m)}
        kept = last_blocks((f"{n}.weight" for n in linear), blocks)
        linear = {
            n: m for n, m in linear.items() if not blocks or role_of(f"{n}.weight").layer in kept
        }
        names = [n for n in linear if role_of(f"{n}.weight").kind in targets]
        if not names:
            there = sorted({role_of(f"{n}.weight").kind for n in linear})
            raise RecipeError(
                f"targets: no matrix of the model is {' or '.join(targets)}; "
                f"there are {', '.join(there)}"
            )
        job.freeze()
        config = LoraConfig(
            r=rank, lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=dropout, target_modules=names, bias="none",
            fan_in_fan_out=not isinstance(linear[names[0]], nn.Linear),
        )  # fmt: skip
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for a word that was renamed
            torch.manual_seed(seed)
            self.model = get_peft_model(backbone, config)
        self._layers = [
            m for m in backbone.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
        ]

    def freeze_a(self) -> str:
        """Freeze the first halves; their hash, which sums of updates must share."""
        state = xxhash.xxh3_128()
        for name, parameter in sorted(self.model.named_parameters()):
            if ".lora_A." in name:
                parameter.requires_grad_(False)
                state.update(f"{name} {tuple(parameter.shape)}".encode())
                state.update(parameter.detach().float().cpu().numpy().tobytes())
        return state.hexdigest()

    @property
    def count(self) -> int:
        """Entries that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        """Write the updates as PEFT reads them, into ``adapter/``."""
        self.model.save_pretrained(str(folder / "adapter"))

    def merge(self) -> None:
        """Add the updates to the weights; the model is then read without them."""
        for layer in self._layers:
            layer.merge(adapter_names=["default"])
