# docker build --target cpu --tag jmae .            # for NVIDIA GPUs: --target cuda
# docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" jmae quickstart normals new
# For GPUs add --gpus all. The host needs NVIDIA's driver and its container toolkit, and no CUDA.
FROM python:3.12-slim AS cpu
WORKDIR /opt/jmae
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY jmae jmae
RUN pip install --no-cache-dir --no-deps .
# Compiled programs and settings of other packages go here, whoever the user is.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["jmae"]
CMD ["--help"]

# NVIDIA's libraries are Python packages, of the version that fits the locked JAX. They have no hashes in a lock file.
FROM cpu AS cuda
RUN pip install --no-cache-dir '/opt/jmae[cuda]'
