# The page and the API on a CPU. Build: docker build -t text-to-image .
# Run, with the folder of a published model:
#   docker run -p 127.0.0.1:7860:7860 -v "$PWD/models/my_birds:/model:ro" text-to-image
FROM python:3.11.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app

COPY requirements.txt requirements-serve.txt ./
# PyTorch without its CUDA libraries, which are most of an image.
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -r requirements.txt -r requirements-serve.txt

COPY miscc miscc
COPY models models
COPY datasets datasets
COPY sampling sampling
COPY serve serve
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin app
USER app

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "serve", "--host", "0.0.0.0"]
CMD ["--checkpoint", "/model"]
