# fastdit with the CUDA build of torch and its compiled kernels. docs/clusters.md has the commands.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev make g++ git openssh-client \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /fastdit
COPY . .
# The build sees no GPU: TORCH_INDEX= takes the CUDA build of torch, and the architectures are named.
ENV FASTDIT_CUDA_ARCHS="80;90"
RUN make setup PYTHON=python3.12 TORCH_INDEX=
ENV PATH="/fastdit/.venv/bin:${PATH}"
