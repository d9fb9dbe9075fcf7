# The demo in a container, and trainings of your own. From this folder:
#   docker build -t capi .
#   docker run --rm --shm-size 2g -v "$PWD/runs:/capi/runs" capi
#   docker run --rm --gpus all --shm-size 8g -v /my/images:/images:ro -v "$PWD/runs:/capi/runs" capi \
#       python train_capi.py configs/vits14.yaml data.dataset=/images train.output_dir=runs/mine
# PyTorch from the package index brings its CUDA libraries: about 5.5 GB. GPUs need the NVIDIA Container Toolkit.

# With the compiler that torch.compile calls on a CPU.
FROM python:3.11

# Batches travel from workers through /dev/shm, of which docker gives 64 MB without --shm-size.
ENV PYTHONUNBUFFERED=1
WORKDIR /capi

# Packages first: a change of the code then does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt -e .

COPY . .
CMD ["python", "demo.py"]
