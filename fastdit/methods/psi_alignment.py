"""Define psi_align (ours): align the tokens after a block with the features of an encoder Psi that knows the classes.

It is REPA (Yu et al., arXiv 2410.06940) with another encoder. REPA aligns a DiT's tokens with those of a pretrained
DINOv2. Here Psi is the small ResNet of SADM, which learns to classify the training data before step 0 and is then
frozen. So nothing is downloaded, latents and small images are enough, and a step costs one forward pass of Psi. There
is no second player and no comparison of samples: this is not SADM.

    f = Psi(x0)                     feature map of the clean sample, on the grid of the tokens, without gradient
    h = tokens of the DiT on x_t after block k
    L = L_denoise + lambda (1 - mean cos(projector(LN(h)), f))       mean over samples and tokens

The cosine, the projector and lambda = 0.5 are REPA's. Psi, its warm start, the layer of the map, the LayerNorm and all
other numbers are ours. With `psi_warm_steps` 0 Psi is random: this control shows the effect of a target without
classes.

The best layer of Psi is not known. The last map is mostly a function of the label, which the DiT sees anyway. On
Fashion-MNIST (512 images, Psi at 72 % accuracy), class and position alone reach a cosine of 0.90 with the last map,
0.86 with that of stage 3, and 0.79 with that of stage 2, whose grid is finer.

It runs on top of a plain DiT or of SADM: `PsiAlignment(StructureGame(Denoising(...)))`. Both methods then share one
Psi, which SADM warm-starts. If SADM trains it against the denoiser, tokens are still aligned with a frozen copy of the
warm Psi, because a target that moves away from the classes would undo the warm start.

In plain DiT steps, a step costs by count 1.06 at S/2, 1.05 at B/2, and 1.02 at L/2 and XL/2, for 4x32x32 latents. The
warm start takes half as many steps as the run, up to 10,000. Each of them costs 3 % of a plain step at S/2 and 0.2 % at
XL/2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastdit.errors import UserError, check_ranges
from fastdit.kernels import AnyGenerator
from fastdit.methods.denoising import GRADIENTS, Denoising, Network, Outcome, Panels, Shape, image_inputs
from fastdit.methods.encoder_build import build_latent_resnet, count_flops
from fastdit.methods.encoder_warm_start import count_warm_steps, warm_start_before_run
from fastdit.methods.ranks import sum_over_ranks
from fastdit.methods.wrapper import Wrapper
from fastdit.models import AlignedDiT, LatentResNet, TokenTargets
from fastdit.models.structure_encoders import STAGES, check_width

WIDEST = 2048  # hidden width of REPA's projector


@dataclass(frozen=True)
class PsiAlign:
    """Hold the settings of psi_align. The weight is REPA's; all others are ours.

    Args:
        weight: lambda, REPA's 0.5.
        depth: share of the DiT's blocks before the aligned tokens; a third, as in REPA's SiT-L/2.
        until: share of the run after which nothing is aligned and a step costs as much as a plain one.
        stage: block of Psi, 1 to 4, whose map is the target. The last map depends most on the classes and has the
            coarsest grid, of 4 x 4 cells for square samples.
        projector_width: width of the projector's two hidden layers; none: twice the DiT's, at most REPA's 2048.
        psi_weights: file of Psi's weights, from fastdit-warm-start.
        psi_warm_steps: steps in which Psi learns to classify the data before step 0; their time counts as training.
            none: half of the run's steps, at most 10,000, and no step if psi_weights is set or the data has a single
            class. 0 aligns with a random Psi, as a control.
        psi_width: width of Psi's first block.
        psi_features: dimension of the features from which Psi classifies.
    """

    weight: float = 0.5
    depth: float = 0.33
    until: float = 1.0
    stage: int = 4
    projector_width: int | None = None
    psi_weights: str | None = None
    psi_warm_steps: int | None = None
    psi_width: int = 96
    psi_features: int = 512

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be."""
        ranges = {"weight psi_warm_steps": (0,), "depth until": (0, 1), "stage": (1, STAGES)}
        check_ranges(self, "psi_align.", ranges | {"projector_width psi_width psi_features": (1,)})
        check_width(self.psi_width, "psi_align.psi_width")

    def block_of(self, depth: int) -> int:
        """Return the number of blocks before the aligned tokens in a DiT of `depth` blocks."""
        return min(depth, max(1, round(self.depth * depth)))

    def hidden_of(self, width: int) -> int:
        """Return the width of the projector's hidden layers for a DiT of this width."""
        return self.projector_width or min(WIDEST, 2 * width)

    def warm_steps(self, steps: int, classes: int) -> int:
        """Return the number of warm-start steps before a run of `steps` steps: see `count_warm_steps`."""
        if self.psi_weights or not self.until:
            return 0
        return count_warm_steps("psi_align", self.psi_warm_steps, steps, classes)


class PsiAlignment(Wrapper):
    """Add the alignment loss to another method, `base`. The trained module is an `AlignedDiT`.

    Args:
        base: the method that computes outcomes, with the DiT as its module.
        settings: see `PsiAlign`.
        module: the trained module, before it is sharded.
        psi: the encoder, which is frozen here.
        psi_flops: FLOPs of its forward pass for one sample, up to its map.
        shared: SADM's encoder, which `base` warm-starts and psi then copies; None: psi is warm-started here.
    """

    name = "psi_align"
    summary = "alignment with an encoder that knows the classes"
    settings_type = PsiAlign
    refuses: ClassVar[dict[str, str]] = {"sd_dit": "psi_align aligns the tokens of a plain DiT"}
    panels: ClassVar[Panels] = {
        GRADIENTS: {"alignment_gradient_ratio": "alignment, at the tokens"},
        "cosine of tokens and Psi's features": {"alignment": "cosine"},
    }

    @classmethod
    def check(cls, config) -> None:
        """Raise UserError if Psi is shared with SADM and their settings of it differ."""
        if not shares_psi(config):
            return
        for field in fields(PsiAlign):
            value, used = getattr(config.psi_align, field.name), getattr(config.sadm, field.name, None)
            if field.name.startswith("psi_") and value not in (field.default, used):
                raise UserError(
                    f"psi_align.{field.name}: {value}, but beside sadm the one Psi has sadm.{field.name} {used}; "
                    "make them equal"
                )

    @classmethod
    def build(
        cls, config, shape: Shape, module: nn.Module, base: Denoising, decoder=None
    ) -> tuple[AlignedDiT, "PsiAlignment"]:
        """Return the DiT `module` with a projector, and the method. Raises UserError if Psi's file cannot be read."""
        # Build Psi, with SADM's settings if both methods share it.
        settings, shared = config.psi_align, shares_psi(config)
        psi = build_latent_resnet(config.sadm if shared else settings, shape, config.seed)

        # Attach the projector to the DiT.
        aligned = AlignedDiT(
            module,
            block=settings.block_of(module.depth),
            hidden=settings.hidden_of(module.width),
            features=psi.channels_of(settings.stage),
            seed=config.seed,
        )
        flops = count_flops(TokenTargets(psi, settings.stage, module.grid), shape)
        return aligned, cls(base, settings, aligned, psi, flops, base.psi if shared else None)

    @classmethod
    def checkpoint_signature(cls, config) -> dict[str, object]:
        """Return the settings that fix the tensors of a checkpoint, and the target of the alignment."""
        settings, dims = config.psi_align, config.model.dims()
        fixed = {
            "block": settings.block_of(dims["depth"]),
            "stage": settings.stage,
            "projector_width": settings.hidden_of(dims["width"]),
        }
        if not shares_psi(config):
            fixed |= {name: getattr(settings, name) for name in ("psi_width", "psi_features")}
        return {f"psi_align.{name}": value for name, value in fixed.items()}

    def __init__(
        self,
        base: Denoising,
        settings: PsiAlign,
        module: AlignedDiT,
        psi: LatentResNet,
        psi_flops: float = 0.0,
        shared: LatentResNet | None = None,
    ) -> None:
        super().__init__(base)
        self.settings, self.shared, self.psi_flops = settings, shared, psi_flops
        self.targets = TokenTargets(psi.eval().requires_grad_(False), settings.stage, module.network.grid)
        self.gradients = module.gradients
        self.aligns = True  # whether the step has the alignment loss
        self.autocast = False  # whether Psi computes in bf16

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: AnyGenerator) -> Outcome:
        """Return the base's outcome with lambda (1 - mean cosine) added to its loss, without a host sync.

        The alignment loss does not depend on the network's output, so `Outcome.outputs` are still those of the base.
        """
        # Compute the base's loss, and keep the cosine that the network returns beside its output.
        targets = self.targets_of(x0) if self.aligns else None
        cosines: list[Tensor] = []

        def generate(*inputs: Tensor) -> Tensor:
            out, cosine = network(*inputs, *([] if targets is None else [targets]))
            cosines.append(cosine)
            return out

        outcome = super().loss(generate, x0, y, generator)
        (cosine,) = cosines

        # Add the alignment loss. Without targets the cosine is a zero that reaches every weight of the projector.
        if targets is None:
            return outcome._replace(loss=outcome.loss + cosine)
        terms = {"alignment": cosine.detach(), "alignment_loss": 1 - cosine.detach()}
        loss = outcome.loss + self.settings.weight * (1 - cosine)
        return outcome._replace(loss=loss, terms=outcome.terms | terms)

    @property
    def psi(self) -> LatentResNet:
        """Return the frozen encoder."""
        return self.targets.psi

    @torch.no_grad()
    def targets_of(self, x0: Tensor) -> Tensor:
        """Return the targets (B, tokens, channels) float32 of the tokens of clean samples x0 (B, C, H, W)."""
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.autocast):
            return self.targets(x0)

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int, say: Callable[[str], None]) -> None:
        """Prepare the base, then copy its warm Psi or warm-start Psi here."""
        super().prepare(batches, steps, say)
        if self.shared is not None:
            self.psi.load_state_dict(self.shared.state_dict())
        elif count := self.settings.warm_steps(steps, self.classes):
            warm_start_before_run("psi_align", self.psi, self.classes, batches, count, self.autocast, say)

    def preparation_batches(self, steps: int) -> int:
        """Return the number of batches on which the base and an own Psi are prepared."""
        own = self.settings.warm_steps(steps, self.classes) if self.shared is None else 0
        return super().preparation_batches(steps) + own

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        """Decide whether the step has the alignment loss, and begin the base's step."""
        self.aligns = step < self.settings.until * steps
        self.gradients.reset()
        return super().begin_step(step, steps)

    def end_step(self) -> dict[str, Tensor]:
        """Return the base's signals, and |lambda grad L_align| / |grad L_denoise| at the aligned tokens."""
        terms = super().end_step()
        if not self.aligns:
            return terms
        squares = sum_over_ranks(self.gradients.squares.clone())
        return terms | {"alignment_gradient_ratio": self.gradients.read(squares)}

    def base_module(self, module: AlignedDiT) -> nn.Module:
        """Return the DiT, without the projector."""
        return module.network

    def graphed(self, module: AlignedDiT, batch: int) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        """Return the module with inputs for aligning steps and, if alignment ends early, for the other steps."""
        images = image_inputs(module.network, batch)
        rows, columns = module.network.grid
        targets = images[0].new_zeros(batch, rows * columns, module.projector.sizes[-1], dtype=torch.float32)
        return [*[(module, images)][: self.settings.until < 1], (module, (*images, targets))]

    def flops(self, module: AlignedDiT) -> dict[str, float]:
        """Return FLOPs by part, for the step that `begin_step` began last. Without alignment its parts are zero."""
        rows, columns = module.network.grid
        alignment = {"projector": 6 * module.projector.products(rows * columns), "psi": self.psi_flops}
        return super().flops(module) | (alignment if self.aligns else dict.fromkeys(alignment, 0.0))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move base and Psi. Psi keeps fp32 weights and computes in `dtype`; on GPUs its weights are channels-last."""
        super().to(device, dtype)
        self.psi.to(device)
        if device.type == "cuda":
            self.psi.to(memory_format=torch.channels_last)
        self.gradients.to(device)
        self.autocast = dtype == torch.bfloat16

    def state_dict(self) -> dict:
        """Return the base's state, and Psi's weights, which no other file holds after a warm start."""
        return super().state_dict() | {"psi": self.psi.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load the result of `state_dict`."""
        super().load_state_dict(state)
        self.psi.load_state_dict(state["psi"])


def shares_psi(config) -> bool:
    """Return whether psi_align and SADM share one Psi in the run of `config`."""
    both = config.uses("psi_align") and config.uses("sadm")
    return both and config.sadm.psi == "latent_resnet" and config.sadm.structure != "off"
