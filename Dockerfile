# The image that `gptjax launch gke` and `gptjax launch tpu-vm` run on every host:
#   docker build --build-arg EXTRAS=tpu,cloud,data -t REGISTRY/gptjax:TAG . && docker push REGISTRY/gptjax:TAG
# EXTRAS=cuda,cloud,data is for GPUs: JAX's wheels bring CUDA, the host the driver.
FROM python:3.13-slim
ARG EXTRAS=tpu,cloud,data
WORKDIR /gptjax
COPY pyproject.toml README.md LICENSE ./
COPY gptjax gptjax
RUN pip install --no-cache-dir ".[${EXTRAS}]"
COPY configs configs
ENTRYPOINT ["python", "-u", "-m", "gptjax"]
