# Three images. Each runs as a user who is not root, with `hvd-vgg` as its command, the data at /data and runs at /runs:
#
#   docker build -t hvd_vgg:cpu .
#   docker build -t hvd_vgg:nvidia --target=nvidia .
#   docker build -t hvd_vgg:corex --target=corex --build-arg=COREX_IMAGE=corex:4.3.0 .
#   ... --build-arg=COREX_WHEELS=launch/wheels   where that image lacks TensorFlow or Horovod
#
# corex is the vendor's own image, which its docker-installer makes; Open MPI is in it, TensorFlow and Horovod not always.
#
# Never built by docker yet: launch/check_dockerfile.sh carries out the instructions of `cpu`, and those of `corex` on a stand-in
# for the vendor's image. Those of `nvidia` were not tried at all.
# hadolint global ignore=DL3008
# (apt versions are not pinned: distributions remove old ones; the base images' tags are.)
# TensorFlow 2.16 wants CUDA 12 and cuDNN 8: not what .github/dependabot.yml raises, which finds images behind FROM alone.
ARG CUDA_BUILD_IMAGE=nvidia/cuda:12.2.2-cudnn8-devel-ubuntu22.04
ARG CUDA_IMAGE=nvidia/cuda:12.2.2-cudnn8-runtime-ubuntu22.04
# No registry is known to have it with TensorFlow; under .invalid (RFC 2606) nothing can be found, and the name is in docker's message.
ARG COREX_IMAGE=build-arg-corex-image-is-missing.invalid/corex:none


FROM ${COREX_IMAGE} AS corex
# The vendor's image may end as another user.
USER 0:0
COPY launch/container /opt/hvd_vgg/launch/container
RUN bash /opt/hvd_vgg/launch/container/setup.sh
COPY . /opt/hvd_vgg
# The vendor's wheels: a directory or files of this clone, or addresses that pip can read, separated by spaces.
ARG COREX_WHEELS=
# PATH, PYTHONPATH and LD_LIBRARY_PATH stay the vendor's.
RUN chmod -R a+rX /opt/hvd_vgg && bash /opt/hvd_vgg/launch/container/beside_vendor.sh

LABEL org.opencontainers.image.title="hvd_vgg, corex" \
      org.opencontainers.image.description="Trains VGG networks with TensorFlow and Horovod; for Iluvatar BI-V100 and BI-V150"
# Without the right to trace each other, which containers lack, ranks would fail to copy out of each other's memory.
ENV OMPI_MCA_btl_vader_single_copy_mechanism=none
VOLUME ["/data", "/runs"]
WORKDIR /runs
USER 1000:1000
ENTRYPOINT ["hvd-vgg"]
CMD ["--help"]


FROM ${CUDA_BUILD_IMAGE} AS nvidia-build
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
# Horovod links to the driver's library, of which this image has a stand-in only.
RUN ldconfig /usr/local/cuda/lib64/stubs
WORKDIR /opt/hvd_vgg
COPY launch/environment.sh launch/
COPY launch/versions/requirements-2.16.txt launch/requirements.txt
COPY setup.cfg pyproject.toml ./
COPY hvd_vgg/__init__.py hvd_vgg/
ENV HVD_VGG_VENV=/opt/venv PYTHON=python3.10 \
    HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED HOROVOD_CUDA_HOME=/usr/local/cuda \
    HOROVOD_BUILD_CUDA_CC_LIST=70,75,80,86,89,90
RUN sed -i 's/^tensorflow-cpu==/tensorflow==/' launch/requirements.txt && bash launch/environment.sh && \
    /opt/venv/bin/python -c "import horovod.tensorflow as hvd; assert hvd.nccl_built(), 'Horovod was built without NCCL'"


FROM ${CUDA_IMAGE} AS nvidia
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
COPY launch/container /opt/hvd_vgg/launch/container
RUN bash /opt/hvd_vgg/launch/container/setup.sh
# What --xla compiles with.
COPY --from=nvidia-build /usr/local/cuda/bin/ptxas /usr/local/cuda/bin/
COPY --from=nvidia-build /usr/local/cuda/nvvm/libdevice /usr/local/cuda/nvvm/libdevice
COPY --from=nvidia-build /opt/venv /opt/venv
COPY . /opt/hvd_vgg
RUN chmod -R a+rX /opt/hvd_vgg

LABEL org.opencontainers.image.title="hvd_vgg, nvidia" \
      org.opencontainers.image.description="Trains VGG networks with TensorFlow and Horovod; for NVIDIA GPUs, with NCCL"
ENV PATH=/opt/venv/bin:$PATH OMPI_MCA_btl_vader_single_copy_mechanism=none
VOLUME ["/data", "/runs"]
WORKDIR /runs
USER 1000:1000
ENTRYPOINT ["hvd-vgg"]
CMD ["--help"]


FROM python:3.11.13-slim-bookworm AS base


FROM base AS cpu-build
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hvd_vgg
# Only what decides the environment: it is not made again when the code changes.
COPY launch/environment.sh launch/requirements.txt launch/
COPY setup.cfg pyproject.toml ./
COPY hvd_vgg/__init__.py hvd_vgg/
ENV HVD_VGG_VENV=/opt/venv PYTHON=python3.11
RUN bash launch/environment.sh


FROM base AS cpu
COPY launch/container /opt/hvd_vgg/launch/container
RUN bash /opt/hvd_vgg/launch/container/setup.sh
COPY --from=cpu-build /opt/venv /opt/venv
COPY . /opt/hvd_vgg
RUN chmod -R a+rX /opt/hvd_vgg

LABEL org.opencontainers.image.title="hvd_vgg, cpu" \
      org.opencontainers.image.description="Trains VGG networks with TensorFlow and Horovod; for CPUs"
ENV PATH=/opt/venv/bin:$PATH OMPI_MCA_btl_vader_single_copy_mechanism=none
VOLUME ["/data", "/runs"]
WORKDIR /runs
USER 1000:1000
ENTRYPOINT ["hvd-vgg"]
CMD ["--help"]
