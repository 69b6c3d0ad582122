"""Define the settings of Weights & Biases, which a run can send its metrics to."""

import re
from dataclasses import dataclass

from fastdit.errors import UserError

MOST_LETTERS = 128  # of a project's name, by W&B's rules
_REFUSED = re.compile(r"[/\\#?%:\x00-\x1f]")  # characters that W&B does not take in the name of a project


@dataclass(frozen=True)
class WandbSettings:
    """Choose whether a run is shown at Weights & Biases.

    Args:
        wandb: project of Weights & Biases, or ENTITY/PROJECT, that metrics, evaluations and sample grids go to too. It
            needs the package wandb. Its variables apply, such as WANDB_MODE=offline; none: nothing is sent.
    """

    wandb: str | None = None

    def check_wandb(self) -> None:
        """Raise UserError if the project's name is none that W&B takes."""
        if self.wandb is None:
            return
        entity, project = self.wandb_place
        for part in (entity, project):
            if part is not None and (not part.strip() or len(part) > MOST_LETTERS or _REFUSED.search(part)):
                raise UserError(
                    f"wandb: {self.wandb!r} names no project; give PROJECT or ENTITY/PROJECT, each of 1 to "
                    f"{MOST_LETTERS} characters without / \\ # ? % :"
                )

    @property
    def wandb_place(self) -> tuple[str | None, str]:
        """Return the entity, None for the user's own, and the project."""
        entity, slash, project = (self.wandb or "").partition("/")
        return (entity, project) if slash else (None, entity)
