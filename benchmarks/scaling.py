"""Predicts a step on many GPUs from one measured on one: memory, communication, images a second. Arithmetic only.

P parameters are trained; n GPUs hold as many copies of the data pipeline, each with the measured batch (weak scaling).

Memory of a GPU. ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 5) divides by n: optimizer state (stage 1),
gradients (2), weights (3). What DeepSpeed 0.19 keeps between steps is in `held`, what it adds within one in `passing`.
To that comes `working`, the measured peak less what was held and the bucket: activations, and gradients in the making,
which were whole on the one GPU: with ZeRO-2 and 3 an upper bound.

Communication of a GPU in a step. A ring sends (n-1)/n of a tensor to gather it or to reduce and scatter it, and twice
that to all-reduce it (Patarasuk and Yuan 2009); volumes by stage are in `traffic`. The paper's section 7 has 2 P
elements for stages 0 to 2; DeepSpeed moves 3 P in stages 1 and 2, for it all-reduces gradients there. No latencies,
no waiting for the slowest rank, no reading of data: what is predicted is a bound.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

from record import aligned

from fastdit.errors import UserError

STAGES = (0, 1, 2, 3)
BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
LIVE = 1_000_000_000  # its stage3_max_live_parameters and stage3_max_reuse_distance
KEPT = 100_000  # its stage3_param_persistence_threshold: smaller tensors stay whole
PARTS = ("weights", "gradients", "optimizer", "averages", "replicas", "buckets", "working")


@dataclass(frozen=True)
class Links:
    """Describe what joins the GPUs: rates of one direction, in GB/s.

    Args:
        nvlink: of a GPU within its node. H100 HGX, NVLink 4: 450.
        network: of a GPU beyond its node. One NIC of 400 Gb/s for each: 50.
        gpus_per_node: in an HGX 8.
        overlap: share of the communication that computing hides. Zero is how fastdit's ZeRO-0 to 2 run: DeepSpeed's
            `overlap_comm` is off there unless a file sets it. ZeRO-3 prefetches, so for it zero is pessimistic.
    """

    nvlink: float = 450.0
    network: float = 50.0
    gpus_per_node: int = 8
    overlap: float = 0.0

    def __post_init__(self):
        """Raises UserError."""
        if min(self.nvlink, self.network, self.gpus_per_node) <= 0:
            raise UserError("--nvlink, --network, --gpus_per_node: must be above 0")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"--overlap {self.overlap}: must be from 0 to 1")

    def rate(self, gpus: int) -> float:
        """Bytes a second that each GPU of a ring over `gpus` sends, all rings together.

        Beyond a node NCCL lays a ring through every NIC: what crosses is shared by all of the node's.
        """
        if gpus <= self.gpus_per_node:
            return self.nvlink * 1e9
        return min(self.nvlink, self.network * self.gpus_per_node) * 1e9


@dataclass(frozen=True)
class Trained:
    """Hold the sizes of what a run keeps on GPUs.

    Args:
        parameters: trained ones, P.
        kept: those of them in tensors small enough for ZeRO-3 to leave whole.
        frozen: parameters that are not trained.
        averages: of the weights, kept as optimizer state.
        replicas: bytes whole on every GPU beside the network: buffers, a teacher, Psi and its optimizer.
        gathered: bytes of sharded averages that every step gathers for replicas: for SD-DiT's teacher.
        reduced: bytes of gradients that the method itself all-reduces: Psi's.
        bf16: weights and what is sent are bf16, with fp32 masters; else all is fp32.
        accumulation: micro-batches of a step.
        bucket: DeepSpeed's reduce_bucket_size, in elements.
        live: elements that ZeRO-3 leaves gathered: the least of stage3_max_live_parameters and _max_reuse_distance.
    """

    parameters: int
    kept: int = 0
    frozen: int = 0
    averages: int = 1
    replicas: int = 0
    gathered: int = 0
    reduced: int = 0
    bf16: bool = True
    accumulation: int = 1
    bucket: int = BUCKET
    live: int = LIVE

    @property
    def width(self) -> int:
        """Bytes of a weight, and of a gradient on its way."""
        return 2 if self.bf16 else 4

    @property
    def sums(self) -> bool:
        """Whether ZeRO-1 keeps the sum of micro-batches' gradients, in fp32 and whole on every GPU."""
        return self.bf16 and self.accumulation > 1

    @property
    def stages(self) -> tuple[int, ...]:
        """ZeRO-0 has no fp32 masters."""
        return STAGES[1:] if self.bf16 else STAGES


class Measured(NamedTuple):
    """A step on one GPU: seconds, samples, bytes between steps and at most, and under which stage."""

    seconds: float
    batch: int
    held: int
    peak: int
    stage: int


class Target(NamedTuple):
    """Hold what to predict for: numbers of GPUs, and what joins them."""

    gpus: list[int]
    links: Links


def target_of(text: str | None, links: Links, ranks: int, stage: int) -> Target | None:
    """Return the target of `--scale_to 8,64`, with the ranks and the stage to measure with. Raises UserError."""
    if not text:
        return None
    if not all(number.isdecimal() and int(number) for number in text.split(",")):
        raise UserError(f"--scale_to {text}: expected numbers of GPUs, as in 8,64,1024")
    gpus = [int(number) for number in text.split(",")]
    for n in gpus:
        if n > links.gpus_per_node and n % links.gpus_per_node:
            raise UserError(f"--scale_to {n}: does not fill nodes of {links.gpus_per_node}; change --gpus_per_node")
    if ranks > 1 or stage == 3:
        raise UserError("--scale_to: predicts from one GPU with ZeRO-0, 1 or 2; start it with python and --zero 1")
    return Target(gpus, links)


def held(model: Trained, stage: int, gpus: int) -> dict[str, float]:
    """Bytes on each GPU between steps, by part.

    The optimizer's are its two moments and, but for ZeRO-0, an fp32 copy of the weights (in fp32 too). Gradients stay
    in fp32 in ZeRO-1 with bf16 and accumulation, all of them, and in ZeRO-3, a part of them.
    """
    share = model.parameters / (gpus if stage else 1)
    weights = model.parameters + model.frozen
    if stage == 3:
        weights = weights / gpus + (model.kept if gpus > 1 else 0)  # one GPU's part is the whole
    gradients = {1: 4.0 * model.parameters if model.sums else 0.0, 3: 4.0 * share}
    return {
        "weights": model.width * weights,
        "gradients": gradients.get(stage, 0.0),
        "optimizer": (12.0 if stage else 8.0) * share,
        "averages": 4.0 * model.averages * share,
        "replicas": model.replicas,
        "buckets": model.width * model.bucket if stage == 3 else 0.0,
    }


def passing(model: Trained, stage: int, gpus: int) -> dict[str, float]:
    """Bytes on each GPU within a step alone, by part, beside what is `working`.

    In ZeRO-2 a bucket for gradients on their way, made whole however few they are, and with bf16 the fp32 sum of a part
    of them. (ZeRO-1, not contiguous, joins gradients when activations are gone.) In ZeRO-3 gathered weights, freed
    beyond `live`.
    """
    if stage == 3:
        return {"weights": model.width * min(model.live, model.parameters + model.frozen)}
    return {
        "buckets": model.width * float(model.bucket) if stage == 2 else 0.0,
        "gradients": 4.0 * model.parameters / gpus if stage == 2 and model.bf16 else 0.0,
    }


def memory(model: Trained, measured: Measured, stage: int, gpus: int) -> dict[str, float]:
    """Bytes on each GPU at most, by part (PARTS)."""
    working = measured.peak - measured.held - passing(model, measured.stage, 1)["buckets"]  # never ZeRO-3
    parts, more = held(model, stage, gpus), passing(model, stage, gpus)
    return {part: parts[part] + more.get(part, 0.0) for part in PARTS[:-1]} | {"working": max(0.0, working)}


def traffic(model: Trained, stage: int, gpus: int) -> float:
    """Bytes that each GPU sends in a step.

    Stage 0: gradients all-reduced. 1, 2: gradients all-reduced, weights gathered. 3: weights gathered forward, and
    backward again unless both uses lie within `live` elements; gradients reduced and scattered. Stage 2 reduces, and
    stage 3 does all, for each micro-batch.
    """
    weights, gradients = model.width * (model.parameters + model.frozen), model.width * model.parameters
    gathers = 1 if 2 * (model.parameters + model.frozen) <= model.live else 2
    moved = {
        0: 2 * gradients,
        1: 2 * gradients + gradients,
        2: model.accumulation * 2 * gradients + gradients,
        3: model.accumulation * (gathers * weights + gradients),
    }[stage]
    moved += 2 * model.reduced + (model.gathered if stage else 0)
    return moved * (gpus - 1) / gpus


def scaling(name: str, model: Trained, measured: Measured, target: Target) -> dict:
    """The record's part about one contender: for each number of GPUs and stage memory, communication, and the step."""
    return {
        "contender": name,
        "links": asdict(target.links),
        "model": asdict(model),
        "measured": measured._asdict(),
        "held_bytes": round(sum(held(model, measured.stage, 1).values())),
        "rows": [_row(model, measured, target.links, stage, gpus) for gpus in target.gpus for stage in model.stages],
    }


def _row(model: Trained, measured: Measured, links: Links, stage: int, gpus: int) -> dict:
    parts = memory(model, measured, stage, gpus)
    sent = traffic(model, stage, gpus)
    seconds = sent / links.rate(gpus)
    step = measured.seconds + seconds - min(links.overlap * seconds, measured.seconds)
    return {
        "gpus": gpus,
        "zero": stage,
        **{f"{part}_bytes": round(size) for part, size in parts.items()},
        "total_bytes": round(sum(parts.values())),
        "sent_bytes": round(sent),
        "communication_ms": seconds * 1e3,
        "step_ms": step * 1e3,
        "images_per_s": gpus * measured.batch / step,
        "efficiency": measured.seconds / step,
    }


def scaling_lines(predicted: dict) -> list[str]:
    """Markdown: what is assumed, then a line for each number of GPUs and stage."""
    links, measured = predicted["links"], predicted["measured"]
    off = predicted["held_bytes"] / measured["held"] - 1
    cells = [("GPUs", "ZeRO", *(f"{part}" for part in PARTS), "total MiB", "sent MiB", "communication ms", "step ms",
              "images/s", "efficiency")]  # fmt: skip
    for row in predicted["rows"]:
        sizes = (f"{row[f'{part}_bytes'] / 2**20:.0f}" for part in (*PARTS, "total", "sent"))
        cells.append((
            str(row["gpus"]), str(row["zero"]), *sizes, f"{row['communication_ms']:.3g}", f"{row['step_ms']:.4g}",
            f"{row['images_per_s']:,.0f}", f"{row['efficiency']:.1%}",
        ))  # fmt: skip
    return [
        f"**Predicted, not measured**: steps of {predicted['contender']} on many GPUs, {measured['batch']} samples on "
        f"each, from the step on one (ZeRO-{measured['stage']}). Links: {links['nvlink']:g} GB/s in a node of "
        f"{links['gpus_per_node']}, {links['network']:g} GB/s for each GPU beyond it, {links['overlap']:.0%} of the "
        f"communication hidden; no latencies. Between steps the memory model has {off:+.1%} against what was measured.",
        "",
        "Memory of a GPU in MiB:",
        "",
        *aligned(cells),
    ]
