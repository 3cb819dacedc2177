# Two images from one lock: `operator` (small, no torch) and `trainer`. Dependencies are a layer of their own, so that a change of
# code rebuilds in seconds. BASE_IMAGE is any Debian with Python 3.11 and its venv module.
#   docker build --target operator -t finetune-operator .
#   docker build --target trainer -t finetune-trainer .
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS uv
# For builds behind a proxy with certificates of its own; build arguments do not stay in the image.
ARG SSL_CERT_FILE
ARG PIP_CERT
COPY requirements/uv.txt /tmp/
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/python -m pip install --quiet --no-cache-dir --require-hashes --only-binary :all: -r /tmp/uv.txt

FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/finetune PYTHONUNBUFFERED=1 LANG=C.UTF-8 UV_PYTHON_DOWNLOADS=never
WORKDIR /opt/finetune
# Nothing may depend on a user database: the user has a number and no name.
RUN mkdir /scratch && chown 10001:10001 /scratch
LABEL org.opencontainers.image.licenses=Apache-2.0

FROM base AS operator-dependencies
ARG SSL_CERT_FILE
# Copied, not mounted: older buildah does not see that a mounted file has changed and would reuse the layer.
COPY requirements/operator.txt requirements.txt
# Compiled here, as the containers' root file system is read-only.
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    /opt/uv/bin/uv venv --quiet /opt/venv \
    && /opt/uv/bin/uv pip sync --quiet --no-cache --no-build --require-hashes --compile-bytecode \
        --python /opt/venv requirements.txt

FROM base AS trainer-dependencies
ARG SSL_CERT_FILE
COPY requirements/trainer.txt requirements.txt
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    /opt/uv/bin/uv venv --quiet /opt/venv \
    && /opt/uv/bin/uv pip sync --quiet --no-cache --no-build --require-hashes --compile-bytecode \
        --python /opt/venv requirements.txt

FROM operator-dependencies AS operator
COPY api/finetune_api finetune_api
COPY operator/finetune_operator finetune_operator
# The operator must stay small: no torch, not even by accident.
RUN python -m compileall -q . && python -c "import finetune_operator, kopf" && ! python -c "import torch" 2>/dev/null
USER 10001:10001
LABEL org.opencontainers.image.title=finetune-operator
ENTRYPOINT ["python", "-m", "finetune_operator"]

FROM trainer-dependencies AS trainer
COPY api/finetune_api finetune_api
COPY trainer/finetune_trainer finetune_trainer
RUN python -m compileall -q . && python -c "import finetune_trainer"
# Training is offline: the model comes from object storage. What libraries cache goes to the scratch volume.
ENV HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HOME=/scratch
USER 10001:10001
LABEL org.opencontainers.image.title=finetune-trainer
ENTRYPOINT ["python", "-m", "finetune_trainer.supervisor"]
