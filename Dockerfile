# A server of checkpoints on a CPU, as docs/serving.md describes it:
#   docker build -t megatransformer .
#   docker run -p 8000:8000 -v "$PWD/runs:/runs:ro" megatransformer /runs/recurrent_vlm

FROM python:3.11-slim AS environment
RUN apt-get update && apt-get install --yes --no-install-recommends make g++
WORKDIR /app
COPY requirements.lock Makefile ./
RUN make .venv/installed

FROM python:3.11-slim
RUN useradd --create-home server
WORKDIR /app
COPY --from=environment /app/.venv .venv
COPY . .
USER server
ENV PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
EXPOSE 8000
# A server that is healthy has a worker that is ready; models load before it listens.
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s \
    CMD [".venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
STOPSIGNAL SIGTERM
ENTRYPOINT [".venv/bin/python", "-m", "inference.serve", "--host", "0.0.0.0"]
