"""Settings that the tests of benchmarks/throughput.py share: a tiny model, and images of random noise."""

import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = shlex.split(
    "--device cpu --threads 1 --batch 3 --precision fp32 --model.depth 2 --model.width 32 --model.heads 2 "
    "--sd_dit.decoder_width 16 --sd_dit.decoder_depth 1 --sd_dit.decoder_heads 2 --sd_dit.head_width 24 "
    "--sd_dit.bottleneck 8 --sd_dit.prototypes 40"
)
SAME = shlex.split(
    "--model.patch 4 --data.source synthetic:3x16x16:7:10000 --data.size 16 --data.channels 3 --data.classes 7"
)
