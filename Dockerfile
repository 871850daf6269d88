# A classifier over HTTP, on the CPU: `docker build -t classifier .`; docs/deployment.md runs it.
FROM python:3.11-slim-bookworm

# rasterio's wheel needs libexpat, which slim images lack; Debian keeps one version of a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt ./
# What helpers.serve imports, in the versions of requirements.txt. torch comes from PyTorch's index
# of CPU builds: PyPI's brings 4 GB for GPUs.
RUN pip install --no-cache-dir --constraint requirements.txt \
        --index-url https://download.pytorch.org/whl/cpu torch torchvision \
    && pip install --no-cache-dir --constraint requirements.txt \
        affine fastapi numpy onnxruntime openvino pandas peft pillow prometheus_client psutil \
        pyarrow pydantic python-multipart rasterio safetensors scikit-learn scipy shapely timm \
        torchao tqdm uvicorn

COPY helpers ./helpers
# An adapter that was trained on the example's backbone is merged into it.
COPY example/backbone.safetensors ./example/

RUN useradd --create-home --uid 10001 serve
USER 10001
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"]

# The model is mounted at /model, the token comes as SERVE_TOKEN; flags after the image's name win.
ENTRYPOINT ["python", "-m", "helpers.serve", "--host", "0.0.0.0", "--port", "8000", "--model_path", "/model/model_final.safetensors"]
