# Training and sampling in a container:
#   docker build -t next-scale .
#   docker run --gpus all --ipc=host -v /data/imagenet:/data -v $PWD/local_output:/app/local_output next-scale \
#       torchrun --standalone --nproc_per_node=8 train.py --preset=var_d16 --data_path=/data
# Loaders hand images over in shared memory, so that --ipc=host, or --shm-size=16g, is needed.
FROM python:3.12-slim
WORKDIR /app
COPY requirements.txt requirements-eval.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-eval.txt
COPY . .
CMD ["python", "-m", "utils.doctor"]
