# One image for every node of a cluster: base, RDMA libraries, PyTorch, launcher, training script.
#
#   docker compose build                                              # the variant that HARDWARE in .env asks for
#   docker compose build --build-arg BASE_IMAGE=debian:13-slim        # any Debian 12/13 or Ubuntu 24.04 base
#   WHEELHOUSE=/mnt/wheels docker compose build                       # air-gapped: wheels from a folder, see wheels/
#   TORCH=base BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3 docker compose build       # on an image with its own torch
#   docker build --target launcher -t torchrun-compose:launcher .     # for your own Dockerfile: docs/images.md
#
# No `# syntax=` line: it would make every build ask a registry.

# torch's wheels bring CUDA's libraries, so the base needs no more than the driver's compatibility files.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG TORCH=cpu

# Stands in for the wheelhouse when the build gives no context of this name.
FROM scratch AS wheels
COPY requirements/base.in /

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS os-cpu
# NCCL loads libibverbs by name; torch's wheels do not bring it. The providers are the cards' user-space drivers.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# Triton compiles its launchers at run time, with gcc and Python's headers.
FROM os-cpu AS os-cuda
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# ROCm's wheels of torch bring its libraries; nobody has run this variant yet.
FROM os-cuda AS os-rocm

# hadolint ignore=DL3006
FROM os-${TORCH} AS venv
ARG TORCH
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements/${TORCH}.txt /tmp/requirements.txt
# A wheelhouse that has everything needs no network. Where it lacks something, PyPI and, for the CPU build, PyTorch's own
# page of wheels are asked; the hashes decide what is accepted from anywhere. pip compiles all bytecode: the root file
# system is read-only at run time, and `import torch` without it costs twice the CPU.
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
 && set -- /opt/venv/bin/pip install --require-hashes --only-binary=:all: --find-links=/wheels -r /tmp/requirements.txt \
 && if ! "$@" --no-index 2>/dev/null; then \
        if [ "$TORCH" = cpu ] && ! ls /wheels/torch-*.whl >/dev/null 2>&1; then \
            set -- "$@" --find-links=https://download.pytorch.org/whl/cpu/torch/; \
        fi; \
        "$@"; \
    fi
# torch for ROCm is on PyTorch's own index only, and its hashes are not locked here.
ARG ROCM_TORCH=torch==2.13.0
ARG ROCM_INDEX=https://download.pytorch.org/whl/rocm7.0
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    if [ "$TORCH" = rocm ]; then \
        /opt/venv/bin/pip install --only-binary=:all: --find-links=/wheels --extra-index-url="$ROCM_INDEX" "$ROCM_TORCH"; \
    fi
# C++ test programs and protoc, 130 MB that nothing loads; torch_shm_manager beside them is needed.
RUN rm -rf /opt/venv/lib/python3*/site-packages/torch/test \
 && find /opt/venv/lib/python3*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete

# All that an image with its own torch lacks: nothing of it depends on the kind of machine or the version of Python.
FROM ${BASE_IMAGE} AS folders
# hadolint ignore=DL3002
USER 0
# A fresh volume mounted at /runs has its mode, so that any RUN_AS may write.
RUN install -d -m 0777 /launcher/runs /launcher/workspace \
 && install -D -m 0644 /dev/null /launcher/etc/torchrun-compose/.env \
 && install -d /launcher/etc/torchrun-compose/secrets

FROM scratch AS launcher
# Empty places for ENV_FILE and secrets/ to be mounted over.
COPY --from=folders /launcher /
COPY --chmod=0755 entrypoint.py /opt/torchrun-compose/
COPY app /opt/torchrun-compose/app

# hadolint ignore=DL3006
FROM os-${TORCH} AS with-pinned
COPY --from=venv /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Ubuntu's images have a user 1000 already.
RUN getent passwd 1000 >/dev/null || useradd --uid 1000 --create-home --shell /usr/sbin/nologin trainer

FROM with-pinned AS with-cpu
FROM with-pinned AS with-cuda
FROM with-pinned AS with-rocm
FROM ${BASE_IMAGE} AS with-base

# hadolint ignore=DL3006
FROM with-${TORCH}
USER 0
# The NVIDIA_* pair is what the GPU runtime reads; other bases than nvidia/cuda do not set it, and without a GPU nobody
# reads it. HOME is for what is started without the launcher: a training's own lies below /runs, where there is room, where
# compiled kernels can be loaded from, and which outlasts the container (app/plan/script.py).
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    RUNS_ROOT=/runs \
    ENV_FILE=/etc/torchrun-compose/.env \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
# The start period covers the roll call, in which nodes may wait minutes for each other.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["sh", "/opt/torchrun-compose/app/start.sh", "healthcheck"]
ENTRYPOINT ["sh", "/opt/torchrun-compose/app/start.sh"]
# Last, so that an edit copies and compiles a few files and nothing more. Refuses a base without a torch that can train.
# hadolint ignore=DL3067
COPY --from=launcher / /
RUN PYTHONDONTWRITEBYTECODE="" sh /opt/torchrun-compose/app/start.sh --compile
USER 1000:1000
ARG BASE_IMAGE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="torchrun-compose" \
      org.opencontainers.image.description="Multi-node PyTorch training on plain Docker hosts" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
