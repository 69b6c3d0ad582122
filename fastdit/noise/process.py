"""The interface that every noise process implements."""

from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from fastdit.errors import UserError
from fastdit.kernels import AnyGenerator

Weighting = Literal["output", "x0"]


@runtime_checkable
class NoiseProcess(Protocol):
    """Map clean images to noisy ones, define the network's task, and map the network's output back to images.

    A process is a frozen dataclass. Its fields are its settings, and each field has a default. Training methods,
    samplers and the configuration use the members below, and never ask which process they hold.

    x0, eps and x_t are (B, C, H, W). x0 and x_t are in the data's units; eps is standard normal. `level` is (B,) and
    measures the noise in the process's own unit: sigma for EDM, the timestep for DDPM, time for flow matching. `out`
    is the network's raw output, (B, out_channels(C), H, W), of any floating dtype. Results have the dtype of `level`,
    which is float32 in training and float64 in the samplers. No member waits for the device.
    """

    name: ClassVar[str]
    """The value of `--noise.name` that selects this process."""

    summary: ClassVar[str]
    """The heading of the process's flags in `--help`."""

    samplers: ClassVar[tuple[str, ...]]
    """Names of samplers in `fastdit.noise.sampling`, the default first.

    "heun" and "euler" also call `ode_levels(steps)`, which returns (steps + 1,) falling float64 levels, the last one 0.
    They integrate dx/dlevel = (x - x0_hat) / level. That holds where x_t = (1 - c level) x0 + level eps with a constant
    c, which is 0 for EDM and 1 for flow matching. "full_heun" and "euler_maruyama" also call `velocity(out)`, as Flow
    defines it; they are for c = 1. "ddpm" and "ddim" also call `chain(steps)`, as DDPM defines it.
    """

    network_settings: ClassVar[tuple[str, ...]]
    """Names of the settings that a trained network depends on: weights of one value are wrong with another."""

    @property
    def data_std(self) -> float:
        """Return the standard deviation of x0, in the data's units, that the process is made for."""
        ...

    @property
    def spare_outputs(self) -> bool:
        """Return whether other trainers' weights for this process may have twice the outputs, the second half unused.

        Such outputs are left out when the weights are read.
        """
        ...

    def out_channels(self, channels: int) -> int:
        """Return the number of channels that the network must return for data of `channels` channels."""
        ...

    def check_sampling_steps(self, steps: int) -> None:
        """Raise UserError, naming `sample.steps`, if the process cannot be sampled in `steps` steps."""
        ...

    def draw(self, n: int, *, generator: AnyGenerator, device: torch.device | str) -> Tensor:
        """Draw (n,) float32 training levels on `device`, by `draw_normal` or its like of `fastdit.kernels`."""
        ...

    def add_noise(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """Return x_t = signal(level) x0 + noise(level) eps."""
        ...

    def network_input(self, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's inputs beside the class labels: an image (B, C, H, W) and a time (B,)."""
        ...

    def loss(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of each sample (B,) and the x0 prediction (B, C, H, W).

        Both have a gradient with respect to `out`.
        """
        ...

    def clean(self, out: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """Return the x0 prediction of `loss` from x_t, for when x0 and eps are unknown."""
        ...

    def noise_to_signal(self, level: Tensor) -> Tensor:
        """Return (B,) noise(level) / signal(level). It is EDM's sigma, and comparable between processes."""
        ...

    def level_at(self, noise_to_signal: float, n: int, device: torch.device | str) -> Tensor:
        """Return (n,) float32, each the level whose ratio is nearest to `noise_to_signal`.

        Raises ValueError unless the ratio is positive and finite.
        """
        ...

    def at_quantile(self, share: Tensor) -> Tensor:
        """Return the level below which `share` of the training levels lie. `share` is inside (0, 1)."""
        ...

    def quantile_of(self, level: Tensor) -> Tensor:
        """Return the share of the training levels below `level`. It is the inverse of `at_quantile`."""
        ...


def check_weighting(name: str, weighting: str) -> None:
    """Raise UserError unless `weighting` of the process called `name` is one of the known weightings."""
    choices = get_args(Weighting)
    if weighting not in choices:
        raise UserError(f"noise.{name}.weighting: unknown weighting {weighting!r}; choose one of {', '.join(choices)}")
