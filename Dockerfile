# The image that `gptjax launch gke` and `gptjax launch tpu-vm` run on every host:
#   docker build --build-arg EXTRAS=tpu,cloud,data,plot -t REGISTRY/gptjax:TAG . && docker push REGISTRY/gptjax:TAG
# EXTRAS=cuda,cloud,data,plot is for GPUs: JAX's wheels bring CUDA, the host the driver.
FROM python:3.13-slim
ARG EXTRAS=tpu,cloud,data,plot
WORKDIR /gptjax
COPY pyproject.toml README.md LICENSE ./
COPY gptjax gptjax
RUN pip install --no-cache-dir ".[${EXTRAS}]"
COPY configs configs
# Any user may run it, on a root file system that is read-only: all caches lie below HOME.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1
USER 1000
ENTRYPOINT ["python", "-u", "-m", "gptjax"]
