# Two images from one lock: `operator` (small, no torch) and `trainer`. Dependencies are a layer of their own, so that a change of
# code rebuilds in seconds. BASE_IMAGE is any Debian with Python 3.11 and its venv module; the digest is that of the tag's index of
# all platforms, so that the same Dockerfile builds on the same files. Renew both for fixes of Debian and Python.
#   docker build --target operator -t finetune-operator .
#   docker build --target trainer -t finetune-trainer .
ARG BASE_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/finetune PYTHONUNBUFFERED=1 LANG=C.UTF-8
WORKDIR /opt/finetune
# The user has a number and no name: nothing may depend on a user database.
RUN mkdir /scratch && chown 10001:10001 /scratch
LABEL org.opencontainers.image.licenses=Apache-2.0
# Byte code is compiled at build time, as the containers' root file system is read-only.
# Mounts would save the copies, but older buildah neither mounts from a cached stage nor sees that a mounted file has changed.
COPY requirements/uv.txt requirements/install.sh /tmp/build/

FROM base AS operator-dependencies
# For builds behind a proxy with certificates of its own; build arguments do not stay in the image.
ARG SSL_CERT_FILE
ARG PIP_CERT
COPY requirements/operator.txt requirements.txt
RUN sh /tmp/build/install.sh requirements.txt

FROM base AS trainer-dependencies
ARG SSL_CERT_FILE
ARG PIP_CERT
COPY requirements/trainer.txt requirements.txt
RUN sh /tmp/build/install.sh requirements.txt

FROM operator-dependencies AS operator
COPY api/finetune_api finetune_api
COPY operator/finetune_operator finetune_operator
COPY pyproject.toml requirements/metadata.py /tmp/build/
# The operator must stay small: no torch, not even by accident.
RUN python /tmp/build/metadata.py /tmp/build/pyproject.toml . && python -m compileall -q . \
    && python -c "import finetune_operator, kopf" && ! python -c "import torch" 2>/dev/null
USER 10001:10001
LABEL org.opencontainers.image.title=finetune-operator
ENTRYPOINT ["python", "-P", "-m", "finetune_operator"]

FROM trainer-dependencies AS trainer
COPY api/finetune_api finetune_api
COPY trainer/finetune_trainer finetune_trainer
COPY pyproject.toml requirements/metadata.py /tmp/build/
RUN python /tmp/build/metadata.py /tmp/build/pyproject.toml . && python -m compileall -q . \
    && python -c "import finetune_trainer.supervisor"
# Training is offline: the model comes from object storage. What libraries cache goes to the scratch volume; torch asks for a
# user's name, which a number without an entry in /etc/passwd has not.
ENV HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HOME=/scratch USER=finetune
USER 10001:10001
LABEL org.opencontainers.image.title=finetune-trainer
ENTRYPOINT ["python", "-P", "-m", "finetune_trainer.supervisor"]
